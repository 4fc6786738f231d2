"""`mpo demo`: all of MPO, from a few worked examples to a better model, in five to ten minutes on two CPU cores."""

from __future__ import annotations

import argparse
from pathlib import Path

EXPLANATION = """\
Train a small InternVL with MPO on its own responses, from supervised fine-tuning to an evaluation report.

  1. draw images of real handwriting: worked examples, questions, and evaluation images that share no digit with them
  2. fine-tune a new model on the worked examples (SFT)
  3. evaluate it on 1,000 images
  4. sample several responses to each question, at temperature 1
  5. pair correct with incorrect responses by their line "Final answer: ..."
  6. train on these pairs with MPO: mpo train experiment=demo
  7. evaluate again
  8. write report.html: accuracy, every term of the loss, rewards, margin, delta, sample images

Nothing is downloaded. Run the same command again to resume an interrupted demo.
"""

EXAMPLES = """\
examples
  mpo demo                          run the demo, output in runs/demo
  mpo demo --quick                  run all stages in about a minute, with low accuracy
  mpo demo --seed 1 --output-dir runs/demo1
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = EXPLANATION
    parser.epilog = EXAMPLES
    parser.add_argument("--quick", action="store_true", help="run a smaller demo of about a minute; its accuracy is low")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/demo"), help="output folder (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    parser.add_argument("--restart", action="store_true", help="delete an earlier demo in the output folder and run all stages")


def run(args: argparse.Namespace) -> int:
    try:
        import matplotlib  # noqa: F401
        import sklearn  # noqa: F401
    except ModuleNotFoundError as missing:
        raise ValueError(f"The demo needs {missing.name}: pip install 'mpo-trainer[demo]'.") from None

    from transformers.utils import logging

    from mpo.demo.folder import DemoSettings, quick_settings
    from mpo.demo.report import summarize
    from mpo.demo.run import run_demo

    logging.disable_progress_bar()  # the stages have progress bars of their own
    settings = quick_settings(args.seed) if args.quick else DemoSettings(seed=args.seed)
    print(f"mpo demo: writing to {args.output_dir}")
    progress = run_demo(args.output_dir, settings, restart=args.restart)
    print()
    print(summarize(progress))
    print(f"\nReport: {(args.output_dir / 'report.html').resolve()}")
    return 0

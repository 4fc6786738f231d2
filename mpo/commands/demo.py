"""`mpo demo`: the whole way from few worked examples to a better model, in five to ten minutes on two CPU cores."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "see a small InternVL learn from its own right and wrong answers (five to ten minutes, no GPU)"

EXPLANATION = """\
A small InternVL is warmed up on a few worked examples, then learns from its own answers to many questions
of which only the final answer is known:

  1. draw images of real handwriting: worked examples, questions, and held-out ones that share no digit
  2. warm a new model up on the worked examples (supervised fine-tuning)
  3. measure it on 1,000 held-out images
  4. sample several answers to each question, at temperature 1
  5. pair right with wrong answers by their line "Final answer: ..."
  6. train on the pairs with MPO: mpo train experiment=demo
  7. measure it again
  8. write report.html: accuracy, every term of the loss, rewards, margin, delta, sample images

Nothing is downloaded. An interrupted demo goes on where it was when the same command is run again.
"""

EXAMPLES = """\
examples
  mpo demo                          the whole demo, in runs/demo
  mpo demo --quick                  all stages in about two minutes; the model stays weak
  mpo demo --seed 1 --output-dir runs/demo1
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = EXPLANATION
    parser.epilog = EXAMPLES
    parser.add_argument("--quick", action="store_true", help="a smaller demo of about two minutes; accuracy stays low")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/demo"), help="where everything goes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn (default: %(default)s)")
    parser.add_argument("--restart", action="store_true", help="throw away what an earlier demo left in the folder")


def run(args: argparse.Namespace) -> int:
    try:
        import matplotlib  # noqa: F401
        import sklearn  # noqa: F401
    except ModuleNotFoundError as missing:
        raise ValueError(f"The demo needs {missing.name}: pip install 'mpo-trainer[demo]'.") from None

    from transformers.utils import logging

    from mpo.demo.run import run_demo
    from mpo.demo.settings import full_settings, quick_settings
    from mpo.demo.summary import summarize

    logging.disable_progress_bar()  # of loading and saving weights; the stages have their own
    settings = (quick_settings if args.quick else full_settings)(args.seed)
    print(f"mpo demo: everything goes to {args.output_dir}")
    progress = run_demo(args.output_dir, settings, restart=args.restart)
    print()
    print(summarize(progress))
    print(f"\nReport: {(args.output_dir / 'report.html').resolve()}")
    return 0

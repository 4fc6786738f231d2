"""Run the demo: train a small InternVL with MPO on its own responses (about a quarter of an hour, no GPU).

  1. draw images of real handwriting: worked examples, questions, and evaluation images that share no digit with them
  2. fine-tune a new model on the worked examples (SFT)
  3. evaluate it on 1,000 images
  4. sample several responses to each question, at temperature 1
  5. pair correct with incorrect responses by their line "Final answer: ..."
  6. train on these pairs with MPO: mpo train experiment=demo
  7. evaluate again
  8. train the control from the same model: SFT on the chosen completions, same pairs, steps and rate
  9. evaluate the control
  10. write report.html: accuracy of start, control and MPO, every term of the loss, rewards, margin, delta, sample images

Nothing is downloaded. Run the same command again to resume an interrupted demo.
"""

from pathlib import Path

from mpo.commands.flags import Args, flags, refuse_unwritable
from mpo.commands.outcome import Report

EXAMPLES = """\
mpo demo                          run the demo, output in runs/demo
mpo demo --quick                  run all stages in about a minute, with low accuracy
mpo demo --seed 1 --output runs/demo1
"""
ARGUMENTS = flags("--quick", "--restart", output=Path("runs/demo"), seed=0)


def run(args: Args) -> Report:
    refuse_unwritable("--output", args.output)
    if args.output.is_file():
        raise ValueError(f"--output={args.output} is a file. Give a folder.")
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
    print(f"mpo demo: writing to {args.output}")
    progress = run_demo(args.output, settings, restart=args.restart)
    report = (args.output / "report.html").resolve()
    return Report(f"\n{summarize(progress)}\n\nReport: {report}", {"report": report, "stages": progress})

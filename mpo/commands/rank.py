"""Run one rank of a job: `python -m mpo.commands.rank runs/first/resolved.yaml`. Started by `mpo train`, not by users."""

import os
import sys

from mpo.commands.outcome import leave_interrupts_to_parent, user_errors
from mpo.io import without_collection


def main(path: str) -> int:
    with without_collection():
        from mpo.training.job import TrainJob, run_train_job

    def work() -> int:
        run_train_job(TrainJob.load(path), announce=True)
        return 0

    return user_errors(work, f"rank {os.environ.get('RANK', 0)}: ")


if __name__ == "__main__":
    leave_interrupts_to_parent()
    sys.exit(main(sys.argv[1]))

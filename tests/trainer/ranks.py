"""Run under torchrun by test_ranks.py: every scenario of a JSON file, one after the other, in one group of processes."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from small_runs import record, small_run


def main(scenarios: Path) -> None:
    torch.set_num_threads(1)
    folder = scenarios.parent
    for name, settings in json.loads(scenarios.read_text()).items():
        trainer = small_run(folder / name, **settings)
        trainer.train()
        metrics = trainer.evaluate() if settings.get("eval_pairs") else {}
        again = trainer.evaluate() if settings.get("eval_pairs") else {}
        shift = trainer.mixture.reward_shift
        rank = dist.get_rank()
        (folder / f"{name}-rank{rank}.json").write_text(
            json.dumps(
                {
                    "delta": None if shift is None else shift.value.item(),
                    "rewards_seen": None if shift is None else shift.count.item(),
                    "evaluation": [metrics, again],
                    "fingerprint": sum(value.double().sum().item() for value in trainer.model.state_dict().values()),
                }
            )
        )
        if rank == 0:
            record(trainer, folder / f"{name}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Run under torchrun by `small_runs.run_on_ranks`: every scenario of a JSON file, one after the other, in one process group."""

import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from small_runs import record, small_run, whole_weights
from transformers.integrations.deepspeed import unset_hf_deepspeed_config


def shard_on_cpus() -> None:
    """accelerate takes FSDP and DeepSpeed for GPUs alone. Both run on CPUs too, so tell it that these are GPUs."""
    init, choose = AcceleratorState.__init__, PartialState._prepare_backend

    def as_on_gpus(self, *args, fsdp_plugin=None, **kwargs):
        if fsdp_plugin is not None:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)

    def gloo(self, cpu=False, *args, **kwargs):
        return choose(self, cpu, *args, **kwargs) if cpu else ("gloo", DistributedType.MULTI_GPU)

    AcceleratorState.__init__ = as_on_gpus
    PartialState._prepare_backend = gloo
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"


def main(scenarios: Path) -> None:
    torch.set_num_threads(1)
    shard_on_cpus()
    folder = scenarios.parent
    for name, settings in json.loads(scenarios.read_text()).items():
        unset_hf_deepspeed_config()  # the last scenario's
        resumed, predicts = settings.pop("resume", None), settings.pop("predict", False)
        trainer = small_run(folder / name, **settings)
        trainer.train(resume_from_checkpoint=None if resumed is None else str(folder / resumed))
        metrics = trainer.evaluate() if settings.get("eval_pairs") else {}
        again = trainer.evaluate() if settings.get("eval_pairs") else {}
        predicted = trainer.predict(trainer.eval_dataset).label_ids.tolist() if predicts else None
        shift = trainer.mixture.reward_shift
        weights = whole_weights(trainer)
        (folder / f"{name}-rank{dist.get_rank()}.json").write_text(
            json.dumps(
                {
                    "delta": None if shift is None else shift.value.item(),
                    "rewards_seen": None if shift is None else shift.count.item(),
                    "evaluation": [metrics, again],
                    "steps": trainer.state.global_step,
                    "predicted": predicted,
                    "fingerprint": sum(value.double().sum().item() for value in (weights or {}).values()),
                    "sharded": sum(type(module).__name__.startswith("FSDP") for module in trainer.model.modules()),
                }
            )
        )
        record(trainer, folder / f"{name}.pt")
    dist.barrier()  # a rank that leaves early takes its connections with it
    time.sleep(1)  # until all have left the barrier
    sys.stdout.flush()
    os._exit(0)  # past the end of gloo's threads, which now and then aborts a process that has done its work


if __name__ == "__main__":
    main(Path(sys.argv[1]))

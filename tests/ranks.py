"""Small runs on several ranks: forked processes, which need not import everything again, in one process group."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, is_deepspeed_available
from small_runs import record, small_run, warm_up, whole_weights
from small_sft import small_sft
from torch.distributed.elastic.utils.distributed import get_free_port
from torch.multiprocessing import start_processes
from transformers import training_args
from transformers.integrations.deepspeed import unset_hf_deepspeed_config


def run_on_ranks(folder: Path, scenarios: dict[str, dict], ranks: int = 2) -> None:
    """Run scenarios, the arguments of `small_run` (with "sft" of `small_sft`), in one group of processes, with files as results."""
    on_ranks(ranks, one_rank, folder, scenarios)


def on_ranks(ranks: int, work: Callable, *arguments) -> None:
    """Call `work` in forked processes, the ranks of one group."""
    warm_up()
    size = str(ranks)
    environment = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "localhost", "MASTER_PORT": str(get_free_port())}
    start_processes(_rank, (work, arguments, environment), nprocs=ranks, start_method="fork")


def _rank(rank: int, work: Callable, arguments: tuple, environment: dict[str, str]) -> None:
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    AcceleratorState._reset_state(reset_partial_state=True)  # the parent's, of one process
    work(*arguments)
    dist.barrier()  # a rank that leaves early takes its connections with it
    time.sleep(1)  # until all have left the barrier
    os._exit(0)  # past the end of gloo's threads, which now and then aborts a process that has done its work


def one_rank(folder: Path, scenarios: dict[str, dict]) -> None:
    """Run all scenarios, one after the other."""
    shard_on_cpus()
    for name, settings in scenarios.items():
        unset_hf_deepspeed_config()  # the last scenario's
        resumed, predicts = settings.pop("resume", None), settings.pop("predict", False)
        trainer = (small_sft if settings.pop("sft", False) else small_run)(folder / name, **settings)
        trainer.train(resume_from_checkpoint=None if resumed is None else str(folder / resumed))
        metrics = trainer.evaluate() if settings.get("eval_pairs") else {}
        again = trainer.evaluate() if settings.get("eval_pairs") else {}
        predicted = trainer.predict(trainer.eval_dataset).label_ids.tolist() if predicts else None
        shift = getattr(getattr(trainer, "mixture", None), "reward_shift", None)
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


def shard_on_cpus() -> None:
    """accelerate takes FSDP and DeepSpeed for GPUs alone. Both run on CPUs too, so tell it that these are GPUs."""
    init, choose = AcceleratorState.__init__, PartialState._prepare_backend

    def as_on_gpus(self, *args, fsdp_plugin=None, **kwargs):
        if fsdp_plugin is not None:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)

    def gloo(self, cpu=False, *args, **kwargs):
        return choose(self, cpu, *args, **kwargs) if cpu else ("gloo", DistributedType.MULTI_GPU)

    training_args.is_torch_bf16_gpu_available = lambda: True
    if is_deepspeed_available():
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__ = {}  # its kernel for ranks of one computer is compiled first, and waits without rest
    AcceleratorState.__init__ = as_on_gpus
    PartialState._prepare_backend = gloo
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"

"""Between logging steps the host never waits for the device: no number is read from it."""

from small_runs import small_run
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal", "aten::masked_select", "aten::item"}


class CountReads(TorchDispatchMode):
    """Counts operations that wait for the device, except those inside the models' own forward passes."""

    def __init__(self):
        super().__init__()
        self.reads, self.inside_model = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name in READS and not self.inside_model:
            self.reads.append(name)
        return func(*args, **(kwargs or {}))

    def watch(self, model):
        model.register_forward_pre_hook(lambda *_: setattr(self, "inside_model", self.inside_model + 1))
        model.register_forward_hook(lambda *_: setattr(self, "inside_model", self.inside_model - 1))


class ByStep(TrainerCallback):
    def __init__(self, counter):
        self.counter, self.steps = counter, {}

    def on_step_begin(self, args, state, control, **kwargs):
        self.counter.reads.clear()

    def on_step_end(self, args, state, control, **kwargs):
        # The scheduler and the batches are on the host; only reads from the device count here.
        self.steps[state.global_step] = list(self.counter.reads)


def test_no_reads_between_logging_steps(tmp_path):
    counter = CountReads()
    by_step = ByStep(counter)
    settings = {"pairs": 16, "gradient_accumulation_steps": 2, "logging_steps": 4, "optim": "adamw_torch_fused"}
    trainer = small_run(tmp_path, **settings, callbacks=[by_step])
    counter.watch(trainer.model), counter.watch(trainer.ref_model)
    with counter:
        trainer.train()
    assert len(by_step.steps.pop(1)) <= 1  # the check that policy and reference are equal runs once
    assert by_step.steps == {2: [], 3: [], 4: []}
    assert trainer.state.log_history[0]["loss"] > 0


def test_logging_more_terms_reads_no_more(tmp_path):
    """One transfer brings every metric of a window."""
    reads = []
    for losses in (["sigmoid"], ["sigmoid", "bco_pair", "sft", "ipo"]):
        counter = CountReads()
        trainer = small_run(tmp_path, pairs=8, logging_steps=4, loss_type=losses)
        counter.watch(trainer.model), counter.watch(trainer.ref_model)
        with counter:
            trainer.train()
        reads.append(len(counter.reads))
    assert reads[1] - reads[0] <= 1  # delta

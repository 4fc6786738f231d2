"""Options of a run, each set in a recipe and run, or refused before the model loads."""

import json
import shutil

import pytest
import torch
from composition import composed
from safetensors.torch import load_file
from small_runs import difference, in_fork, write_job
from transformers import TrainerCallback
from transformers.integrations import get_available_reporting_integrations

from mpo.commands import main
from mpo.models.kernels import use_liger_layers
from mpo.models.small import small_internvl
from mpo.training.job import TrainJob, run_train_job


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A job of twelve pairs, four per step, with a checkpoint on disk."""
    folder = tmp_path_factory.mktemp("job")
    arguments = write_job(folder, 12)
    (folder / "prompts.jsonl").write_text('{"id": "seen", "image": "0.png", "question": "What is it?"}\n{"question": "Who?"}')
    return folder, arguments


def trained(settings, run_dir, *overrides) -> dict:
    assert main(["train", *settings[1], f"run_dir={run_dir}", *overrides]) == 0
    return load_file(run_dir / "model.safetensors")


def dtypes(state) -> set[torch.dtype]:
    if torch.is_tensor(state):
        return {state.dtype}
    return set().union(*map(dtypes, state.values())) if isinstance(state, dict) else set()


@pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "paged_adamw_8bit"])
def test_optimisers_of_8_bits(settings, tmp_path, optim):
    """The state has one byte per moment; training differs from AdamW by rounding, and an interrupted run resumes bitwise."""
    pytest.importorskip("bitsandbytes")
    chosen = [f"trainer.optim={optim}", "trainer.save_steps=1", "trainer.max_steps=3"]
    whole = trained(settings, tmp_path / "whole", *chosen)
    state = torch.load(tmp_path / "whole" / "checkpoint-3" / "optimizer.pt")["state"]
    assert torch.uint8 in dtypes(state)
    plain = trained(settings, tmp_path / "plain", "trainer.max_steps=3")
    assert 0 < difference(whole, plain) < 2 * 2e-3  # steps of at most the learning rate, 1e-3, once each way
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    assert difference(trained(settings, tmp_path / "again", *chosen), whole) == 0


@pytest.mark.slow
def test_gradient_checkpointing(settings, tmp_path):
    """Recomputing activations gives the same weights."""
    on, off = (
        trained(settings, tmp_path / value, f"trainer.gradient_checkpointing={value}", "trainer.max_steps=2")
        for value in ("true", "false")
    )
    assert difference(on, off) < 1e-7


class Graphs(TrainerCallback):
    """Counts the graphs compiled by the end of each step."""

    def __init__(self):
        self.counts = []

    def on_step_end(self, args, state, control, **kwargs):
        self.counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.slow
@pytest.mark.parametrize("peft", ["none", "lora"])
def test_torch_compile(settings, tmp_path, peft):
    """Every kind of layer is compiled in the first step, for rows of any length and with sampled responses between the steps.

    The backend captures and differentiates graphs without generating code: only rounding differs from an uncompiled run.
    (Four steps of batches of two to seven tiles.)
    """
    ends = []
    for compiled in (False, True):
        overrides = ["trainer.max_steps=4", "trainer.global_batch_size=3", "trainer.per_device_train_batch_size=3", f"peft={peft}"]
        overrides += ["trainer.torch_compile_backend=aot_eager", "trainer.torch_compile=true"] if compiled else []
        overrides += [f"samples.path={settings[0] / 'prompts.jsonl'}", "samples.every=1", "samples.max_new_tokens=4"]
        run_dir = f"run_dir={tmp_path / str(compiled)}"
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        graphs = Graphs()
        trainer = run_train_job(TrainJob.from_config(composed([*settings[1], *overrides, run_dir])), callbacks=[graphs])
        ends.append({name: value.clone() for name, value in trainer.model.state_dict().items()})
        samples = (tmp_path / str(compiled) / "samples.jsonl").read_text().splitlines()
        assert len(samples) == 2 * 5
        assert trainer.layout == "packed"
    assert difference(*ends) < 1e-6
    assert graphs.counts[0] > 0 and graphs.counts == [graphs.counts[0]] * 4


def test_liger_takes_layers_of_both_models_and_leaves_the_loss(processor):
    """Norms of both parts and SwiGLU are Liger's, the forward with the fused LM head stays; unknown models are refused.

    Runs in a separate process, because Liger changes transformers' modules.
    """
    pytest.importorskip("liger_kernel")

    def work():
        model = small_internvl(processor, hidden_size=32, vision_hidden_size=32)
        before = type(model).forward
        use_liger_layers(model)
        layer, tile_layer = model.model.language_model.layers[0], model.model.vision_tower.encoder.layer[0]
        for module in (layer.mlp, layer.input_layernorm, model.model.language_model.norm, tile_layer.layernorm_before):
            assert "liger" in module.forward.__func__.__module__, module
        assert type(model).forward is before and "forward" not in model.__dict__
        model.config.text_config.model_type = "something"
        with pytest.raises(ValueError, match="'something'"):
            use_liger_layers(model)

    assert in_fork(work) == 0


def test_samples_and_tensorboard_from_a_recipe(settings, tmp_path):
    asked = [f"samples.path={settings[0] / 'prompts.jsonl'}", "samples.every=1", "samples.max_new_tokens=3"]
    trained(settings, tmp_path, *asked, "trainer.report_to=tensorboard", "trainer.max_steps=2")
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    named = [(row["step"], row["id"], row["images"]) for row in rows]
    other = f"{settings[0] / 'prompts.jsonl'}:2"
    assert named == [entry for step in range(3) for entry in ((step, "seen", ["0.png"]), (step, other, []))]
    assert list(tmp_path.glob("runs/*/events*"))


def test_samples_of_the_evaluation_data(settings, tmp_path):
    """The first prompts of the evaluation data are sampled, here equal but for their images; without evaluation data, none."""
    data = [f"data.eval_path={settings[0] / 'pairs.jsonl'}", "samples.count=2", "samples.max_new_tokens=2"]
    trained(settings, tmp_path / "some", *data, "trainer.max_steps=1")
    rows = [json.loads(line) for line in (tmp_path / "some" / "samples.jsonl").read_text().splitlines()]
    assert [(row["step"], row["images"]) for row in rows] == [(0, ["0.png"]), (0, ["1.png"]), (1, ["0.png"]), (1, ["1.png"])]
    trained(settings, tmp_path / "none", "trainer.max_steps=1")
    assert not {"samples.jsonl", "runs"} & {path.name for path in (tmp_path / "none").iterdir()}


REFUSED = {
    "trainer.report_to=tensorbord": "'tensorbord' in trainer.report_to.* 'tensorboard'",
    "trainer.activation_offloading=true": "activation_offloading",
    "trainer.use_liger_kernel=true": "use_liger_kernel",
    "samples.evry=1": "Did you mean 'every'",
    "samples.every=0": "every=0",
    "samples.every=evaluation": "samples.every=evaluation .*trainer.eval_strategy",
    "samples.count=-1": "samples.count.* got -1",
    "samples.image_root=images": "samples.image_root .*samples.path",
}


@pytest.mark.parametrize("override", REFUSED)
def test_refused_before_anything_loads(settings, tmp_path, override):
    """With the model's path pointing nowhere, a load would fail with another error."""
    words = [*settings[1], "model.name_or_path=/nowhere", f"run_dir={tmp_path}"]
    with pytest.raises(ValueError, match=REFUSED[override]):
        TrainJob.from_config(composed([*words, override]))


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb", "trackio", "swanlab"])
def test_trackers_that_are_not_installed(settings, tmp_path, tracker):
    words = [*settings[1], "model.name_or_path=/nowhere", f"run_dir={tmp_path}", f"trainer.report_to=[{tracker}]"]
    if tracker in get_available_reporting_integrations():
        TrainJob.from_config(composed(words))
    else:
        with pytest.raises(ValueError, match=f"report_to={tracker} .* pip install {tracker}"):
            TrainJob.from_config(composed(words))


def test_bitsandbytes_that_is_not_installed(settings, tmp_path, monkeypatch):
    monkeypatch.setattr("mpo.training.job.is_bitsandbytes_available", lambda: False)
    words = [*settings[1], "model.name_or_path=/nowhere", f"run_dir={tmp_path}", "trainer.optim=paged_adamw_8bit"]
    with pytest.raises(ValueError, match="optim=paged_adamw_8bit .* pip install bitsandbytes"):
        TrainJob.from_config(composed(words))
    TrainJob.from_config(composed([*words, "dry_run=true"]))  # the run is elsewhere

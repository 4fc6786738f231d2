"""What counts: each pair of an epoch once, each row of an evaluation, delta of applied steps only; settings that cannot work."""

import json
import os
from collections import Counter
from dataclasses import replace

import pytest
import torch
from datasets import Dataset, IterableDataset
from small_runs import difference, in_fork, kill_while_saving, small_run
from support import perturbed, text_pairs
from transformers import (
    AutoModelForCausalLM,
    EarlyStoppingCallback,
    InternVLConfig,
    InternVLForConditionalGeneration,
    Qwen3MoeConfig,
    TrainerCallback,
)
from transformers.trainer_callback import ExportableState

from mpo import MPOConfig, MPOTrainer
from mpo.training.checkpoint import latest_checkpoint

MARKER = "trainer_state.json"

# --- Streams


def shards(counts: list[int]) -> IterableDataset:
    """A stream of shards with the given number of records each; record i asks for i + i."""

    def records(counts):
        for first, count in counts:
            yield from text_pairs(first + count).select(range(first, first + count)).to_list()

    firsts = [sum(counts[:place]) for place in range(len(counts))]
    return IterableDataset.from_generator(records, gen_kwargs={"counts": list(zip(firsts, counts, strict=True))})


def seen_records(trainer, batches: int) -> list[str]:
    loader = trainer.get_train_dataloader()
    return [name for _, batch in zip(range(batches), loader, strict=False) for name in batch.names]


class Prompts:
    """A collator that notes the prompts of its batch."""

    def __init__(self, collator):
        self.collator = collator

    def __call__(self, records):
        return replace(self.collator(records), names=[record["prompt"][0]["content"] for record in records])


@pytest.mark.parametrize("counts", [[7, 1, 4], [12]])
def test_a_pass_over_a_stream_is_complete_before_the_next_whatever_the_workers(tmp_path, counts):
    """Twelve records, three a batch: four batches are a pass, in the order of the stream, for any number of workers."""
    trainer = small_run(tmp_path, kind="text", max_steps=4, per_device_train_batch_size=3, dataloader_num_workers=2)
    trainer.train_dataset = shards(counts)
    trainer._training_collator = lambda: Prompts(trainer.data_collator)
    expected = [f"What is {i} plus {i}?" for i in range(12)]
    assert seen_records(trainer, 8) == expected + expected


# --- Rows of an evaluation


def rows_of(records: Dataset) -> list[tuple[str, str]]:
    return [(row["prompt"][0]["content"], row[side][0]["content"]) for row in records for side in ("chosen", "rejected")]


@pytest.mark.parametrize(("kind", "batch"), [("text", 2), ("full", 3)])
def test_compute_metrics_gets_both_rows_of_every_record_in_order(tmp_path, kind, batch):
    trainer = small_run(tmp_path, kind=kind, eval_pairs=5, per_device_eval_batch_size=batch, include_for_metrics=["loss", "inputs"])
    seen = []
    trainer.compute_metrics = lambda prediction: seen.append(prediction) or {"rows": len(prediction.predictions)}
    assert trainer.evaluate()["eval_rows"] == 10
    predicted = trainer.predict(trainer.eval_dataset)
    assert predicted.metrics["test_rows"] == 10
    tokenizer = trainer.processing_class.tokenizer
    for labels, logits in ((seen[0].label_ids, seen[0].predictions), (predicted.label_ids, predicted.predictions)):
        texts = [tokenizer.decode([token for token in row if token >= 0]) for row in labels]
        for text, (prompt, completion) in zip(texts, rows_of(trainer.eval_dataset), strict=True):
            assert prompt in text and completion in text
        if kind == "text":  # the logits of a row are those of its tokens
            ids = torch.tensor(labels[3:4]).clamp(min=0)
            alone = trainer.model(input_ids=ids, attention_mask=torch.tensor(labels[3:4]).ge(0)).logits[0]
            length = int((ids != tokenizer.pad_token_id).sum())
            assert torch.allclose(alone[:length], torch.tensor(logits[3])[:length], atol=1e-5)
    assert seen[0].losses.shape == (5,) and seen[0].inputs.shape == seen[0].label_ids.shape
    assert (seen[0].inputs == seen[0].label_ids).all()


def test_predict_does_not_lose_records(tmp_path):
    trainer = small_run(tmp_path, kind="text", eval_pairs=5, per_device_eval_batch_size=2, dataloader_drop_last=True)
    with pytest.raises(ValueError, match="dataloader_drop_last=True.* 1 of 5"):
        trainer.predict(trainer.eval_dataset)
    assert len(trainer.predict(trainer.eval_dataset.select(range(4))).predictions) == 8


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_is_evaluated_in_order(tmp_path, workers):
    trainer = small_run(tmp_path, kind="text", eval_pairs=2, per_device_eval_batch_size=2, dataloader_num_workers=workers)
    predicted = trainer.predict(shards([3, 1, 1]))
    tokenizer = trainer.processing_class.tokenizer
    texts = [tokenizer.decode([token for token in row if token >= 0]) for row in predicted.label_ids]
    assert all(completion in text for text, (_, completion) in zip(texts, rows_of(text_pairs(5)), strict=True))


def test_logits_of_packed_rows_are_refused(tmp_path):
    trainer = small_run(tmp_path, kind="text")
    batch = next(iter(trainer.get_train_dataloader()))
    with pytest.raises(ValueError, match="packed rows"):
        trainer.prediction_step(trainer.model, batch, prediction_loss_only=False)


def test_persistent_workers_do_not_give_one_data_set_for_another(tmp_path):
    trainer = small_run(tmp_path, kind="text", eval_pairs=3, dataloader_num_workers=1, dataloader_persistent_workers=True)
    first = trainer.evaluate()
    other = trainer.evaluate(text_pairs(8).select(range(5, 8)))
    assert first["eval_completion_tokens/chosen"] != other["eval_completion_tokens/chosen"]
    assert trainer.evaluate()["eval_completion_tokens/chosen"] == first["eval_completion_tokens/chosen"]


def test_the_evaluation_loss_does_not_depend_on_its_batches(tmp_path):
    """Over the data set: sum of nll n^-1/2 by sum of n^1/2, from the per-record sums themselves."""
    found = []
    for batch in (2, 5):
        trainer = small_run(
            tmp_path,
            kind="text",
            eval_pairs=5,
            per_device_eval_batch_size=batch,
            sft_average="square",
            loss_weights=[0.8, 0.2, 0.5],
        )
        found.append(trainer.evaluate())
    for metrics in found[1:]:
        for name in ("eval_loss", "eval_loss/sft", "eval_loss/sigmoid"):
            assert metrics[name] == pytest.approx(found[0][name], rel=1e-5), name
    sums = []
    for place in range(5):
        one = trainer.evaluate(trainer.eval_dataset.select([place]))
        sums.append((-one["eval_logps/chosen"], one["eval_completion_tokens/chosen"]))
    expected = sum(nll / n**0.5 for nll, n in sums) / sum(n**0.5 for _, n in sums)
    assert found[0]["eval_loss/sft"] == pytest.approx(expected, rel=1e-5)
    terms = [found[0][f"eval_loss/{name}"] for name in ("sigmoid", "bco_pair", "sft")]
    assert found[0]["eval_loss"] == pytest.approx(0.8 * terms[0] + 0.2 * terms[1] + 0.5 * terms[2], rel=1e-5)


# --- Settings that cannot work


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True"),
        ({"batching": "tokens", "max_tokens_per_batch": 100, "rows": "padded"}, "batching='tokens'.*rows='padded'"),
        ({"dataloader_in_order": False}, "dataloader_in_order=False"),
        ({"eval_use_gather_object": True}, "eval_use_gather_object=True"),
    ],
)
def test_refused_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        MPOConfig("out", use_cpu=True, report_to="none", **settings)


def test_batches_by_tokens_are_refused_where_rows_must_be_padded(tmp_path):
    with pytest.raises(ValueError, match="batching='tokens'.*pad_to_multiple_of=8"):
        small_run(tmp_path, kind="text", batching="tokens", max_tokens_per_batch=400, pad_to_multiple_of=8)


def test_nothing_left_by_drop_last_is_refused(tmp_path):
    trainer = small_run(tmp_path, kind="text", pairs=3, per_device_train_batch_size=4, dataloader_drop_last=True)
    with pytest.raises(ValueError, match="dataloader_drop_last=True.* 3 records"):
        trainer.train()


# --- Steps that are not applied


def scaled_run(folder, monkeypatch, **settings):
    """A run under a real GradScaler on the CPU, where accelerate gives none: as with fp16, in float32."""
    monkeypatch.setattr("accelerate.Accelerator.autocast", lambda *args, **kwargs: torch.autocast("cpu", enabled=False))
    scaler = torch.amp.GradScaler("cpu", init_scale=settings.pop("init_scale", 2.0), backoff_factor=2.0**-126)
    trainer = small_run(folder, kind="text", pairs=8, max_steps=4, **settings)
    trainer.accelerator.scaler = scaler
    trainer.accelerator.native_amp, trainer.accelerator.state._mixed_precision = True, "fp16"
    steps = []

    class Note(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append({name: value.detach().clone() for name, value in trainer.model.named_parameters()})

    trainer.add_callback(Note())
    return trainer, steps


@pytest.mark.parametrize(("optim", "max_grad_norm"), [("adamw_torch_fused", 1.0), ("adamw_torch", 0.0)])
def test_a_step_skipped_for_overflow_gives_delta_back(tmp_path, monkeypatch, optim, max_grad_norm):
    """The scale of 2^127 makes step 1 overflow and becomes 2. Each other step adds the rewards of two pairs, four numbers."""
    trainer, steps = scaled_run(
        tmp_path, monkeypatch, init_scale=2.0**127, max_grad_norm=max_grad_norm, optim=optim, warmup_steps=0
    )
    counts = []

    class Note(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            counts.append((trainer.mixture.reward_shift.count.item(), logs.get("reward_shift")))

    trainer.add_callback(Note())
    start = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    assert [count for count, _ in counts[:4]] == [0, 4, 8, 12]
    assert counts[0][1] == 0
    assert difference(start, steps[0]) == 0 < difference(steps[0], steps[1])


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_a_loss_that_is_not_finite_stops_a_scaled_run_before_a_step(tmp_path, monkeypatch, optim):
    """What the guard says, that neither this step nor a later one was applied, is true under a scaler too."""
    trainer, steps = scaled_run(tmp_path, monkeypatch, logging_steps=3, optim=optim, warmup_steps=0)
    forward = type(trainer)._outputs

    def outputs(self, model, inputs, **kwargs):
        result = forward(self, model, inputs, **kwargs)
        if self.state.global_step == 1 and model is self.model:
            result.log_probs = result.log_probs * float("nan")
        return result

    monkeypatch.setattr(type(trainer), "_outputs", outputs)
    with pytest.raises(FloatingPointError, match="loss of step 2"):
        trainer.train()
    assert difference(steps[0], steps[2]) == 0
    assert trainer.mixture.reward_shift.count == 4


# --- Logs


def test_the_routers_loss_is_logged_as_trl_logs_it(processor, tmp_path):
    torch.manual_seed(0)
    tokenizer = processor.tokenizer
    tokenizer.chat_template = processor.chat_template
    sizes = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 8}
    experts = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}
    config = Qwen3MoeConfig(vocab_size=len(tokenizer), **sizes, **experts, router_aux_loss_coef=0.01)
    args = MPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_steps=1, logging_steps=1, save_strategy="no")
    model = AutoModelForCausalLM.from_config(config)
    data = text_pairs(4)
    trainer = MPOTrainer(model, args=args, train_dataset=data, eval_dataset=data, processing_class=tokenizer)
    evaluated = trainer.evaluate()
    trainer.train()
    log = trainer.state.log_history[0]
    for logs, prefix in ((log, ""), (evaluated, "eval_")):
        assert 1.0 <= logs[f"{prefix}aux_loss"] <= 4.0  # 2 of 4 experts a token: 2 if evenly used
        terms = [logs[f"{prefix}loss/{name}"] for name in ("sigmoid", "bco_pair", "sft")]
        total = 0.8 * terms[0] + 0.2 * terms[1] + terms[2] + 0.01 * logs[f"{prefix}aux_loss"]
        assert logs[f"{prefix}loss"] == pytest.approx(total, rel=1e-6)


def test_a_router_loss_that_internvl_does_not_give_is_refused(internvl, processor, tmp_path):
    text = internvl.config.text_config
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen3MoeConfig(vocab_size=text.vocab_size, **experts, **sizes)
    whole = InternVLConfig(**{**internvl.config.to_dict(), "text_config": config, "vision_config": internvl.config.vision_config})
    settings = {"use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 1, "save_strategy": "no"}

    def run(**more):
        args = MPOConfig(str(tmp_path), **settings, **more)
        model = InternVLForConditionalGeneration(whole)
        return MPOTrainer(model, args=args, train_dataset=text_pairs(2), processing_class=processor)

    with pytest.raises(ValueError, match="router_aux_loss_coef=0.001.*Set router_aux_loss_coef=0"):
        run()
    trainer = run(router_aux_loss_coef=0.0)
    trainer.train()
    assert trainer.layout == "packed"


# --- References of new data


def test_new_data_is_evaluated_while_the_policy_still_is_the_reference(tmp_path):
    cached = {"reference": "cached", "reference_cache": str(tmp_path / "cache"), "max_steps": 1, "kind": "text"}
    new = text_pairs(12).select(range(8, 12))
    live = small_run(tmp_path / "live", kind="text").evaluate(new)
    trainer = small_run(tmp_path / "cached", **cached)
    metrics = trainer.evaluate(new)
    for name in ("eval_loss", "eval_loss/sigmoid", "eval_rewards/margins", "eval_logps/chosen"):
        assert metrics[name] == pytest.approx(live[name], rel=1e-6), name
    trainer.train()
    trainer.evaluate(new)  # known by now
    with pytest.raises(ValueError, match="reference model was released"):
        trainer.evaluate(text_pairs(16).select(range(12, 16)))
    changed = small_run(tmp_path / "changed", **cached)
    perturbed(changed.model)
    with pytest.raises(ValueError, match="reference model was released"):
        changed.evaluate(text_pairs(16).select(range(12, 16)))


def test_the_cache_is_filled_whatever_drop_last_leaves_out(tmp_path):
    """Five records, two a batch: drop_last leaves another one out in every epoch."""
    settings = {"pairs": 5, "dataloader_drop_last": True, "num_train_epochs": 4, "per_device_eval_batch_size": 2}
    trainer = small_run(tmp_path / "run", kind="text", reference="cached", reference_cache=str(tmp_path / "cache"), **settings)
    trainer.train()
    assert trainer.state.global_step == 8


# --- Generation


class Completes(TrainerCallback):
    """Generates in the midst of packed training, as TRL's LogCompletionsCallback does."""

    def __init__(self) -> None:
        self.ids = []

    def on_step_end(self, args, state, control, model, processing_class, **kwargs):
        tokenizer = processing_class.tokenizer
        inputs = tokenizer(["What is 2 plus 2?", "Which?"], return_tensors="pt", padding=True, padding_side="left")
        model.eval()
        self.ids.append(model.generate(**inputs, max_new_tokens=4, do_sample=False))


def test_a_callback_can_generate_during_packed_training(tmp_path):
    completes = Completes()
    trainer = small_run(tmp_path / "a", kind="lora", max_steps=2, callbacks=[completes])
    plain = small_run(tmp_path / "b", kind="lora", max_steps=2)
    assert trainer.layout == "packed"
    trainer.train()
    plain.train()
    assert len(completes.ids) == 2 and completes.ids[0].shape[1] > 4
    losses = [[log["loss"] for log in one.state.log_history if "loss" in log] for one in (trainer, plain)]
    assert losses[0] == losses[1]
    completes.on_step_end(None, None, None, trainer.model, trainer.processing_class)  # outside of training
    assert torch.equal(completes.ids[1], completes.ids[2])


# --- Runs that end and are resumed

ENDED = {
    "max_steps within an epoch": ({"pairs": 8, "max_steps": 3}, 3),
    "part of an epoch": ({"pairs": 8, "num_train_epochs": 1.25}, 5),
    "stream": ({"pairs": 4, "stream": True, "max_steps": 3}, 3),
}


@pytest.mark.parametrize("case", ENDED)
def test_a_finished_run_takes_no_step_more(tmp_path, case):
    settings, steps = ENDED[case]
    settings = {**settings, "kind": "text", "save_strategy": "steps", "save_steps": steps, "logging_steps": 2}
    trainer = small_run(tmp_path, **settings)
    trainer.train()
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    again = small_run(tmp_path, **settings)
    output = again.train(resume_from_checkpoint=True)
    assert (output.global_step, trainer.state.global_step) == (steps, steps)
    assert difference(weights, again.model.state_dict()) == 0
    assert again.mixture.reward_shift.count == trainer.mixture.reward_shift.count
    assert output.training_loss == pytest.approx(trainer.state.log_history[-1]["train_loss"], rel=1e-6)
    if "max_steps" in settings:  # a longer run continues
        more = small_run(tmp_path, **{**settings, "max_steps": steps + 1, "save_strategy": "no"})
        assert more.train(resume_from_checkpoint=True).global_step == steps + 1


class Patient(TrainerCallback, ExportableState):
    """A callback with a state and a setting."""

    def __init__(self, setting: int) -> None:
        self.setting, self.seen = setting, 0

    def on_step_end(self, *args, **kwargs):
        self.seen += 1

    def state(self):
        return {"args": {"setting": self.setting}, "attributes": {"seen": self.seen}}


def test_early_stopping_goes_on_with_its_patience(tmp_path):
    """No step improves (learning rate 0): with a patience of 3 the run stops at its fourth evaluation, resumed or not."""
    settings = {"kind": "text", "pairs": 20, "learning_rate": 0.0, "eval_pairs": 2, "eval_strategy": "steps", "eval_steps": 1}
    settings |= {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "loss"}
    first = small_run(tmp_path, callbacks=[EarlyStoppingCallback(3), Patient(1)], **settings, max_steps=2)
    first.train()
    patient = Patient(2)
    second = small_run(tmp_path, callbacks=[EarlyStoppingCallback(3), patient], **{**settings, "max_steps": 9})
    assert second.train(resume_from_checkpoint=True).global_step == 4
    assert (patient.setting, patient.seen) == (2, 4)
    third = small_run(tmp_path, callbacks=[EarlyStoppingCallback(3)], **{**settings, "max_steps": 9})
    assert third.train(resume_from_checkpoint=True).global_step == 4  # it had ended
    fourth = small_run(tmp_path, callbacks=[EarlyStoppingCallback(4), Patient(1)], **{**settings, "max_steps": 9})
    assert fourth.train(resume_from_checkpoint=True).global_step == 5


def test_a_callback_that_is_new_in_a_resumed_run_is_saved(tmp_path):
    settings = {"kind": "text", "save_strategy": "steps", "save_steps": 1}
    small_run(tmp_path, max_steps=1, **settings).train()
    small_run(tmp_path, max_steps=2, callbacks=[Patient(1)], **settings).train(resume_from_checkpoint=True)
    state = json.loads((tmp_path / "checkpoint-2" / MARKER).read_text())
    assert state["stateful_callbacks"]["Patient"]["attributes"] == {"seen": 1}


def test_a_checkpoint_that_is_being_written_anew_is_none(tmp_path):
    settings = {"kind": "text", "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    small_run(tmp_path, **settings).train()
    assert latest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")

    def again():
        kill_while_saving(2)
        small_run(tmp_path, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))

    assert in_fork(again) == -9
    assert (tmp_path / "checkpoint-2" / "model.safetensors").exists()
    assert latest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")


def test_the_marker_comes_when_all_else_is_on_disk(tmp_path, monkeypatch):
    """At every fsync, what was written before it is noted; the marker appears after all other files were flushed as they are."""
    flushed, flush, order = {}, os.fsync, []

    def fsync(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        flush(descriptor)
        flushed[path] = os.stat(path).st_mtime_ns
        order.append((path, (tmp_path / "checkpoint-2" / MARKER).exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    settings = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    small_run(tmp_path, kind="text", max_steps=2, **settings).train()
    folder = tmp_path / "checkpoint-2"
    for path in folder.iterdir():
        if path.name != MARKER:
            assert flushed[str(path)] == path.stat().st_mtime_ns, path.name
            assert (str(path), False) in order, path.name
    assert order[-2:] == [(str(folder), True), (str(tmp_path), True)]
    assert Counter(path.name for path in tmp_path.glob("checkpoint-*")) == {"checkpoint-2": 1}

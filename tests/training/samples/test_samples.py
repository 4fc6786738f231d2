"""Sampled responses: their text, that training is unchanged by them, where they are written, and how a run resumes them."""

import importlib.util
import json
import random

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import run_on_ranks
from small_runs import difference, record, small_run, whole_weights
from support import image_pairs, make_image, messages, text_pairs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback

from mpo.data.images import open_image
from mpo.generation.generator import Request
from mpo.generation.local import LocalGenerator
from mpo.io import append_json_lines
from mpo.training.samples.callback import SampleResponses, drop_after, page, repeated_fraction, summary
from mpo.training.samples.prompts import first_prompts, image_names, load_prompts

QUESTIONS = [
    ("What is 2 plus 3?", (make_image(1, width=64),)),
    ("Which of the two is the larger one?", (make_image(2), make_image(3, width=32))),
    ("What is 2 plus 3?", ()),
]
RECORDS = [{"prompt": messages(text, "user"), "images": list(images)} for text, images in QUESTIONS]


def rows_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def responses_of(model, processor, records, **settings):
    responses = LocalGenerator(model, processor).respond(records, **{"temperature": 0, **settings})
    return [response for (response,) in responses]


def test_responses_are_those_of_transformers(internvl, processor):
    """Greedy, one question at a time through the processor and `generate`; ours are one batch through the encoding of training."""
    with torch.no_grad():
        for parameter in internvl.parameters():
            parameter.mul_(3)  # so that responses depend on the prompt
    expected = []
    for text, images in ((question[0], question[1] if len(question) > 1 else ()) for question in QUESTIONS):
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)
        inputs = processor(text=prompt, images=list(map(open_image, images)) or None, return_tensors="pt", add_special_tokens=False)
        generated = internvl.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        expected.append(processor.tokenizer.decode(generated, skip_special_tokens=True))
    responses = responses_of(internvl, processor, RECORDS, max_new_tokens=8)
    assert [processor.tokenizer.decode(response.ids, skip_special_tokens=True) for response in responses] == expected
    questions = [Request.ask(text, images=images) for text, images in QUESTIONS]
    generated = LocalGenerator(internvl, processor).generate(questions, temperature=0, max_new_tokens=8)
    assert [response.text for (response,) in generated] == expected
    assert len(set(expected)) == 3


def test_repetition_and_summary():
    """abcabcabc has six 4-grams, abca bcab cabc abca bcab cabc: three are repeated. Lengths 9 and 3: mean 6; one is truncated."""
    assert repeated_fraction("abcabcabc") == 0.5
    assert repeated_fraction("abc") == 0.0
    rows = [{"tokens": 9, "finished": False, "repetition": 0.5}, {"tokens": 3, "finished": True, "repetition": 0.0}]
    assert summary(rows) == {"samples/length": 6, "samples/unfinished": 0.5, "samples/repetition": 0.25}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_is_left_as_it_was(internvl, processor, temperature):
    """Modules keep their own mode, also where they differ, and every random generator keeps its state."""
    internvl.train()
    internvl.model.vision_tower.eval()
    modes = [module.training for module in internvl.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    once, again = (responses_of(internvl, processor, RECORDS, max_new_tokens=4, temperature=temperature) for _ in range(2))
    assert once == again
    assert [module.training for module in internvl.modules()] == modes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]


RUNS = {
    "full": {"gradient_checkpointing": True, "vision_drop_path": 0.5, "eval_pairs": 2, "eval_strategy": "steps", "eval_steps": 2},
    "lora": {"kind": "lora"},  # its dropout is on
    "padded": {"kind": "text", "rows": "padded"},
}


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_trains_the_same_with_samples(tmp_path, kind):
    """Bitwise, dropout and drop path included, and its own log has the same numbers."""
    ends, logs = [], []
    for name, callbacks in (("without", []), ("with", [SampleResponses(RECORDS, every=2, max_new_tokens=4, temperature=1.0)])):
        trainer = small_run(tmp_path / name, callbacks=callbacks, max_steps=3, **RUNS[kind])
        trainer.train()
        ends.append(whole_weights(trainer) | {"random": torch.get_rng_state()})
        record(trainer, tmp_path / "end.pt")
        logs.append([log for log in torch.load(tmp_path / "end.pt")["logs"] if "samples/length" not in log])
    assert difference(*ends) == 0
    assert difference(*logs) == 0
    rows = rows_of(tmp_path / "with")
    assert [row["step"] for row in rows] == [0] * 3 + [2] * 3 + [3] * 3
    assert not (tmp_path / "without" / "samples.jsonl").exists()


def test_time_of_sampling_is_not_training_time(tmp_path):
    """With responses that take many times a step's time, a step is measured as equally fast: the callback stops the clock."""

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.before = trainer._meters["train"].seconds

        def on_step_end(self, args, state, control, **kwargs):
            self.after = trainer._meters["train"].seconds

    clock, samples = Clock(), SampleResponses(RECORDS, every=1, max_new_tokens=64)
    trainer = small_run(tmp_path, callbacks=[samples], max_steps=1)
    trainer.add_callback(clock)
    spent = []
    generating = trainer.generating

    def watched():
        spent.append(trainer._meters["train"].seconds)
        return generating()

    trainer.generating = watched
    trainer.train()
    rows = rows_of(tmp_path)
    assert len(spent) == 2 and sum(row["tokens"] for row in rows) > 100
    # From the start of sampling to the end of the step, 192 passes through the model later, the window is no longer.
    assert clock.after - spent[1] < 0.5 * clock.after


def test_what_is_written(tmp_path, capsys):
    pairs = text_pairs(3).to_list()
    records = [
        {**pairs[0], "id": "first"},
        {**pairs[1], "images": [make_image(1)], "prompt": messages("See?", "user")},
        {"prompt": "plain "},
    ]
    trainer = small_run(tmp_path, callbacks=[SampleResponses(records, every=100, max_new_tokens=6)], max_steps=2)
    trainer.train()
    rows = rows_of(tmp_path)
    assert [(row["step"], row["id"]) for row in rows] == [(step, name) for step in (0, 2) for name in ("first", "1", "2")]
    assert list(rows[0]) == ["step", "id", "prompt", "images", "response", "tokens", "finished", "repetition"]
    assert [row["prompt"] for row in rows[:3]] == ["What is 0 plus 0?", "See?", "plain "]
    assert [row["images"] for row in rows[:3]] == [[], ["64x32"], []]
    shown = capsys.readouterr().out
    assert "Samples at step 0: 6 tokens on average, 3 of 3 truncated" in shown
    assert "first What is 0 plus 0?" in shown
    logged = [log for log in trainer.state.log_history if "samples/length" in log]
    assert [(log["step"], log["samples/length"], log["samples/unfinished"]) for log in logged] == [(0, 6, 1), (2, 6, 1)]


def test_the_console_shortens_long_responses():
    row = {"step": 7, "id": "a", "prompt": "x" * 500, "images": [], "response": "one\n" * 500, "tokens": 9, "finished": False}
    lines = page([{**row, "repetition": 0.5}]).splitlines()
    assert lines[0] == "Samples at step 7: 9 tokens on average, 1 of 1 truncated, 50% of 4-grams repeated"
    assert len(lines) == 3 and all(len(line) <= 110 for line in lines)


@pytest.mark.slow
def test_learning_to_respond_is_seen(tmp_path):
    """A model trained on its completions stops where they end; one that always predicts one token repeats it."""
    taught = text_pairs(2)
    callback = SampleResponses(taught.to_list(), every=1000, max_new_tokens=40)
    settings = {"kind": "text", "pairs": 2, "loss_type": ["sft"], "learning_rate": 1e-2, "warmup_steps": 0, "max_steps": 80}
    trainer = small_run(tmp_path, callbacks=[callback], **settings)
    trainer.train()
    before, after = (log for log in trainer.state.log_history if "samples/length" in log)
    assert before["samples/unfinished"] == 1 and after["samples/unfinished"] == 0
    responses = {row["id"]: row["response"] for row in rows_of(tmp_path) if row["step"] == 80}
    assert responses == {str(place): pair["chosen"][0]["content"] for place, pair in enumerate(taught)}
    head = trainer.model.lm_head
    with torch.no_grad():  # for every input: one token, and never an end
        trainer.model.model.language_model.norm.weight.zero_()
        head.weight.zero_()
    bad = responses_of(trainer.model, trainer.processing_class, callback.records, max_new_tokens=40)
    bad = [{"tokens": one.tokens, "finished": one.finished, "repetition": repeated_fraction(one.ids)} for one in bad]
    assert summary(bad) == pytest.approx({"samples/length": 40, "samples/unfinished": 1, "samples/repetition": 36 / 37})


def test_a_resumed_run_continues_the_file(tmp_path):
    """Killed after step 5, its last checkpoint at 2: steps up to 2 are kept, later ones are written again, once and the same."""
    settings = {"pairs": 12, "save_strategy": "steps", "save_steps": 2}

    def run(steps, **kwargs):
        trainer = small_run(tmp_path, callbacks=[SampleResponses(RECORDS, every=1, max_new_tokens=4)], max_steps=5, **settings)

        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == steps:
                    raise KeyboardInterrupt

        if steps < 5:
            trainer.add_callback(Stop())
        try:
            trainer.train(**kwargs)
        except KeyboardInterrupt:
            pass

    run(5)
    whole = rows_of(tmp_path)
    assert [row["step"] for row in whole] == [step for step in range(6) for _ in RECORDS]
    run(3)
    assert [row["step"] for row in rows_of(tmp_path)] == [step for step in range(4) for _ in RECORDS]  # a new run's own
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write('{"step": 4, "id"')  # a crash
    run(5, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert rows_of(tmp_path) == whole


def test_with_every_evaluation_and_at_an_early_end(tmp_path):
    class StopEarly(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    callback = SampleResponses(RECORDS[2:], every="evaluation", max_new_tokens=2)
    settings = {"pairs": 12, "eval_pairs": 2, "eval_strategy": "steps", "eval_steps": 2}
    trainer = small_run(tmp_path / "evaluated", callbacks=[callback, StopEarly()], **settings)
    trainer.train()
    trainer.evaluate()
    assert [row["step"] for row in rows_of(tmp_path / "evaluated")] == [0, 2, 4]
    early = small_run(
        tmp_path / "early", callbacks=[SampleResponses(RECORDS[2:], every=3, max_new_tokens=2), StopEarly()], **settings
    )
    early.train()
    assert [row["step"] for row in rows_of(tmp_path / "early")] == [0, 3, 4]


def test_tensorboard_has_numbers_and_text(tmp_path):
    trainer = small_run(
        tmp_path, callbacks=[SampleResponses(RECORDS, every=2, max_new_tokens=4)], max_steps=3, report_to="tensorboard"
    )
    trainer.train()
    (folder,) = (tmp_path / "runs").iterdir()
    assert len(list(folder.iterdir())) == 1  # a closed writer was not opened again
    events = EventAccumulator(str(folder)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/samples/length")] == [(0, 4), (2, 4), (3, 4)]
    assert {"train/samples/unfinished", "train/samples/repetition"} <= set(events.Tags()["scalars"])
    texts = [(event.step, event.tensor_proto.string_val[0].decode()) for event in events.Tensors("samples/text_summary")]
    assert [step for step, _ in texts] == [0, 2, 3]
    assert "| 0 | What is 2 plus 3? | 64x32 |" in texts[0][1]


def test_wandb_has_a_table(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    trainer = small_run(tmp_path, callbacks=[SampleResponses(RECORDS, max_new_tokens=4)], max_steps=1, report_to="wandb")
    trainer.train()
    import wandb

    wandb.finish()
    tables = sorted(tmp_path.glob("wandb/offline-run*/files/media/table/samples*.table.json"))
    assert len(tables) == 2
    table = json.loads(tables[0].read_text())
    assert table["columns"][:3] == ["step", "id", "prompt"] and table["data"][0][2] == "What is 2 plus 3?"


def test_swanlab_has_texts(tmp_path):
    swanlab = pytest.importorskip("swanlab")
    swanlab.init(mode="offline", logdir=str(tmp_path / "swanlog"))  # transformers' callback needs an open run
    small_run(tmp_path, callbacks=[SampleResponses(RECORDS, max_new_tokens=4)], max_steps=1, report_to="swanlab").train()
    swanlab.finish()
    texts = {(path.name[:3], path.read_text()) for path in (tmp_path / "swanlog").rglob("media/text/*.txt")}  # step, content
    assert texts == {(f"{row['step']:03}", row["response"]) for row in rows_of(tmp_path)}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"records": []}, "'prompt'"),
        ({"records": [{"question": "?"}]}, "'question'"),
        ({"every": 0}, "every=0"),
        ({"every": "epoch"}, "every='epoch'"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        SampleResponses(**{"records": RECORDS, **arguments})


def test_another_trainer_is_refused():
    from transformers import TrainerState, TrainingArguments

    with pytest.raises(ValueError, match="SampleResponses.*MPOTrainer"):
        SampleResponses(RECORDS).on_train_begin(TrainingArguments("unused", use_cpu=True), TrainerState(), None)


def test_prompts_of_a_file(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    lines = [
        {"id": "one", "image": "a.png", "question": "What?"},
        {"image": "a.png", "question": "What?"},  # the same again
        {"prompt": "Why?", "chosen": "So.", "rejected": "Not."},
        {"question": "Who?"},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    records = load_prompts(path, count=2, tiles={"max": 2})
    assert [(record["id"], image_names(record)) for record in records] == [("one", ["a.png"]), (f"{path}:3", [])]
    assert all(record["tiles"] == {"max": 2} for record in records)
    path.write_text('{"image": "a.png"}')
    with pytest.raises(ValueError, match=r"prompts.jsonl:1: 'prompt'"):
        load_prompts(path, count=1)
    path.write_text("")
    with pytest.raises(ValueError, match="prompts.jsonl"):
        load_prompts(path, count=1)
    with pytest.raises(ValueError, match="samples.path=.*none.jsonl"):
        load_prompts(tmp_path / "none.jsonl", count=1)


def test_a_question_of_many_pairs_is_taken_once():
    pairs = image_pairs(2)
    several = pairs.select([0, 0, 0, 1])
    assert [record["prompt"] for record in first_prompts(several, 3)] == [pairs[0]["prompt"], pairs[1]["prompt"]]


def test_the_log_of_an_earlier_run_is_dropped(tmp_path):
    log = tmp_path / "samples.jsonl"
    append_json_lines(log, [{"step": 0}, {"step": 5}])
    drop_after(log, 5)
    assert len(log.read_text().splitlines()) == 2
    drop_after(log, 0)
    assert log.read_text() == ""


SAMPLED = {"samples": {"every": 2, "max_new_tokens": 5}, "max_steps": 3, "pairs": 12, "lora_dropout": 0.0}
SHARDED = {"fsdp": True, "fsdp_config": {"version": 2}}
ZERO3 = {
    "use_cpu": False,
    "deepspeed": {
        "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
        **dict.fromkeys(("gradient_clipping", "train_batch_size", "train_micro_batch_size_per_gpu"), "auto"),
    },
}
no_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed (pip install deepspeed)")


@pytest.mark.slow
@pytest.mark.parametrize(
    "sharing", [pytest.param({}, id="ddp"), pytest.param(SHARDED, id="fsdp2"), pytest.param(ZERO3, id="zero3", marks=no_deepspeed)]
)
def test_several_ranks(tmp_path, sharing):
    """DDP: rank 0 generates; FSDP2, ZeRO-3: all ranks. Responses are one process's, weights those of a run without samples."""
    kinds = {kind: {**SAMPLED, **sharing, "kind": kind} for kind in ("full", "lora")}
    plain = {f"{kind}, plain": {**settings, "samples": None} for kind, settings in kinds.items()}
    run_on_ranks(tmp_path, kinds | plain)
    for kind in kinds:
        assert difference(*(torch.load(tmp_path / f"{run}.pt")["weights"] for run in (kind, f"{kind}, plain"))) == 0
        alone = tmp_path / f"{kind}, alone"
        small_run(alone, **{**SAMPLED, "kind": kind, "per_device_train_batch_size": 4}).train()
        rows = rows_of(tmp_path / kind)
        assert [row["step"] for row in rows] == [0, 0, 2, 2, 3, 3]
        assert [row["response"] for row in rows] == [row["response"] for row in rows_of(alone)]
        logs = torch.load(tmp_path / f"{kind}.pt")["logs"]
        assert sum("samples/length" in log for log in logs) == 3

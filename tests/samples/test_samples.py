"""Sampled answers: what they are, that training does not feel them, where they are written, and how a run goes on with them."""

import importlib.util
import json
import random

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import difference, record, run_on_ranks, small_run, whole_weights
from support import image_pairs, make_image, messages, text_pairs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback

from mpo.inference.local import LocalSampler
from mpo.inference.sampler import Question
from mpo.samples.answers import Answer, generate_answers, repeated_share, summary
from mpo.samples.callback import SampleAnswers, page
from mpo.samples.journal import Journal
from mpo.samples.prompts import first_prompts, image_names, load_prompts

QUESTIONS = [
    ("What is 2 plus 3?", (make_image(1, width=64),)),
    ("Which of the two is the larger one?", (make_image(2), make_image(3, width=32))),
    ("What is 2 plus 3?", ()),
]
RECORDS = [{"prompt": messages(text, "user"), "images": list(images)} for text, images in QUESTIONS]


def rows_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_answers_are_the_samplers(internvl, processor):
    """Another way to the same greedy answers: questions through the processor, in place of records through training's encoding."""
    with torch.no_grad():
        for parameter in internvl.parameters():
            parameter.mul_(3)  # so that answers depend on what is asked
    answers = generate_answers(internvl, processor, RECORDS, max_new_tokens=8)
    sampler = LocalSampler(internvl, processor)
    texts = sampler.generate([Question(*question) for question in QUESTIONS], temperature=0, max_new_tokens=8)
    without = [processor.tokenizer.decode(processor.tokenizer(a.text)["input_ids"], skip_special_tokens=True) for a in answers]
    assert without == [text for (text,) in texts]  # the sampler leaves special tokens out
    assert len({answer.text for answer in answers}) == 3


def test_repetition_and_summary():
    """abcabcabc has six 4-grams, abca bcab cabc abca bcab cabc: three stood before. Lengths 9 and 3: mean 6; one is cut."""
    assert repeated_share("abcabcabc") == 0.5
    assert repeated_share("abc") == 0.0
    answers = [Answer("abcabcabc", 9, False, 0.5), Answer("abc", 3, True, 0.0)]
    assert summary(answers) == {"samples/length": 6, "samples/unfinished": 0.5, "samples/repetition": 0.25}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_is_left_as_it_was(internvl, processor, temperature):
    """Modules keep their own mode, also where they differ, and every random generator goes on as if nothing had been."""
    internvl.train()
    internvl.model.vision_tower.eval()
    modes = [module.training for module in internvl.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    once, again = (generate_answers(internvl, processor, RECORDS, max_new_tokens=4, temperature=temperature) for _ in range(2))
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
    for name, callbacks in (("without", []), ("with", [SampleAnswers(RECORDS, every=2, max_new_tokens=4, temperature=1.0)])):
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
    """With as many answers as take many times a step's time, a step still seems as fast; the clock is stopped by the callback."""

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.before = trainer._meters["train"].seconds

        def on_step_end(self, args, state, control, **kwargs):
            self.after = trainer._meters["train"].seconds

    clock, samples = Clock(), SampleAnswers(RECORDS, every=1, max_new_tokens=64)
    trainer = small_run(tmp_path, callbacks=[samples], max_steps=1)
    trainer.add_callback(clock)
    spent = []
    answering = trainer.answering

    def watched():
        spent.append(trainer._meters["train"].seconds)
        return answering()

    trainer.answering = watched
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
    trainer = small_run(tmp_path, callbacks=[SampleAnswers(records, every=100, max_new_tokens=6)], max_steps=2)
    trainer.train()
    rows = rows_of(tmp_path)
    assert [(row["step"], row["id"]) for row in rows] == [(step, name) for step in (0, 2) for name in ("first", "1", "2")]
    assert list(rows[0]) == ["step", "id", "prompt", "images", "answer", "tokens", "finished", "repetition"]
    assert [row["prompt"] for row in rows[:3]] == ["What is 0 plus 0?", "See?", "plain "]
    assert [row["images"] for row in rows[:3]] == [[], ["64x32"], []]
    shown = capsys.readouterr().out
    assert "Samples at step 0: 6 tokens on average, 3 of 3 cut" in shown
    assert "first What is 0 plus 0?" in shown
    logged = [log for log in trainer.state.log_history if "samples/length" in log]
    assert [(log["step"], log["samples/length"], log["samples/unfinished"]) for log in logged] == [(0, 6, 1), (2, 6, 1)]


def test_the_console_shows_little_of_long_answers():
    row = {"step": 7, "id": "a", "prompt": "x" * 500, "images": [], "answer": "one\n" * 500, "tokens": 9, "finished": False}
    lines = page([{**row, "repetition": 0.5}]).splitlines()
    assert lines[0] == "Samples at step 7: 9 tokens on average, 1 of 1 cut, 50% of 4-grams repeated"
    assert len(lines) == 3 and all(len(line) <= 110 for line in lines)


@pytest.mark.slow
def test_learning_to_answer_is_seen(tmp_path):
    """A model that is taught its answers stops where they end; one that is taught one word without an end repeats it."""
    taught = text_pairs(2)
    callback = SampleAnswers(taught.to_list(), every=1000, max_new_tokens=40)
    settings = {"kind": "text", "pairs": 2, "loss_type": ["sft"], "learning_rate": 1e-2, "warmup_steps": 0, "max_steps": 80}
    trainer = small_run(tmp_path, callbacks=[callback], **settings)
    trainer.train()
    before, after = (log for log in trainer.state.log_history if "samples/length" in log)
    assert before["samples/unfinished"] == 1 and after["samples/unfinished"] == 0
    answers = {row["id"]: row["answer"] for row in rows_of(tmp_path) if row["step"] == 80}
    assert answers == {str(place): pair["chosen"][0]["content"] for place, pair in enumerate(taught)}
    head = trainer.model.lm_head
    with torch.no_grad():  # whatever it sees: one token, and never an end
        trainer.model.model.language_model.norm.weight.zero_()
        head.weight.zero_()
    bad = generate_answers(trainer.model, trainer.processing_class, callback.records, max_new_tokens=40)
    assert summary(bad) == pytest.approx({"samples/length": 40, "samples/unfinished": 1, "samples/repetition": 36 / 37})


def test_a_resumed_run_goes_on_with_the_file(tmp_path):
    """Killed after step 5, its last checkpoint at 2: steps up to 2 are kept, later ones come again, once and the same."""
    settings = {"pairs": 12, "save_strategy": "steps", "save_steps": 2}

    def run(steps, **kwargs):
        trainer = small_run(tmp_path, callbacks=[SampleAnswers(RECORDS, every=1, max_new_tokens=4)], max_steps=5, **settings)

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
    assert [row["step"] for row in rows_of(tmp_path)] == [step for step in range(4) for _ in RECORDS]  # a fresh run's own
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write('{"step": 4, "id"')  # the machine went down
    run(5, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert rows_of(tmp_path) == whole


def test_with_every_evaluation_and_at_an_early_end(tmp_path):
    class StopEarly(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    callback = SampleAnswers(RECORDS[2:], every="evaluation", max_new_tokens=2)
    settings = {"pairs": 12, "eval_pairs": 2, "eval_strategy": "steps", "eval_steps": 2}
    trainer = small_run(tmp_path / "evaluated", callbacks=[callback, StopEarly()], **settings)
    trainer.train()
    trainer.evaluate()
    assert [row["step"] for row in rows_of(tmp_path / "evaluated")] == [0, 2, 4]
    early = small_run(
        tmp_path / "early", callbacks=[SampleAnswers(RECORDS[2:], every=3, max_new_tokens=2), StopEarly()], **settings
    )
    early.train()
    assert [row["step"] for row in rows_of(tmp_path / "early")] == [0, 3, 4]


def test_tensorboard_has_numbers_and_text(tmp_path):
    trainer = small_run(
        tmp_path, callbacks=[SampleAnswers(RECORDS, every=2, max_new_tokens=4)], max_steps=3, report_to="tensorboard"
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
    trainer = small_run(tmp_path, callbacks=[SampleAnswers(RECORDS, max_new_tokens=4)], max_steps=1, report_to="wandb")
    trainer.train()
    import wandb

    wandb.finish()
    tables = sorted(tmp_path.glob("wandb/offline-run*/files/media/table/samples*.table.json"))
    assert len(tables) == 2
    table = json.loads(tables[0].read_text())
    assert table["columns"][:3] == ["step", "id", "prompt"] and table["data"][0][2] == "What is 2 plus 3?"


def test_swanlab_has_texts(tmp_path):
    swanlab = pytest.importorskip("swanlab")
    swanlab.init(mode="offline", logdir=str(tmp_path / "swanlog"))  # transformers' callback asks for a run that is open
    small_run(tmp_path, callbacks=[SampleAnswers(RECORDS, max_new_tokens=4)], max_steps=1, report_to="swanlab").train()
    swanlab.finish()
    texts = {(path.name[:3], path.read_text()) for path in (tmp_path / "swanlog").rglob("media/text/*.txt")}  # step, content
    assert texts == {(f"{row['step']:03}", row["answer"]) for row in rows_of(tmp_path)}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"records": []}, "no records to sample"),
        ({"records": [{"question": "?"}]}, "has no 'prompt'; it has"),
        ({"every": 0}, "every so many steps"),
        ({"every": "epoch"}, "every='evaluation'"),
        ({"max_new_tokens": 0}, "max_new_tokens is 1 or more"),
        ({"temperature": -1.0}, "temperature 0 or more"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        SampleAnswers(**{"records": RECORDS, **arguments})


def test_another_trainer_is_refused():
    from transformers import TrainerState, TrainingArguments

    with pytest.raises(ValueError, match="needs an MPOTrainer"):
        SampleAnswers(RECORDS).on_train_begin(TrainingArguments("unused", use_cpu=True), TrainerState(), None)


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
    with pytest.raises(ValueError, match=r"prompts.jsonl:1: 'prompt' is missing.* A prompt needs a question"):
        load_prompts(path, count=1)
    path.write_text("")
    with pytest.raises(ValueError, match="has no prompts"):
        load_prompts(path, count=1)
    with pytest.raises(ValueError, match="Set samples.path"):
        load_prompts(tmp_path / "none.jsonl", count=1)


def test_a_question_of_many_pairs_is_asked_once():
    pairs = image_pairs(2)
    several = pairs.select([0, 0, 0, 1])
    assert [record["prompt"] for record in first_prompts(several, 3)] == [pairs[0]["prompt"], pairs[1]["prompt"]]


def test_a_journal_of_an_earlier_run_is_not_gone_on_with(tmp_path):
    journal = Journal(tmp_path)
    journal.write([{"step": 0}, {"step": 5}])
    journal.begin(5)
    assert len(journal.path.read_text().splitlines()) == 2
    journal.begin(0)
    assert journal.path.read_text() == ""


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
    """DDP: the first rank answers; FSDP2, ZeRO-3: all do. Answers are one process's, weights those of a run without samples."""
    kinds = {kind: {**SAMPLED, **sharing, "kind": kind} for kind in ("full", "lora")}
    plain = {f"{kind}, plain": {**settings, "samples": None} for kind, settings in kinds.items()}
    run_on_ranks(tmp_path, kinds | plain)
    for kind in kinds:
        assert difference(*(torch.load(tmp_path / f"{run}.pt")["weights"] for run in (kind, f"{kind}, plain"))) == 0
        alone = tmp_path / f"{kind}, alone"
        small_run(alone, **{**SAMPLED, "kind": kind, "per_device_train_batch_size": 4}).train()
        rows = rows_of(tmp_path / kind)
        assert [row["step"] for row in rows] == [0, 0, 2, 2, 3, 3]
        assert [row["answer"] for row in rows] == [row["answer"] for row in rows_of(alone)]
        logs = torch.load(tmp_path / f"{kind}.pt")["logs"]
        assert sum("samples/length" in log for log in logs) == 3

"""PackedSFTTrainer: its losses, and that the loop gives it what it gives MPOTrainer."""

import json
import math
import shutil
from itertools import islice

import pytest
import torch
from accelerate.parallelism_config import ParallelismConfig
from conversations import conversation, conversation_set, conversations, turn, write_video
from datasets import Dataset
from ranks import run_on_ranks
from small_runs import difference, record, with_bad_images
from small_sft import small_sft
from support import TEXTS, make_image, mixed_pairs
from transformers import TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from mpo import PackedSFTConfig, PackedSFTTrainer
from mpo.batching.collator import ConversationCollator
from mpo.batching.sampler import PairBatchSampler
from mpo.models.small import small_internvl, small_processor
from mpo.training.samples.callback import SampleResponses

SGD = {"optim": "sgd", "warmup_steps": 0, "max_grad_norm": 0.0, "num_train_epochs": 2, "lr_scheduler_type": "constant"}
TOKENS = {"batching": "tokens", "max_tokens_per_batch": 400, "max_tiles_per_batch": 16}


def weights_of(trainer) -> dict:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def trained(folder, **settings) -> dict:
    trainer = small_sft(folder, **settings)
    trainer.train()
    return weights_of(trainer)


@pytest.mark.slow
def test_torch_compile(tmp_path):
    """Layers are compiled in the first step, for packs of any length: as many graphs at the end, and only rounding differs.

    The backend captures and differentiates graphs without generating code.
    """
    graphs, ends = [], []

    class Graphs(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    for more in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        graphs.clear()
        trainer = small_sft(tmp_path, kinds=("one image", "text"), callbacks=[Graphs()], max_steps=3, **TOKENS, **more)
        trainer.train()
        assert trainer.layout == "packed"
        ends.append(weights_of(trainer))
    assert difference(*ends) < 1e-6
    assert graphs[0] > 0 and graphs == [graphs[0]] * 3


# --- The loss


def nll_of(trainer, record) -> tuple[float, int]:
    """Mean negative log-likelihood of one conversation's labelled tokens, from the logits of a padded row; and their number."""
    batch = ConversationCollator(trainer.processing_class, layout="padded")([record])
    with torch.no_grad():
        logits = trainer.model.eval()(**batch.model_inputs, use_cache=False).logits.flatten(0, 1)[batch.positions_to_keep.index]
    logps = logits.log_softmax(-1).gather(1, batch.shift_labels[0, :, None])
    return -logps.mean().item(), len(logps)


@pytest.mark.parametrize(("average", "weigh"), [("token", lambda n: n), ("sample", lambda n: 1), ("square", math.sqrt)])
def test_the_loss_by_hand(tmp_path, average, weigh):
    """Three conversations with means m and n tokens, w = n, 1, sqrt(n): (w1 m1 + w2 m2 + w3 m3) / (w1 + w2 + w3).

    That is sum(w l) / sum(w) over tokens with w = 1, 1/n, 1/sqrt(n) (arXiv 2412.05271): n of them add up to n, 1, sqrt(n). The
    micro-batches have two conversations and one, so a mean of their means would be another number.
    """
    records = [conversation(0), conversation(3, images=1, later=1, turns=3), conversation(2, turns=2)]
    dataset = Dataset.from_list(records)
    settings = {"gradient_accumulation_steps": 2, "max_steps": 1, "loss_average": average, "vision_drop_path": 0.0}
    trainer = small_sft(tmp_path, dataset=dataset, evaluated=dataset, per_device_eval_batch_size=2, **settings)
    means = [nll_of(trainer, one) for one in records]
    assert len({n for _, n in means}) == 3
    expected = sum(weigh(n) * mean for mean, n in means) / sum(weigh(n) for _, n in means)
    evaluated = trainer.evaluate()["eval_loss"]
    output = trainer.train()
    assert evaluated == pytest.approx(expected, rel=1e-6)
    logged = next(log["loss"] for log in trainer.state.log_history if "loss" in log)
    assert logged == pytest.approx(expected, rel=1e-6)
    assert output.training_loss == pytest.approx(expected, rel=1e-6)


def test_weights_of_the_averages():
    """Of 4 and 9 labelled tokens: 4 and 9; 1 and 1; 2 and 3."""
    lengths = torch.tensor([4.0, 9.0])
    found = {
        average: PackedSFTConfig("out", use_cpu=True, loss_average=average).weights(lengths).tolist()
        for average in ("token", "sample", "square")
    }
    assert found == {"token": [4, 9], "sample": [1, 1], "square": [2, 3]}


def test_dynamic_fine_tuning(tmp_path):
    """Each token's loss is weighted by its probability: with a loss of about 6, far below that of nll."""
    ends = []
    for loss_type in ("nll", "dft"):
        trainer = small_sft(tmp_path, loss_type=loss_type, max_steps=1)
        trainer.train()
        ends.append(trainer.state.log_history[0]["loss"])
    assert 0 < ends[1] < ends[0] * math.exp(-3)


def test_trls_loss(tmp_path):
    """Plain prompts and completions, averaged by token: the first steps of TRL's SFTTrainer."""
    dataset = Dataset.from_list([{"prompt": f"{i} plus {i} is", "completion": f" {2 * i}" * (1 + i % 3)} for i in range(4)])
    trainer = small_sft(
        tmp_path / "a", kind="tokenizer", dataset=dataset.add_column("images", [[]] * 4), loss_average="token", **SGD
    )
    options = {"bf16": False, "report_to": "none", "gradient_checkpointing": False, "learning_rate": 1e-3, "logging_steps": 1}
    options |= {"save_strategy": "no", "per_device_train_batch_size": 2, "disable_tqdm": True, "use_cpu": True}
    theirs = SFTTrainer(
        model=small_sft(tmp_path / "b", kind="tokenizer").model,
        args=SFTConfig(str(tmp_path / "c"), **options, **SGD, weight_decay=0.05),
        train_dataset=dataset,
        processing_class=trainer.processing_class,
    )
    logs = []
    for each in (trainer, theirs):
        each.train()
        logs.append([log["loss"] for log in each.state.log_history if "loss" in log])
    assert logs[0] == pytest.approx(logs[1], rel=1e-5) and len(logs[0]) == 4


@pytest.mark.parametrize("average", ["token", "square"])
def test_weights_do_not_depend_on_the_split(tmp_path, average):
    """Seven conversations a step, the last step of 3; packed or padded rows."""
    splits = {
        "7 x 1": {"per_device_train_batch_size": 7},
        "1 x 7": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 7},
        "padded": {"per_device_train_batch_size": 7, "rows": "padded"},
    }
    ends = {split: trained(tmp_path / split, records=10, loss_average=average, **SGD, **more) for split, more in splits.items()}
    start = weights_of(small_sft(tmp_path / "start"))
    assert difference(start, ends["7 x 1"]) > 1e-4
    for split, end in ends.items():
        assert difference(ends["7 x 1"], end) < 1e-6, split


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    step = {"sft": True, "records": 9, **SGD, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    scenarios = {"ranks": step, "rest": {**step, "records": 6}}
    scenarios |= {"tokens": {"sft": True, "records": 9, **SGD, **TOKENS, "save_strategy": "steps", "save_steps": 1}}
    scenarios |= {"resumed": {**scenarios["tokens"], "save_strategy": "no", "resume": "tokens/checkpoint-1"}}
    streamed = {"sft": True, "records": 9, **SGD, **TOKENS, "stream": True, "packing_buffer": 4, "max_steps": 3}
    scenarios |= {"stream": {**streamed, "save_strategy": "steps", "save_steps": 2}}
    scenarios |= {"resumed stream": {**streamed, "resume": "stream/checkpoint-2"}}
    scenarios |= {"stream, workers": {**streamed, "dataloader_num_workers": 2}}
    scenarios |= {"sharded": {**step, "fsdp": True, "fsdp_config": {"version": 2}, "gradient_checkpointing": True}}
    run_on_ranks(folder, scenarios)
    return folder


def test_two_ranks_equal_one(two_ranks, tmp_path):
    """Nine conversations, eight a step: the second step has one, and the other rank repeats another that does not count."""
    alone = trained(tmp_path, records=9, **SGD, per_device_train_batch_size=8)
    assert difference(torch.load(two_ranks / "ranks.pt")["weights"], alone) < 1e-6
    assert difference(torch.load(two_ranks / "sharded.pt")["weights"], alone) < 1e-6


def test_the_end_of_an_epoch_is_that_of_its_last_micro_batch(two_ranks, tmp_path):
    """Six conversations, one step of two micro-batches: the first is full on both ranks, rank 1 only fills up the second."""
    alone = trained(tmp_path, records=6, **SGD, per_device_train_batch_size=6)
    assert difference(torch.load(two_ranks / "rest.pt")["weights"], alone) < 1e-6


@pytest.mark.parametrize(("run", "other"), [("tokens", "resumed"), ("stream", "resumed stream"), ("stream", "stream, workers")])
def test_two_ranks_resume_bitwise(two_ranks, run, other):
    """And packed streams do not depend on workers."""
    assert difference(torch.load(two_ranks / f"{run}.pt"), torch.load(two_ranks / f"{other}.pt")) == 0
    assert json.loads((two_ranks / f"{run}-rank0.json").read_text())["steps"] >= 2
    assert json.loads((two_ranks / "tokens-rank0.json").read_text())["steps"] >= 2


# --- What the loop gives


@pytest.mark.parametrize(
    "settings",
    [
        {"save_steps": 5},
        {"save_steps": 5, "kind": "lora"},
        {"save_steps": 3, **TOKENS, "dataloader_num_workers": 1},
        {"save_steps": 4, **TOKENS, "packing_buffer": 4, "stream": True, "max_steps": 6},
        {"save_steps": 4, **TOKENS, "packing_buffer": 4, "stream": True, "max_steps": 6, "dataloader_num_workers": 2},
    ],
    ids=["full", "lora", "tokens, a worker", "packed stream", "packed stream, workers"],
)
def test_resumed_in_the_middle_of_an_epoch(tmp_path, settings, monkeypatch):
    """Weights, optimizer and logs are those of the run that was not interrupted, bit for bit. Planned packs begin at any."""
    after, begun = PairBatchSampler.after, []
    monkeypatch.setattr(PairBatchSampler, "after", lambda self, number: begun.append(number) or after(self, number))
    settings = {"records": 6, "num_train_epochs": 2, "logging_steps": 2, "save_strategy": "steps", **settings}
    whole, resumed = small_sft(tmp_path, **settings), small_sft(tmp_path, **settings)
    whole.train()
    step, steps = settings["save_steps"], whole.state.max_steps
    assert steps / 2 < step < steps
    record(whole, tmp_path / "whole.pt")
    begun.clear()
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    record(resumed, tmp_path / "resumed.pt")
    if settings.get("batching") == "tokens" and "stream" not in settings:
        assert begun == [step % len(resumed._sampler)]
    assert difference(torch.load(tmp_path / "whole.pt"), torch.load(tmp_path / "resumed.pt")) == 0


def test_another_run_is_not_resumed(tmp_path):
    small_sft(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    for settings, named in (
        (dict(loss_average="token"), "loss_average"),
        (dict(train_on="last"), "train_on"),
        (dict(records=9), "conversations in"),
    ):
        with pytest.raises(ValueError, match=f"{named}.*now"):
            small_sft(tmp_path, max_steps=2, **settings).train(resume_from_checkpoint=True)


def test_packs_by_tokens(tmp_path):
    """Every conversation once an epoch, in packs within both budgets."""
    trainer = small_sft(tmp_path, records=20, **TOKENS)
    batches = list(trainer.get_train_dataloader())
    assert sorted(name for batch in batches for name in batch.names) == sorted(f"record 'conversation-{i}'" for i in range(20))
    assert max(batch.tokens for batch in batches) <= 400
    assert max(len(batch["pixel_values"]) for batch in batches if "pixel_values" in batch) <= 16
    assert 2 <= len(batches) < 10


def test_the_summary_counts_conversations(tmp_path):
    """Two epochs of 6 conversations, then the second of them again; transformers counts batches of a fixed size."""
    settings = {"records": 6, "num_train_epochs": 2, "save_strategy": "epoch", **TOKENS}
    for expected in (12, 6):
        trainer = small_sft(tmp_path, **settings)
        metrics = trainer.train(resume_from_checkpoint=expected == 6).metrics
        assert metrics["train_samples_per_second"] == pytest.approx(expected / metrics["train_runtime"], abs=2e-3)
        shutil.rmtree(tmp_path / f"checkpoint-{trainer.state.global_step}")


def test_an_oversized_conversation(tmp_path):
    """Refused by name, or alone in a row."""
    dataset = Dataset.from_list([conversation(0), conversation(1, images=8, turns=2), conversation(2)])
    budget = {"batching": "tokens", "max_tokens_per_batch": 150, "tile_budget": "image", "dataset": dataset}
    with pytest.raises(ValueError, match=r"max_tokens=150.*record 1 "):
        small_sft(tmp_path, **budget).get_train_dataloader()
    batches = list(small_sft(tmp_path, **budget, oversized="own_row").get_train_dataloader())
    assert ("record 'conversation-1'",) in [batch.names for batch in batches]


def test_bad_records_are_listed(tmp_path):
    dataset = with_bad_images(conversation_set(6, ("one image",)), [2])
    with pytest.raises(ValueError, match="conversation-2"):
        small_sft(tmp_path, dataset=dataset).train()
    trainer = small_sft(tmp_path, dataset=dataset, on_bad_record="skip", max_bad_fraction=0.5, **TOKENS)
    trainer.train()
    lines = (tmp_path / "bad_records.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["conversation-2"]


def test_batches_of_bad_records_alone(tmp_path):
    """They change nothing: a loss and a gradient of 0."""
    records = [*conversations(4), conversation(9)]
    for bad in records[:4]:
        bad["messages"][0] = turn("user", "")
    trainer = small_sft(tmp_path, dataset=Dataset.from_list(records), on_bad_record="skip", max_bad_fraction=0.9)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert logs[-1]["bad_records"] == 4 and max(log["loss"] for log in logs) > 1
    assert any((log["loss"], log["grad_norm"]) == (0, 0) for log in logs)


def test_bad_records_count_for_nothing(tmp_path):
    """The weights are those of a run without them."""
    images = conversation_set(5, ("one image",))
    step = {"per_device_train_batch_size": 5, **SGD}
    without = trained(tmp_path / "without", dataset=images.select([0, 1, 2, 4]), **step)
    skipped = trained(tmp_path / "with", dataset=with_bad_images(images, [3]), on_bad_record="skip", max_bad_fraction=0.5, **step)
    assert difference(without, skipped) < 1e-6


def test_a_value_that_is_not_finite_stops_the_run(tmp_path):
    trainer = small_sft(tmp_path)
    with torch.no_grad():
        next(trainer.model.model.language_model.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="step 1 .*conversation-"):
        trainer.train()


def test_rates_by_part_and_frozen_parts(tmp_path):
    """Stage 1 of InternVL 2.5: the projector alone moves."""
    rates = {f"{part}_learning_rate": 0.0 for part in ("vision", "language", "head")}
    trainer = small_sft(tmp_path, **rates, projector_learning_rate=1e-2, weight_decay=0.0, records=4)
    before = weights_of(trainer)
    trainer.train()
    moved = {name.split(".")[1] for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"multi_modal_projector"}


def test_rates_of_zero(tmp_path):
    """Nothing is trained, or what learns from images alone, without images."""
    zero = {f"{part}_learning_rate": 0.0 for part in ("vision", "projector", "language", "head")}
    for rates in ({"learning_rate": 0.0}, zero):
        with pytest.raises(ValueError, match="train nothing|Nothing would be trained"):
            small_sft(tmp_path, **rates).create_optimizer()
    with pytest.raises(ValueError, match="No record has an image"):
        small_sft(tmp_path, **zero | {"projector_learning_rate": 1e-3}, dataset=Dataset.from_list([conversation(0)] * 2))


@pytest.mark.parametrize("sizes", [{"cp_size": 2}, {"sp_size": 2}])
def test_a_row_is_not_split_over_ranks(tmp_path, monkeypatch, sizes):
    """Context and sequence parallelism, which accelerate itself refuses on CPUs: a trainer's state is given the configuration."""
    trainer = small_sft(tmp_path)
    monkeypatch.setattr(trainer.accelerator.state, "parallelism_config", ParallelismConfig(**sizes), raising=False)
    with pytest.raises(ValueError, match="cp_size, sp_size"):
        trainer._check_parallelism()


def towers_alone() -> torch.nn.Module:
    """`small_sft`'s model with a frozen language model."""
    processor = small_processor(TEXTS, image_size=32, patch_size=8, max_patches=4)
    model = small_internvl(processor, hidden_size=32, layers=2, vision_hidden_size=32, vision_layers=2)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("vision" in name or "projector" in name)
    return model


@pytest.mark.parametrize("rows", ["packed", "padded"])
def test_rows_of_text_have_no_gradient_for_a_tower(tmp_path, rows):
    """Steps of text alone, in stages 1 and 1.5: two steps with an image and two without leave what the two would leave."""
    text, image = conversation(0), conversation(1, images=1)
    settings = {**SGD, "weight_decay": 0.0, "rows": rows, "per_device_train_batch_size": 1}
    both = trained(tmp_path, model=towers_alone(), dataset=Dataset.from_list([text, image]), **settings)
    alone = trained(tmp_path, model=towers_alone(), dataset=Dataset.from_list([image]), **settings)
    assert all(torch.equal(both[name], alone[name]) for name in both)
    assert any(not torch.equal(value, both[name]) for name, value in towers_alone().state_dict().items())
    with pytest.raises(ValueError, match="No record has an image"):
        small_sft(tmp_path, model=towers_alone(), dataset=Dataset.from_list([text, text]), **settings)


def test_drop_path_is_off_in_evaluation(tmp_path):
    data = conversation_set(4, ("one image",))
    trainer = small_sft(tmp_path, dataset=data, evaluated=data, vision_drop_path=0.9)
    assert trainer.evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"]
    batch = trainer._prepare_inputs(trainer.data_collator(data.to_list()))
    trainer.model.train()
    losses = {trainer.compute_loss(trainer.model, batch).item() for _ in range(4)}
    assert len(losses) > 1


def test_first_batch_verified(tmp_path, caplog):
    small_sft(tmp_path, verify_first_batch=True, max_steps=1).train()
    assert sum("verify_first_batch: log-probs of 2 completions" in message for message in caplog.messages) == 1


def test_evaluated_and_predicted(tmp_path):
    """The mean does not depend on the batches; predictions are one row per conversation, in order."""
    data = conversation_set(5)
    losses = [small_sft(tmp_path, evaluated=data, per_device_eval_batch_size=size).evaluate()["eval_loss"] for size in (1, 2, 5)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    trainer = small_sft(tmp_path, per_device_eval_batch_size=2)
    predicted = trainer.predict(data)
    assert len(predicted.predictions) == len(predicted.label_ids) == 5
    first = trainer.processing_class.tokenizer.decode(predicted.label_ids[3])
    assert "What is 3?" in first


def test_samples_while_training(tmp_path):
    trainer = small_sft(tmp_path, max_steps=2, callbacks=[SampleResponses(mixed_pairs(2), every=1, max_new_tokens=2)])
    trainer.train()
    assert [log["samples/length"] for log in trainer.state.log_history if "samples/length" in log] == [2, 2, 2]


def test_a_stream(tmp_path):
    trainer = small_sft(tmp_path, stream=True, max_steps=5, records=4)
    assert trainer.train().global_step == 5


def test_a_stream_in_packs(tmp_path):
    """Every conversation once a pass, within the budgets, whatever the workers; an oversized one is refused by name or alone."""
    found = []
    for workers in (0, 2):
        trainer = small_sft(tmp_path, records=20, stream=True, max_steps=1, **TOKENS, dataloader_num_workers=workers)
        first, names = [], []
        for batch in trainer.get_train_dataloader():
            first.append(batch)
            names += batch.names
            if len(names) >= 20:
                break
        assert sorted(names) == sorted(f"record 'conversation-{i}'" for i in range(20))
        assert max(batch.tokens for batch in first) <= 400
        assert max(len(batch["pixel_values"]) for batch in first if "pixel_values" in batch) <= 16
        found.append([batch.names for batch in first])
    assert found[0] == found[1] and len(found[0]) < 10
    settings = {"stream": True, "max_steps": 1, **TOKENS, "max_tokens_per_batch": 150}
    with pytest.raises(ValueError, match="conversation-.*max_tokens.*oversized"):
        small_sft(tmp_path, **settings).train()
    batches = list(islice(small_sft(tmp_path, **settings, oversized="own_row").get_train_dataloader(), 5))
    assert {len(batch.names) for batch in batches if batch.tokens > 150} == {1}


@pytest.mark.parametrize("stream", [False, True])
def test_an_oversized_conversation_is_skipped(tmp_path, stream):
    """It is listed, and the rest is trained as without it."""
    settings = {**TOKENS, "max_tokens_per_batch": 150, "on_bad_record": "skip", "max_bad_fraction": 0.9, "max_steps": 8}
    trainer = small_sft(tmp_path, stream=stream, **settings)
    trainer.train()
    listed = [json.loads(line) for line in (tmp_path / "bad_records.jsonl").read_text().splitlines()]
    assert listed and all("150" in one["reason"] and one["id"].startswith("conversation-") for one in listed)
    batches = list(islice(trainer.get_train_dataloader(), 8))
    assert max(batch.tokens for batch in batches) <= 150
    assert not {name for batch in batches for name in batch.names} & {one["where"] for one in listed}


@pytest.mark.parametrize("stream", [False, True])
def test_fewer_frames(tmp_path, caplog, stream):
    """Eight frames exceed a row: as many as fit, evenly spread, and planned as they are encoded; said once. One too few is left."""
    video = write_video(tmp_path / "video.mp4", frames=16)
    asked = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What is it?"}]}
    records = [{"id": str(n), "messages": [asked, turn("assistant", "It is very 1.")], "videos": [video]} for n in range(2)]
    collator = ConversationCollator(small_sft(tmp_path).processing_class, layout="packed")
    tokens = {n: collator([{**records[0], "frames": {"min": n, "max": n}}]).tokens + 1 for n in (1, 3, 4, 8)}
    dataset = Dataset.from_list([{**one, "frames": {"min": 8, "max": 8}} for one in records])
    settings = {"dataset": dataset, "stream": stream, "max_steps": 1, "batching": "tokens"}
    for most, budget in (
        (3, {"max_tokens_per_batch": tokens[4] - 1}),
        (4, {"max_tokens_per_batch": tokens[4]}),
        (3, {"max_tokens_per_batch": 2 * tokens[3] - 1, "max_tiles_per_batch": 3}),
        (8, {"max_tokens_per_batch": 2 * tokens[8] - 1}),
    ):
        caplog.clear()
        trainer = small_sft(tmp_path, **settings, **budget, oversized="fewer_frames")
        batches = list(islice(trainer.get_train_dataloader(), 2))
        assert sorted(batch.names for batch in batches) == [("record '0'",), ("record '1'",)]
        shown = collator([{**records[0], "frames": {"min": most, "max": most}}])["pixel_values"]
        assert all(batch["pixel_values"].equal(shown) for batch in batches)
        assert caplog.text.count("fewer frames") == (most < 8)
    for limit, oversized in ((tokens[4], "refuse"), (tokens[1] - 1, "fewer_frames")):
        with pytest.raises(ValueError, match="record '?[01]"):
            trainer = small_sft(tmp_path, **settings, max_tokens_per_batch=limit, oversized=oversized)
            next(iter(trainer.get_train_dataloader()))


def test_an_adapter_on_another_base_is_not_resumed(tmp_path):
    small_sft(tmp_path, kind="lora", max_steps=1, save_strategy="steps", save_steps=1).train()
    trainer = small_sft(tmp_path, kind="lora", max_steps=2)
    model = trainer.model.unload()
    with torch.no_grad():
        next(model.parameters()).add_(1)
    with pytest.raises(ValueError, match="another model"):
        small_sft(tmp_path, kind="lora", max_steps=2, model=model).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("columns", "named"),
    [
        ({"text": ["Hi"]}, "no column 'messages'.*text"),
        ({"conversations": [[turn("user", "Hi")]]}, "no column 'messages'.*mpo.data.load_conversations"),
        ({"query": ["Hi"], "response": ["a"]}, "no column 'messages'.*mpo.data.load_conversations"),
        ({"prompt": ["Hi"], "chosen": ["a"], "rejected": ["b"]}, "no column 'messages'.*chosen"),
        ({"prompt": ["Hi"]}, "no column 'messages'.*prompt"),
    ],
)
def test_columns(tmp_path, columns, named):
    with pytest.raises(ValueError, match=f"train_dataset has {named}"):
        small_sft(tmp_path, dataset=Dataset.from_dict(columns))


# --- Options: every field of TRL's SFTConfig is honoured or refused

HONOURED = {  # each with a value that is not the default, and works
    **{"model_init_kwargs": None, "trust_remote_code": True, "router_aux_loss_coef": 0.0, "activation_offloading": False},
    **{"packing": True, "padding_free": True, "completion_only_loss": True, "assistant_only_loss": True, "loss_type": "dft"},
    **{"pad_token": "<|endoftext|>", "pad_to_multiple_of": 64, "learning_rate": 1e-4, "warmup_steps": 3},
}
REFUSED = {
    **{"chat_template_path": "template.jinja", "dataset_text_field": "messages", "dataset_kwargs": {"skip_prepare_dataset": True}},
    **{
        "dataset_num_proc": 2,
        "eos_token": "<|im_end|>",
        "max_length": 1024,
        "truncation_mode": "keep_end",
        "shuffle_dataset": True,
    },
    **{"packing_strategy": "wrapped", "eval_packing": True},
}
ALSO_REFUSED = [
    {"completion_only_loss": False},
    {"assistant_only_loss": False},
    {"label_smoothing_factor": 0.1},
    {"packing_strategy": "bfd_split"},
    {"loss_average": "root"},
    {"train_on": "first"},
    {"oversized": "cut"},
    {"oversized": "own_row", "batching": "conversations"},
    {"oversized": "fewer_frames", "batching": "conversations"},
    {"packing_buffer": 0},
    {"packing_buffer": 9, "batching": "conversations"},
    {"max_tokens_per_batch": 0, "oversized": "own_row"},
    {"max_tiles_per_batch": -1, "oversized": "own_row"},
    {"max_tokens_per_batch": 400, "batching": "conversations"},
    {"packing": True, "rows": "padded", "batching": "conversations"},
    {"rows": "padded"},
    {"train_sampling_strategy": "group_by_length"},
]


def test_every_field_of_trl_is_decided():
    own = set(SFTConfig.__dataclass_fields__) - set(TrainingArguments.__dataclass_fields__)
    assert own == (set(HONOURED) | set(REFUSED)) - {"learning_rate", "warmup_steps"}
    assert set(SFTConfig.__dataclass_fields__) <= set(PackedSFTConfig.__dataclass_fields__)


@pytest.mark.parametrize("setting", [*({name: value} for name, value in REFUSED.items()), *ALSO_REFUSED], ids=str)
def test_what_would_be_ignored_is_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        PackedSFTConfig("out", use_cpu=True, report_to="none", **setting)


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize("name", HONOURED)
def test_what_is_honoured(tmp_path, name):
    trainer = small_sft(tmp_path, **{name: HONOURED[name]}, max_steps=1, records=2)
    trainer.train()
    batch = next(iter(trainer.get_train_dataloader()))
    assert trainer.layout == ("padded" if name == "pad_to_multiple_of" else "packed")
    assert name != "pad_to_multiple_of" or batch["input_ids"].shape[1] % 64 == 0
    assert name != "pad_token" or trainer.processing_class.tokenizer.pad_token == HONOURED[name]
    assert getattr(trainer.args, name) == HONOURED[name]


def test_the_buffer_of_a_stream_is_refused_without_one(tmp_path):
    with pytest.raises(ValueError, match="packing_buffer=9 would be ignored"):
        small_sft(tmp_path, **TOKENS, packing_buffer=9)


@pytest.mark.parametrize("argument", ["data_collator", "compute_loss_func", "formatting_func"])
def test_arguments_of_trl_that_do_not_apply(argument):
    with pytest.raises(ValueError, match=f"{argument} would be ignored"):
        PackedSFTTrainer("model", **{argument: print})


def test_defaults_are_internvls(tmp_path):
    args = PackedSFTConfig(str(tmp_path), use_cpu=True)
    assert (args.max_tokens_per_batch, args.max_tiles_per_batch, args.loss_average) == (16384, 48, "square")
    assert (args.learning_rate, args.warmup_steps, args.lr_scheduler_type, args.weight_decay) == (4e-5, 0.03, "cosine", 0.05)
    with pytest.raises(ValueError, match="PackedSFTConfig, got SFTConfig"):
        PackedSFTTrainer(make_image(0), SFTConfig(str(tmp_path), use_cpu=True, bf16=False))

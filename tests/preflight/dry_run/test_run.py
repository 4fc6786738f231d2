"""`mpo train ... dry_run=true` on a tiny InternVL: the content of the report, and that nothing is trained or written."""

import json
import re

import pytest
from support import TEXTS, make_image

from mpo.commands import main
from mpo.models.small import small_internvl, small_processor
from mpo.preflight.dry_run import histogram


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    processor = small_processor(TEXTS, image_size=32, patch_size=8, max_patches=4)
    small_internvl(processor, hidden_size=32, vision_hidden_size=32).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Records a0 to a5 of increasing length; images of 1 to 4 tiles."""
    folder = tmp_path_factory.mktemp("pairs")
    lines = []
    for index in range(6):
        make_image(index, 32 * (1 + index % 4)).save(folder / f"{index}.png")
        completions = {"chosen": f"It is {index}.", "rejected": "I do not know." + " Really." * index}
        lines.append(json.dumps({"id": f"a{index}", "image": f"{index}.png", "question": "What is it?", **completions}))
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    return folder / "pairs.jsonl"


@pytest.fixture
def page(checkpoint, pairs, tmp_path, capsys):
    def shown(*overrides, status=0):
        words = ["train", f"model.name_or_path={checkpoint}", f"data.path={pairs}", f"run_dir={tmp_path / 'run'}"]
        words += ["trainer.global_batch_size=2", "dry_run=true"]
        assert main([*words, *overrides]) == status
        captured = capsys.readouterr()
        return captured.err if status else captured.out

    return shown


def test_the_page(page, tmp_path):
    text = page()
    for title in ("Parameters", "Memory, GPU, one process", "Work", "Lengths", "As the model sees it: record 'a0'"):
        assert f"\n{title}" in text
    assert re.search(r"weights +0\.3 MiB +32 bits", text)
    assert "6 pairs; epochs: 1; steps: 3 of 2 pairs (micro-batches per step and rank: 2; ranks: 1)" in text
    assert text.index("record 'a5'") < text.index("record 'a4'")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["train.log"]  # Hydra's, empty


def test_a_run_that_is_one_step_of_the_warm_up(page):
    """Six pairs in one step, whose rate is 0; without a warm-up, or with a second epoch, there is a rate."""
    assert "steps: 1 of 6 pairs" in (text := page("trainer.global_batch_size=256")) and "whose learning rate is 0" in text
    for other in ("trainer.warmup_steps=0", "trainer.num_train_epochs=2"):
        assert "learning rate is 0" not in page("trainer.global_batch_size=256", other)


def test_one_record_as_the_model_sees_it(page):
    """One tile is four image tokens. The completion's end of turn is labelled; the template's newline after it is left out."""
    record = page().split("As the model sees it")[1]
    assert "<img><IMG_CONTEXT> x 4</img>\n" in record
    assert "«It is 0.<|im_end|>»" in record
    assert re.search(r"chosen, (\d+) tokens, \1 labelled", record)


def test_an_answer_cut_by_max_length(page):
    assert re.search(r"rejected, 3 tokens, truncated from \d+ by max_length", page("data.limit=1", "trainer.max_length=33"))


def test_a_record_of_many_tokens_is_no_longer_scored_as_template(page):
    assert "<|im_end|>\n" in page("loss=mpo_trl").split("chosen,")[-1]


def test_adapters(page):
    """Six images of 17 tiles in all; 32 x 32 pixels are 4 tokens of the language model's 32 channels."""
    cached = ("trainer.vision_features=cached", "trainer.num_train_epochs=2")
    text = page("peft=lora", "peft.r=2", "trainer.gradient_checkpointing=false", *cached)
    assert "17 distinct tiles of 4 x 32 numbers, after the projector" in text and "instead of 34 in 2 epochs" in text
    assert re.search(r"vision tower +[\d,]+ +0\n", text)
    assert re.search(r"reference model +0 +\S.* adapters", text)


def test_an_image_under_other_tile_limits_is_another_one(checkpoint, pairs, tmp_path, capsys):
    """Image 1 alone has 3 tiles (2 and a thumbnail), three images of a prompt 1 each, of which two are the same."""
    said = {"role": "assistant", "content": "Yes."}
    images = (["1.png"], ["1.png", "0.png", "1.png"], ["1.png"])
    chats = [{"images": own, "messages": [{"role": "user", "content": "What is it?"}, said]} for own in images]
    (pairs.parent / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    words = ["sft", f"model.name_or_path={checkpoint}", f"data.path={pairs.parent / 'chats.jsonl'}", f"run_dir={tmp_path}"]
    words += ["trainer.global_batch_size=2", "dry_run=true", "trainer.vision_features=cached", "train_parts.vision=freeze"]
    assert main(words) == 0
    assert "5 distinct tiles" in (text := capsys.readouterr().out) and "encodes 5 tiles, instead of 9" in text


def test_packing(page):
    text = page("trainer.batching=tokens", "trainer.max_tokens_per_batch=200", "trainer.global_batch_size=null")
    assert re.search(r"batches: 6 records in \d batches .* budget filled to \d+\.\d%", text)


def test_a_sample_says_so(page):
    text = page("dry_run_records=3")
    assert "measured on 3 records" in text
    assert "about " in text
    assert "6 pairs;" in text


def test_it_fits(page):
    assert "fits on a GPU of 80 GiB" in page("dry_run_gpu_gb=80")


def test_what_to_change_when_it_does_not_fit(page):
    """Each setting with the memory it saves, largest first."""
    text = page("dry_run_gpu_gb=0.6846", "trainer.gradient_checkpointing=false", "trainer.per_device_train_batch_size=2")
    assert "WARNING: the estimate" in text
    advice = text.split("on its own:")[1].split("model.max_tiles")[0]
    saved = [float(amount) for amount in re.findall(r"  ([\d.]+) MiB  leaves", advice)]
    assert saved == sorted(saved, reverse=True)


def test_a_cpu_run_has_no_margin(page):
    text = page("trainer.use_cpu=true")
    assert "Memory, CPU" in text
    assert "CUDA" not in text


def test_refusals_are_one_message(page):
    error = page("trainer.batching=tokens", "trainer.max_tokens_per_batch=20", "trainer.global_batch_size=null", status=2)
    assert "mpo: error: trainer.max_tokens_per_batch=20 " in error and "record 'a5'" in error
    assert "Set model.max_tiles=1 " in page("trainer.max_length=32", status=2)


def test_settings_of_a_gpu_are_accepted_without_one(page):
    text = page("trainer.bf16=true", "trainer.activation_offloading=true")
    assert "casts of weights" in text
    assert "NOT subtracted: what trainer.activation_offloading saves" in text


def test_a_histogram_counts_every_value():
    import numpy as np

    values = np.array([3, 3, 4, 900, 1700])
    counts = [int(line.split()[1]) for line in histogram("tokens", values)[1:]]
    assert sum(counts) == len(values)

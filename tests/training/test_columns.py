"""Columns of a user's data set, and files that change: what a record holds is never taken for what the library says."""

import copy
import io
import json
import os
import pickle

import datasets
import pytest
import torch
from datasets import Dataset
from support import image_pairs, make_image, text_pairs

from mpo import MPOConfig, MPOTrainer
from mpo.batching.collator import PairCollator
from mpo.batching.streams import IndexedRecords
from mpo.data.encoded import with_encoded_images
from mpo.data.eval_part import content_keys
from mpo.data.paths import Folders
from mpo.data.records import to_records
from mpo.encoding.costs import measure
from mpo.encoding.encoder import Encoder
from mpo.io import BadRecord
from mpo.schema import BAD, COUNTED, EPOCH, PADDING
from mpo.training.samples.prompts import first_prompts
from mpo.training.start import check_columns

NAMES = ("is_filler", "is_padding", "epoch", "EPOCH", "PADDING", "COUNTED", "BAD", "counted", "bad", "filler", "source")


def test_internal_keys_are_no_users_columns():
    """They equal themselves alone, also after a way through another process, and sort like text."""
    for key in (EPOCH, PADDING, COUNTED, BAD):
        record = pickle.loads(pickle.dumps({key: 1, str(key): 2}))
        assert record[key] == 1 and record[str(key)] == 2 and sorted(map(str, record)) == [str(key)] * 2
        assert key != str(key) and str(key) != key and key == key


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_users_column_of_any_name_changes_nothing(processor, layout):
    rows = [{**row, "augment": True} for row in image_pairs(2)]
    own = [{**row, **dict.fromkeys(NAMES, 3), "prompt_id": "p"} for row in rows]
    collate = PairCollator(processor, layout=layout, keys=True)
    plain, named = collate(rows), collate(own)
    assert named.counted is None and named.completion_keys == plain.completion_keys
    assert torch.equal(named["pixel_values"], plain["pixel_values"])


def test_a_users_prompt_id_and_links(processor, tmp_path):
    """Only the records of load_preferences, whose paths are real ones, are refused when a path leads elsewhere."""
    make_image(0).save(tmp_path / "a.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    row = {**image_pairs(1)[0], "images": [{"bytes": None, "path": str(tmp_path / "link.png")}], "prompt_id": "p"}
    PairCollator(processor)([row])
    with pytest.raises(ValueError, match="has become a link"):
        PairCollator(processor)([{**row, "id": "a", "source": "b"}])


WRONG = {
    "tiles": (5, {"min": 5, "max": 2}, {"most": 3}, "4"),
    "augment": ("no", 1),
    "videos": ("a.mp4", [5]),
    "images": (5, [5], {"a": 1}, [{"bytes": "text", "path": 5}]),
    "image": ({"bytes": b"x", "path": None},),
    "prompt": (5, [5], {"role": "user"}),
    "chosen": (5, [5], [{"content": "a"}], [{"role": "assistant", "content": 5}]),
    "tools": (5, "{", '{"a": 1, "a": 2}'),
    "chat_template_kwargs": (5,),
}


@pytest.mark.parametrize("column", WRONG)
def test_a_column_of_another_type_is_a_bad_record(processor, column):
    """The record is named, when it stops the run and when it is skipped, in training and in evaluation alike."""
    good = {**image_pairs(1)[0], "id": "good"}
    for value in WRONG[column]:
        bad = {**good, "id": "bad", column: value, EPOCH: 0}
        with pytest.raises(ValueError, match="record 'bad'"):
            PairCollator(processor)([good, bad])
        batch = PairCollator(processor, on_bad_record="skip")([bad, good])
        assert batch.kept == (1,) and [one["where"] for one in batch.bad] == ["record 'bad'"], value
    if column in ("tiles", "augment", "videos"):
        assert f"'{column}'" in batch.bad[0]["reason"]


@pytest.mark.parametrize(
    ("column", "value"),
    [("system_prompt", "Be brief."), ("context", "Paris"), ("image_path", "b.png"), ("photo", {"bytes": b"x", "path": None})],
)
def test_a_column_that_no_trainer_uses(processor, internvl, tmp_path, column, value):
    """As in files: refused when the trainer is made, with its name; labels and numbers are not."""
    pairs = image_pairs(2).add_column("score", [1.0, 2.0]).add_column("kind", ["a label", "another"])
    args = MPOConfig(str(tmp_path), report_to="none", use_cpu=True)
    MPOTrainer(internvl, args=args, train_dataset=pairs, processing_class=processor)
    wrong = Dataset.from_list([{**row, "images": [], column: value} for row in pairs.remove_columns("images")])
    with pytest.raises(ValueError, match=f"train_dataset: .*'{column}.*remove_columns"):
        MPOTrainer(internvl, args=args, train_dataset=wrong, processing_class=processor)


ASKED, ANSWER, OTHER = ({"role": role, "content": text} for role, text in (("user", "Hm?"), ("assistant", "A"), ("assistant", "B")))
AS_TEXT = json.dumps([ANSWER])
LOST = {  # a record, and the field that is refused
    "image": ({"prompt": [{**ASKED, "image": "a.png"}]}, "prompt.image"),
    "part": ({"prompt": [{**ASKED, "content": [{"type": "text", "text": "Hm?", "image": "b.png"}]}]}, "prompt.image"),
    "address": ({"prompt": [{**ASKED, "content": [{"type": "image", "image_url": {"url": "/a.png"}}]}]}, "prompt.image_url.url"),
    "context": ({"prompt": [{**ASKED, "context": "Paris"}]}, "prompt.context"),
    "reasoning": ({"chosen": [{**ANSWER, "reasoning_content": "I have to say A here."}]}, "chosen.reasoning_content"),
    "thinking": ({"rejected": [{**OTHER, "thinking": "I have to say A here."}]}, "rejected.thinking"),
    "JSON text": ({"chosen": [{**ANSWER, "content": AS_TEXT}]}, "chosen"),
    "JSON texts": ({"prompt": "Hm?", "chosen": AS_TEXT, "rejected": str([OTHER])}, "chosen"),
    "JSON part": ({"prompt": [{**ASKED, "content": [{"type": "text", "text": json.dumps([ASKED])}]}]}, "prompt"),
    "column": ({"context": "Paris"}, "context"),
    "width": ({"con\uff54ext": "Paris"}, "con\uff54ext"),
}


@pytest.mark.parametrize("case", LOST)
def test_what_no_template_shows(processor, internvl, tmp_path, case):
    """Refused in files and data sets of both kinds: in a first record when the trainer is made, in others when they are read."""
    good = {"id": "good", "prompt": [ASKED], "chosen": [ANSWER], "rejected": [OTHER]}
    changed, field = LOST[case]
    bad = {**good, "id": "bad", **changed}
    with pytest.raises(ValueError, match=f"record 'bad': .*'?{field}"):
        PairCollator(processor)([good, bad])
    assert PairCollator(processor, on_bad_record="skip")([bad, good]).kept == (1,)
    with pytest.raises(BadRecord, match=field.replace("image_url.url", "image")):
        to_records(bad, where="a:1", find=Folders(tmp_path))
    args = MPOConfig(str(tmp_path), report_to="none", use_cpu=True, max_steps=1)
    streams = Dataset.from_list([bad]), datasets.IterableDataset.from_generator(lambda: iter([bad]))
    for dataset in streams:
        with pytest.raises(ValueError, match=f"train_dataset: .*'{field}"):
            MPOTrainer(internvl, args=args, train_dataset=dataset, processing_class=processor)


@pytest.mark.parametrize("batching", ["pairs", "tokens", "streampairs"])
def test_a_column_of_a_later_record(processor, internvl, tmp_path, batching):
    rows = Dataset.from_list([{**row, "context": None if place == 0 else "Paris"} for place, row in enumerate(text_pairs(4))])
    size = {"max_tokens_per_batch": 500} if batching == "tokens" else {"per_device_train_batch_size": 4}
    args = MPOConfig(str(tmp_path), report_to="none", use_cpu=True, max_steps=1, batching=batching.removeprefix("stream"), **size)
    rows = rows.to_iterable_dataset() if batching == "streampairs" else rows
    trainer = MPOTrainer(internvl, args=args, train_dataset=rows, processing_class=processor)
    with pytest.raises(ValueError, match="'context'.*remove_columns"):
        trainer.train()


def test_a_field_that_the_template_reads(processor):
    """It is shown, so it is used; no field of another message is."""
    record = {"prompt": [ASKED], "chosen": [{**ANSWER, "mood": "I am glad to help."}], "rejected": [OTHER]}
    with pytest.raises(ValueError, match="'chosen.mood'"):
        PairCollator(processor)([record])
    template = "{% for m in messages %}{{ m['role'] }}: {{ m.content }} {{ m.get('mood') or '' }}\n{% endfor %}"
    record["chat_template_kwargs"] = {"chat_template": template}
    assert PairCollator(processor.tokenizer)([record]).size == 1
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.chat_template = record.pop("chat_template_kwargs")["chat_template"]
    check_columns(Dataset.from_list([record]), "train_dataset", processing_class=tokenizer)


@pytest.mark.parametrize("rows", [Dataset.from_list([]), datasets.IterableDataset.from_generator(lambda: iter([]))])
def test_no_records(processor, internvl, tmp_path, rows):
    args = MPOConfig(str(tmp_path), report_to="none", use_cpu=True, max_steps=1)
    with pytest.raises(ValueError, match="train_dataset has no records"):
        MPOTrainer(internvl, args=args, train_dataset=rows, processing_class=processor)


@pytest.mark.parametrize("sides", ["chosen", "rejected"])
def test_sides_are_a_list(processor, sides):
    with pytest.raises(ValueError, match=rf"list of columns.*{sides}"):
        Encoder(processor)(list(image_pairs(1)), sides=sides)


def png(number, size=(32, 32), cut=False):
    with io.BytesIO() as file:
        make_image(number, *size).save(file, "PNG")
        data = file.getvalue()
    return data[: len(data) // 2] if cut else data


def of_files(folder, sizes):
    """A data set of pairs, each with an image file of its own."""
    rows = []
    for place, (row, size) in enumerate(zip(image_pairs(len(sizes)), sizes, strict=True)):
        path = folder / f"{place}.png"
        path.write_bytes(png(place, size))
        rows.append({**row, "images": [{"bytes": None, "path": str(path)}]})
    return Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))


def test_a_replaced_image_is_measured_again(processor, tmp_path, monkeypatch):
    """In place, of the same number of bytes even: lengths, keys of contents, and what connects a split."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    pairs = of_files(tmp_path, [(32, 32), (32, 32)])
    before, keys = measure(pairs, processor), content_keys(pairs)["images"]
    (tmp_path / "1.png").write_bytes((tmp_path / "0.png").read_bytes())
    os.utime(tmp_path / "1.png", ns=(1, 1))
    assert [content_keys(pairs)["images"][place] for place in (0, 1)] == [keys[0], keys[0]]
    (tmp_path / "1.png").write_bytes(png(5, (96, 32)))
    after = measure(pairs, processor)
    assert after.prompt[0] == before.prompt[0] and after.prompt[1] > before.prompt[1]


def test_a_batch_that_is_longer_than_counted_is_noticed(processor, tmp_path):
    pairs = of_files(tmp_path, [(32, 32), (32, 32)])
    records = IndexedRecords(with_encoded_images(pairs), counted=measure(pairs, processor).prompt)
    collate = PairCollator(processor)
    collate(records.__getitems__([0, 1]))
    (tmp_path / "1.png").write_bytes(png(5, (96, 32)))
    with pytest.raises(ValueError, match="tokens when batches were planned"):
        collate(records.__getitems__([0, 1]))


@pytest.mark.parametrize("how", ["encoded", "transform"])
def test_a_cut_image_is_skipped_in_training_and_evaluation(processor, internvl, tmp_path, how):
    """Also where the data set decodes it itself, by a transform of the user."""
    pairs = of_files(tmp_path, [(32, 32)] * 4)
    (tmp_path / "2.png").write_bytes(png(2, cut=True))
    if how == "transform":
        pairs = pairs.with_transform(lambda rows: rows)
    settings = {"on_bad_record": "skip", "max_bad_fraction": 0.5, "num_train_epochs": 1, "report_to": "none", "use_cpu": True}
    args = MPOConfig(str(tmp_path / "run"), per_device_train_batch_size=2, disable_tqdm=True, save_strategy="no", **settings)
    trainer = MPOTrainer(internvl, args=args, train_dataset=pairs, eval_dataset=pairs, processing_class=processor)
    trainer.train()
    assert trainer.evaluate()["eval_bad_records"] == 1
    listed = [json.loads(line) for line in (tmp_path / "run" / "bad_records.jsonl").read_text().splitlines()]
    assert {entry["data"] for entry in listed} == {"train", "eval"}


def test_samples_of_cut_images(tmp_path):
    pairs = of_files(tmp_path, [(32, 32)] * 3)
    (tmp_path / "0.png").write_bytes(png(2, cut=True))
    with pytest.raises(ValueError, match="cut short"):
        first_prompts(pairs, 2)
    found = first_prompts(pairs, 2, on_bad_record="skip")
    assert [record["images"][0].filename for record in found] == [str(tmp_path / f"{place}.png") for place in (1, 2)]

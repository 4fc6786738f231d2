"""A data set is identified by its records and by the current state of the files they name."""

import os

import pytest
from datasets import Dataset, Image, List
from support import TEXTS, make_image, messages

from mpo.batching.collator import PairCollator
from mpo.data.encoded import with_encoded_images
from mpo.models.loading import set_tiles
from mpo.models.small import small_processor
from mpo.training.reference.filling import finished_name, named_files

FORMS = {
    "list": ("images", lambda path: [{"path": path, "bytes": None}], List(Image())),
    "one": ("image", lambda path: {"path": path, "bytes": None}, Image()),
    "paths": ("images", lambda path: [path], None),
    "videos": ("videos", lambda path: [path], None),
}


def named(paths, form: str = "list") -> Dataset:
    column, cell, feature = FORMS[form]
    dataset = Dataset.from_list([{"prompt": str(number), column: cell(str(path))} for number, path in enumerate(paths)])
    return dataset if feature is None else with_encoded_images(dataset.cast_column(column, feature))


@pytest.mark.parametrize("form", FORMS)
def test_a_file_replaced_under_its_name(tmp_path, form):
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path in paths:
        path.write_bytes(b"one")
    dataset = named(paths, form)
    assert named_files(dataset) == {str(path) for path in paths}
    before = finished_name(dataset, "s")
    assert finished_name(dataset, "s") == before != finished_name(dataset, "t")
    paths[1].write_bytes(b"two!")
    longer = finished_name(dataset, "s")
    os.utime(paths[1], ns=(1, 1))
    older = finished_name(dataset, "s")
    paths[1].unlink()
    missing = finished_name(dataset, "s")
    assert len({before, longer, older, missing}) == 4


def test_files_of_chosen_records_alone_and_none(tmp_path):
    dataset = named([tmp_path / f"{number}.png" for number in range(5)])
    assert named_files(dataset.select([3, 1])) == {str(tmp_path / "3.png"), str(tmp_path / "1.png")}
    empty = Dataset.from_list([{"images": None}, {"images": []}, {"images": [{"path": None, "bytes": b"x"}]}])
    assert named_files(empty) == set() == named_files(dataset.remove_columns("images"))


def test_what_cannot_be_identified():
    assert finished_name([{"prompt": "a"}], "s") is None
    assert finished_name(Dataset.from_list([{"prompt": "a"}]).with_transform(lambda rows: rows), "s") is None


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_three_tiles_are_not_two_and_a_thumbnail(layout):
    """Same ids, different pixels. Limits that split as the processor does change no key."""
    processor = small_processor(TEXTS, image_size=32, patch_size=8, max_patches=3)
    set_tiles(processor, None, None)
    collator = PairCollator(processor, layout=layout, keys=True, tile_budget="image")
    completions = {"chosen": messages("Three.", "assistant"), "rejected": messages("None.", "assistant")}
    record = {"prompt": messages("How many?", "user"), **completions, "images": [make_image(0, 32 * 12, 32)]}

    def collated(**tiles):
        return collator([{**record, "tiles": tiles}])

    three, two = collated(max=3, thumbnail=False), collated(max=2, thumbnail=True)
    assert three["input_ids"].equal(two["input_ids"]) and not three["pixel_values"].equal(two["pixel_values"])
    assert not set(three.completion_keys) & set(two.completion_keys)
    plain = collator([record]).completion_keys
    assert plain == collated(thumbnail=True).completion_keys == collated(max=3).completion_keys
    assert collated(max=2).completion_keys == two.completion_keys

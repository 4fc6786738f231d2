"""Tile limits: a budget for all images of a prompt, limits of a record, the thumbnail; by the collator and by the measurement."""

import pytest
from datasets import Dataset, Image, List
from support import TEXTS, completion_mask, make_image, messages

from mpo.batching.collator import PairCollator
from mpo.encoding.costs import measure
from mpo.encoding.tiles import tile_limits
from mpo.models.loading import set_tiles
from mpo.models.small import small_processor

WIDE = (32 * 12, 32)  # twelve tiles side by side, and a thumbnail


@pytest.fixture(scope="module")
def twelve():
    processor = small_processor(TEXTS, image_size=32, patch_size=8, max_patches=12)
    set_tiles(processor, None, None)
    return processor


def record(images: int, **more) -> dict:
    return {
        "prompt": messages("How many?", "user"),
        "chosen": messages("Three.", "assistant"),
        "rejected": messages("None.", "assistant"),
        "images": [make_image(number, *WIDE) for number in range(images)],
        **more,
    }


def tiles(processor, records, layout="packed", **settings) -> int:
    batch = PairCollator(processor, layout=layout, **settings)(records)
    found = int((batch["input_ids"] == processor.image_token_id).sum()) // processor.image_seq_length
    assert found == len(batch["pixel_values"])
    return found


@pytest.mark.parametrize(
    ("images", "shared"),
    [
        (1, 12 + 1),  # 12 // 1
        (2, 2 * (6 + 1)),  # 12 // 2
        (5, 5 * (2 + 1)),  # 12 // 5 = 2
        (7, 7),  # 12 // 7 = 1: one tile, and no thumbnail
        (13, 13),  # never less than one
    ],
)
def test_images_of_a_prompt_share_the_most_tiles(twelve, images, shared):
    """An image of twelve tiles side by side: each of N images has max(1, 12 // N), with a thumbnail if they are several."""
    assert tiles(twelve, [record(images)]) == shared
    assert tiles(twelve, [record(images)], tile_budget="image") == 13 * images


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"max": 6}, 7),
        ({"max": 1}, 1),
        ({"max": 24}, 13),  # the image has twelve
        ({"min": None, "max": 3, "thumbnail": None}, 4),  # columns of a table have nulls
        ({"thumbnail": False}, 12),
        ({"max": 4, "thumbnail": False}, 4),
        ({"min": 5, "max": 5}, 6),
        ({}, 13),
        (None, 13),
    ],
)
def test_a_record_has_limits_of_its_own(twelve, limits, expected):
    assert tiles(twelve, [record(1, tiles=limits)]) == expected


def test_records_of_different_limits_in_one_batch(twelve):
    """Each as alone, in the order of the records."""
    records = [record(1, tiles={"max": most}) for most in (3, 12, 1)] + [record(2)]
    together = PairCollator(twelve, layout="packed", tile_budget="prompt")(records)
    padded = PairCollator(twelve)(records)
    alone = [PairCollator(twelve)([one]) for one in records]
    assert [len(batch["pixel_values"]) // 2 for batch in alone] == [4, 13, 1, 14]
    half = len(padded["pixel_values"]) // 2
    start = 0
    for batch in alone:
        own = batch["pixel_values"][: len(batch["pixel_values"]) // 2]
        assert own.equal(padded["pixel_values"][start : start + len(own)])
        assert own.equal(padded["pixel_values"][half + start : half + start + len(own)])
        start += len(own)
    # The first image of the last record is the others' with other tile limits: nothing is shared.
    assert "tile_order" not in together and together["pixel_values"].equal(padded["pixel_values"][:half])


@pytest.mark.parametrize("budget", ["prompt", "image"])
def test_measured_as_collated(twelve, budget):
    """Planned batches need the tiles and tokens that the collator makes."""
    rows = [
        record(1),
        record(3),
        record(2, tiles={"max": 4}),
        record(1, tiles={"thumbnail": False}),
        record(0, tiles={"max": 2}),
    ]
    empty = {"min": None, "max": None, "thumbnail": None}
    rows = [{**row, "tiles": {**empty, **row.get("tiles", {})}} for row in rows]
    dataset = Dataset.from_list(rows).cast_column("images", List(Image()))
    costs = measure(dataset, twelve, tile_budget=budget)
    for place, row in enumerate(rows):
        batch = PairCollator(twelve, tile_budget=budget)([row])
        assert costs.tiles[place] == len(batch.model_inputs.get("pixel_values", ())) // 2
        assert costs.prompt[place] == int(completion_mask(batch)[0].argmax())
    assert len(set(costs.group.tolist())) == len(rows)


def test_the_same_image_cut_otherwise_is_another_prompt(twelve):
    dataset = Dataset.from_list([record(1, tiles={"max": most}) for most in (3, 12)])
    assert len(set(measure(dataset, twelve).group.tolist())) == 2
    batch = PairCollator(twelve, layout="packed")(list(dataset))
    assert len(batch["pixel_values"]) == 4 + 13 and len(batch["segments"].lengths) == 4


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max": 0}, "max of 'tiles' .*1 or more; got 0"),
        ({"min": 5, "max": 3}, "got min 5, max 3"),
        ({"most": 3}, "'tiles' .*min, max, thumbnail.*got 'most'"),
    ],
)
def test_limits_that_make_no_sense(twelve, limits, message):
    with pytest.raises(ValueError, match=f"record 'q1'.*{message}"):
        PairCollator(twelve)([record(1, tiles=limits, id="q1")])


def test_processors_that_cannot(processor):
    with pytest.raises(ValueError, match="mpo.models.loading.load_processor"):
        PairCollator(processor)([record(1, tiles={"thumbnail": False})])
    with pytest.raises(ValueError, match="record 'q1' sets 'tiles'"):
        tile_limits({"tiles": {"max": 3}}, 1, object(), "record 'q1'")
    assert tile_limits({}, 2, object(), "record 'q1'") == {}

"""Measured costs of records against the batches of the real processor and collator."""

import io

import numpy as np
import pytest
from datasets import Dataset, Image, List, load_dataset
from PIL import Image as PILImage
from support import TEXTS, completion_mask, make_image, messages

import mpo.encoding.costs as costs_module
from mpo.batching.collator import PairCollator
from mpo.batching.sampler import PairBatchSampler
from mpo.data.images import image_size
from mpo.encoding.costs import PairCosts, measure
from mpo.encoding.encoder import Encoder
from mpo.models.small import small_processor

SIZES = [
    (32, 32),
    (64, 32),
    (32, 64),
    (200, 31),
    (31, 200),
    (97, 53),
    (640, 480),
    (480, 640),
    (333, 333),
    (1, 1),
    (1000, 20),
    (65, 64),
]


def records_with(images_of: list[list]) -> list[dict]:
    return [
        {
            "prompt": messages("How many? " + "More. " * (place % 3), "user"),
            "chosen": messages(f"There are {place}." + " Indeed." * (place % 4), "assistant"),
            "rejected": messages("None" + " at all" * (place % 3), "assistant"),
            "images": images,
        }
        for place, images in enumerate(images_of)
    ]


def collated(records, processing_class, **settings) -> list[tuple[int, int, int, int]]:
    """Tokens of prompt, chosen, rejected, and tiles of each record, as the collator makes them."""
    found = []
    for record in records:
        batch = PairCollator(processing_class, **settings)([record])
        mask, loss_mask = batch["attention_mask"].bool(), completion_mask(batch).bool()
        assert mask.shape == loss_mask.shape
        chosen, rejected = (int(row.sum()) for row in loss_mask)
        tiles = len(batch["pixel_values"]) // 2 if "pixel_values" in batch else 0
        found.append((int(mask[0].sum()) - chosen, chosen, rejected, tiles))
    return found


def measured(dataset, processing_class, **settings) -> list[tuple[int, int, int, int]]:
    costs = measure(dataset, processing_class, **settings)
    return list(zip(*(values.tolist() for values in costs.arrays()[:4]), strict=True))


@pytest.mark.parametrize("completion_end", ["end_of_turn", "template"])
def test_as_the_collator_counts(processor, completion_end):
    """Records with no image, one and two, of one tile and of several."""
    dataset = Dataset.from_list(
        records_with([[], [make_image(0)], [make_image(1, 32, 32), make_image(2, 90, 30)], [], [make_image(3, 32, 128)]])
    ).cast_column("images", List(Image()))
    assert measured(dataset, processor, completion_end=completion_end) == collated(
        dataset, processor, completion_end=completion_end
    )


def test_plain_text_as_the_collator_counts(processor):
    dataset = Dataset.from_list(
        [{"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5, I think"}, {"prompt": "a", "chosen": "b", "rejected": "c"}]
    )
    assert measured(dataset, processor.tokenizer) == collated(dataset, processor.tokenizer)
    assert measured(dataset, processor) == collated(dataset, processor)


@pytest.mark.parametrize("max_patches", [1, 4, 12])
def test_tiles_of_many_sizes(max_patches):
    processor = small_processor(TEXTS, max_patches=max_patches)
    dataset = Dataset.from_list(records_with([[make_image(0, *size)] for size in SIZES]))
    assert measured(dataset, processor) == collated(dataset, processor)


def test_no_image_is_decoded(processor, monkeypatch):
    dataset = Dataset.from_list(records_with([[make_image(i, 70, 35)] for i in range(3)]))

    def refuse(*args, **kwargs):
        raise AssertionError("decoded")

    monkeypatch.setattr(PILImage.Image, "load", refuse)
    for opener in ("PngImageFile", "JpegImageFile"):
        module = PILImage.__name__.replace("Image", opener.removesuffix("File") + "Plugin")
        monkeypatch.setattr(f"{module}.{opener}.load", refuse, raising=False)
    assert len(measure(dataset, processor)) == 3


def test_images_are_measured_upright(processor):
    """A photo of 96 x 32 pixels whose EXIF data say that the camera was held sideways is 32 x 96."""
    exif = PILImage.Exif()
    exif[0x0112] = 6
    records = records_with([[], []])
    for record, size in zip(records, [(128, 32), (64, 48)], strict=True):
        file = io.BytesIO()
        make_image(0, *size).save(file, format="JPEG", exif=exif)
        record["images"] = [{"bytes": file.getvalue(), "path": None}]
        with PILImage.open(file) as opened:
            assert image_size(record["images"][0]) == size  # height, width
            assert (opened.height, opened.width) == size[::-1]
    dataset = Dataset.from_list(records).cast_column("images", List(Image()))
    assert dataset[0]["images"][0].size == (32, 128)
    assert measured(dataset, processor) == collated(dataset, processor)


def test_records_that_are_planned_together_share_a_row(processor, tmp_path):
    """The eleven records have nine prompts: records 1 and 10 have that of record 0, a copy of its file and other tiles do not."""
    files = [tmp_path / f"{name}.png" for name in ("one", "copy", "other")]
    for file, seed in zip(files, (0, 0, 1), strict=True):
        make_image(seed).save(file)
    first, copied, other = ({"path": str(file), "bytes": None} for file in files)
    encoded = {"path": None, "bytes": files[0].read_bytes()}
    record = records_with([[first]])[0] | {"prompt": messages("How many?", "user"), "tiles": None, "augment": None}
    few = messages("How few?", "user")
    varied = [{}, {"augment": False}, {"images": [copied]}, {"images": [other]}, {"images": [encoded]}, {"images": []}]
    varied += [{"prompt": few}, {"images": [], "prompt": few}, {"tiles": {"max": 2}}, {"augment": True}, {}]
    dataset = Dataset.from_list([record | own for own in varied]).cast_column("images", List(Image(decode=False)))
    groups = measure(dataset, processor).group.tolist()
    pairs, _, _ = Encoder(processor, share=True)(list(dataset))
    assert [pair.prompt for pair in pairs] == list(map(groups.index, groups)) == [0, 0, 2, 3, 4, 5, 6, 7, 8, 9, 0]


def test_decoded_images_of_equal_pixels_are_the_same_if_both_stand_upright(processor):
    exif, (record,) = PILImage.Exif(), records_with([[]])
    exif[0x0112] = 3
    files = []
    for written in (PILImage.Exif(), exif, PILImage.Exif()):
        files.append(io.BytesIO())
        make_image(0).save(files[-1], format="JPEG", exif=written)
    prompt = messages("How many?", "user")
    pairs, _, _ = Encoder(processor, share=True)([{**record, "prompt": prompt, "images": [PILImage.open(one)]} for one in files])
    assert [pair.prompt for pair in pairs] == [0, 1, 0]


def test_a_second_run_measures_nothing(processor, tmp_path, monkeypatch):
    file = tmp_path / "pairs.jsonl"
    Dataset.from_list(records_with([[]] * 4)).remove_columns("images").to_json(file)
    calls = tmp_path / "calls"
    once = costs_module.RecordMeasure.__call__

    def counted(self, record):
        with calls.open("a") as log:
            log.write("x")
        return once(self, record)

    monkeypatch.setattr(costs_module.RecordMeasure, "__call__", counted)

    def run(processing_class=processor, **settings):
        calls.write_text("")
        dataset = load_dataset("json", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
        return measure(dataset, processing_class, **settings), len(calls.read_text())

    first, count = run()
    assert count == 4
    processor.tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=4)  # its settings remain in the tokenizer
    again, count = run()
    assert count == 0
    assert all(np.array_equal(*pair) for pair in zip(first.arrays(), again.arrays(), strict=True))
    assert run(max_length=20)[1] == 0
    assert run(completion_end="template")[1] == 4
    assert run(small_processor(TEXTS, max_patches=2))[1] == 4
    assert run(processor.tokenizer)[1] == 4


def test_measuring_in_processes(processor):
    dataset = Dataset.from_list(records_with([[make_image(0)], [], [make_image(1, 90, 30)], []]))
    alone, shared = measure(dataset, processor), measure(dataset, processor, num_proc=2, completion_end="end_of_turn")
    assert all(np.array_equal(*pair) for pair in zip(alone.arrays(), shared.arrays(), strict=True))


def test_completions_are_cut():
    costs = PairCosts(*(np.array(values, dtype=np.int32) for values in ([10, 30], [5, 5], [9, 1], [0, 0])), np.arange(2))
    truncated = costs.truncate(17)
    assert truncated.chosen.tolist() == [5, 0]
    assert truncated.rejected.tolist() == [7, 0]
    assert costs.truncate(None) is costs


def test_attention_by_hand():
    """Prompt of 4, completions of 2 and 6: 4*4/2 + 2*(4+1) + 6*(4+3) = 8 + 10 + 42."""
    costs = PairCosts(*(np.array([value], dtype=np.int32) for value in (4, 2, 6, 0)), np.arange(1))
    assert costs.attention().tolist() == [60]
    assert costs.tokens().tolist() == [12]


def test_refusals(processor):
    dataset = Dataset.from_list(records_with([[make_image(0)]]))
    with pytest.raises(ValueError, match="IterableDataset.*batching='pairs'"):
        measure(dataset.to_iterable_dataset(), processor)
    with pytest.raises(ValueError, match="is a tokenizer"):
        measure(dataset, processor.tokenizer)
    broken = records_with([[]])
    broken[0] |= {"id": "b7", "images": [{"bytes": b"no image", "path": None}]}
    with pytest.raises(ValueError, match="'b7': image 1 .*not an image"):
        measure(Dataset.from_list(broken).cast_column("images", List(Image())), processor)
    with pytest.raises(ValueError, match="one value per record"):
        PairCosts(*(np.zeros(n, dtype=np.int32) for n in (2, 2, 2, 2)), np.arange(3))


def test_measured_records_are_packed(processor):
    dataset = Dataset.from_list(records_with([[make_image(i % 2, 64, 32)] if i % 3 else [] for i in range(12)]))
    costs = measure(dataset, processor)
    budget = int(costs.tokens().max()) * 2
    sampler = PairBatchSampler(costs, batching="tokens", max_tokens=budget, group_same_prompt=2)
    packed = PairCollator(processor, layout="packed")
    for batch in sampler:
        assert packed([dataset[index] for index in batch])["input_ids"].numel() <= budget

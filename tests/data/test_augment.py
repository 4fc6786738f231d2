"""InternVL 2.5's JPEG augmentation: per tile, before normalisation, only in training, and the same when resumed."""

import copy
from collections import Counter
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import difference, record, small_run
from support import make_image, messages

from mpo.batching.collator import PairCollator
from mpo.batching.streams import IndexedRecords, RepeatedStream
from mpo.encoding.images import QUALITIES, compress, compress_tiles
from mpo.encoding.tiles import jpeg_seed
from mpo.models.tiles import TileImageProcessor
from mpo.schema import EPOCH


def through_jpeg(tile: np.ndarray, quality: int) -> np.ndarray:
    """As in the official code's `simulate_jpeg_degradation`: saved by Pillow with only the quality set, and opened."""
    file = BytesIO()
    Image.fromarray(tile).convert("RGB").save(file, format="JPEG", quality=quality)
    return np.asarray(Image.open(BytesIO(file.getvalue())).convert("RGB"))


def tiles(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize("quality", [75, 90, 100])
def test_one_tile(quality):
    tile = tiles(1)[0]
    assert np.array_equal(compress(tile, quality), through_jpeg(tile, quality))
    assert not np.array_equal(compress(tile, quality), tile)


def test_quality_is_uniform_from_75_to_100(monkeypatch):
    """26 qualities, 5200 tiles: 200 each, give or take five standard deviations of a binomial (14)."""
    drawn = []
    monkeypatch.setattr("mpo.encoding.images.compress", lambda tile, quality: drawn.append(quality) or tile)
    for epoch in range(52):
        compress_tiles(tiles(100), (0, epoch))
    counts = Counter(drawn)
    assert sorted(counts) == list(range(75, 101)) == list(QUALITIES)
    assert all(abs(count - 200) < 70 for count in counts.values())


def test_what_a_draw_depends_on():
    one, same = compress_tiles(tiles(9), (0, 1)), compress_tiles(tiles(9), (0, 1))
    assert np.array_equal(one, same)
    for other in (compress_tiles(tiles(9), (0, 2)), compress_tiles(tiles(9), (1, 1))):
        assert not np.array_equal(one, other)


# --- In the collator


def row(*images, question="What is it?", **more) -> dict:
    return {
        "prompt": messages(question, "user"),
        "chosen": messages("The sum is 5.", "assistant"),
        "rejected": messages("It is a dog.", "assistant"),
        "images": list(images),
        **more,
    }


def pixels(processor, records, **settings) -> torch.Tensor:
    return PairCollator(processor, layout="packed", **settings)(records)["pixel_values"]


def as_bytes(processor, values: torch.Tensor) -> np.ndarray:
    """Normalised tiles -> uint8, shape (tiles, height, width, 3)."""
    mean, std = (torch.tensor(getattr(processor.image_processor, name)).view(3, 1, 1) for name in ("image_mean", "image_std"))
    return ((values * std + mean) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def test_each_tile_goes_through_jpeg_once_and_is_then_normalised(processor):
    """Two tiles and the thumbnail are bitwise the plain tiles, through JPEG at the drawn quality."""
    image = make_image(0, 64, 32)
    plain = pixels(processor, [row(image, augment=True)])
    found = pixels(processor, [row(image, augment=True, **{EPOCH: 3})], augment_seed=7)
    split = as_bytes(processor, plain)
    assert split.shape == (3, 32, 32, 3)
    assert np.array_equal(np.concatenate([split[0], split[1]], axis=1), np.asarray(image))  # the image fits its tiles
    expected = compress_tiles(split, (7, 3))
    mean, std = (torch.tensor(getattr(processor.image_processor, name)).view(3, 1, 1) for name in ("image_mean", "image_std"))
    normalised = (torch.from_numpy(expected).permute(0, 3, 1, 2).float() / 255 - mean) / std
    torch.testing.assert_close(found, normalised, rtol=0, atol=1e-6)
    possible = [[through_jpeg(tile, quality) for quality in QUALITIES] for tile in split]
    assert all(
        any(np.array_equal(tile, one) for one in each) for tile, each in zip(as_bytes(processor, found), possible, strict=True)
    )


def test_only_in_training_and_only_if_set(processor):
    """A record of an evaluation has no epoch; `augment` may be false or missing."""
    image = make_image(0, 64, 32)
    plain = pixels(processor, [row(image)])
    for other in (row(image, augment=True), row(image, augment=False, **{EPOCH: 0}), row(image, **{EPOCH: 0})):
        assert torch.equal(pixels(processor, [other]), plain)
    both = pixels(processor, [row(image, augment=True, **{EPOCH: 0}), row(make_image(1, 64, 32), question="Why?")])
    assert not torch.equal(both[:3], plain) and torch.equal(both[3:], pixels(processor, [row(make_image(1, 64, 32))]))


def test_an_image_of_several_prompts_has_one_noise(processor):
    """It is split into tiles and encoded only once; a prompt without augmentation has the plain image."""
    image = make_image(0, 64, 32)
    asked = [row(image.copy(), question=text, augment=True, **{EPOCH: 0}) for text in ("What?", "Why?")]
    batch = PairCollator(processor, layout="packed")([*asked, row(image.copy(), question="What?")])
    assert batch["tile_order"].tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5]
    padded = PairCollator(processor)([*asked, row(image.copy(), question="What?")])
    in_order = batch["pixel_values"][batch["tile_order"]]
    assert torch.equal(padded["pixel_values"], torch.cat([in_order, in_order]))


def test_our_image_processor_without_a_thumbnail(processor):
    ours = copy.copy(processor)
    ours.image_processor = TileImageProcessor.of(processor.image_processor)
    record = row(make_image(0, 64, 32), augment=True, tiles={"thumbnail": False}, **{EPOCH: 0})
    found = pixels(ours, [record])
    assert len(found) == 2
    assert torch.equal(found, pixels(processor, [row(make_image(0, 64, 32), augment=True, **{EPOCH: 0})])[:2])


def test_refusals(processor):
    cached = PairCollator(processor, layout="packed", keys=True)
    with pytest.raises(ValueError, match="'augment'.*reference='cached'"):
        cached([row(make_image(0), augment=True, **{EPOCH: 0})])
    cached([row(make_image(0), augment=True)])  # evaluated
    with pytest.raises(ValueError, match="a record sets 'augment'"):
        jpeg_seed({"augment": True, EPOCH: 0}, 1, processor.tokenizer, "a record", seed=0)


# --- The epoch


def test_records_know_the_epoch():
    rows = [{"id": "a", "augment": True}, {"id": "b", "augment": False}, {"id": "c"}]
    epoch = torch.tensor(4)
    records = IndexedRecords(rows, epoch=epoch)
    assert [record.get(EPOCH) for record in records.__getitems__([0, 1, 2])] == [4, None, None]
    epoch.fill_(5)
    assert records[0][EPOCH] == 5 and records[-1][EPOCH] == 5  # padding too
    assert EPOCH not in IndexedRecords(rows)[0]
    passes = iter(RepeatedStream(rows))
    assert [next(passes).get(EPOCH) for _ in range(6)] == [0, None, None, 1, None, None]


WAYS = {
    "in this process": {},
    "workers": {"dataloader_num_workers": 1},
    "workers that stay": {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
    "planned": {"batching": "tokens", "max_tokens_per_batch": 120},
    "stream": {"stream": True, "max_steps": 8},
}


def watched(trainer) -> list[torch.Tensor]:
    """The pixels of every batch that the trainer steps on."""
    seen, get = [], trainer.get_batch_samples

    def watching(*args):
        samples, count = get(*args)
        seen.extend(batch["pixel_values"] for batch in samples)
        return samples, count

    trainer.get_batch_samples = watching
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_draws_the_same(tmp_path, way):
    """Two epochs of four steps, resumed in the middle of the second: the same noise, and bitwise the same weights."""
    settings = {"augment": True, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 6, **WAYS[way]}
    whole = small_run(tmp_path, **settings)
    seen = watched(whole)
    whole.train()
    record(whole, tmp_path / "whole.pt")
    resumed = small_run(tmp_path, **settings)
    again = watched(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    record(resumed, tmp_path / "resumed.pt")
    assert len(again) == len(seen) - 6 and all(torch.equal(*both) for both in zip(again, seen[6:], strict=True))
    assert difference(torch.load(tmp_path / "whole.pt"), torch.load(tmp_path / "resumed.pt")) == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_every_epoch_has_its_own_noise(tmp_path, workers):
    kept = {"dataloader_num_workers": workers, "dataloader_persistent_workers": bool(workers)}
    trainer = small_run(tmp_path, pairs=2, augment=True, num_train_epochs=3, per_device_train_batch_size=2, **kept)
    seen = watched(trainer)
    trainer.train()
    noises = {tuple(sorted(round(float(tile.sum()), 3) for tile in batch)) for batch in seen}
    assert len(seen) == len(noises) == 3


@pytest.mark.slow
def test_the_reference_sees_what_the_policy_sees(tmp_path):
    """At the first step both are the same model, so the rewards are 0."""
    trainer = small_run(tmp_path, augment=True, max_steps=1)
    trainer.train()
    log = trainer.state.log_history[0]
    assert abs(log["rewards/chosen"]) < 1e-5 and abs(log["rewards/rejected"]) < 1e-5


def test_cached_references_are_refused_before_they_are_computed(tmp_path):
    with pytest.raises(ValueError, match="'augment'.*reference='cached'"):
        small_run(tmp_path, augment=True, reference="cached", reference_cache=str(tmp_path / "cache"))

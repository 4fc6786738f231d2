"""Measure the shards of a cache of vision features (`mpo.training.features.cache`) by the number of images in each.

    python benchmarks/feature_files.py      # JSON into results/

`index`: what finding an image costs, with a few bytes of features each: to open the cache in a process (which reads the keys of all
shards), to look again for shards of others (at most a twentieth of the time), to find an image, and to add up the sizes of shards,
as eviction does. `content`: the time of finding an image against that of reading and checking its features, and of writing them,
per image. CPU seconds of a warm page cache.

`encoded again`: a data set of which 90 % fits is read in random orders by one run; images encoded again in a later epoch, per image
that does not fit.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

from mpo.encoding.keys import KEY_BYTES
from mpo.training.features.cache import FeatureCache
from mpo.training.reference.fingerprint import Fingerprint
from mpo.training.store import KIND

RESULTS = Path(__file__).parent / "results"
PRINT = Fingerprint({KIND: "vision features"}, {}, {"model": "InternVL"})
TILE = {"before the projector": (1025, 1024), "after it, 1B": (256, 896)}  # tokens and channels, bfloat16
TILES = 7


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of some work, and what it returns."""
    start = time.process_time()
    found = work()
    return time.process_time() - start, found


def key(number: int) -> bytes:
    """The key of an image."""
    return FeatureCache.key(number.to_bytes(KEY_BYTES, "big"), {})


def add(cache: FeatureCache, numbers: range, features: torch.Tensor) -> None:
    """Add images as one batch does."""
    for number in numbers:
        cache.add(key(number), bytes(KEY_BYTES), (1, 1), features)
    cache.flush()


def index(folder: Path, images: int, asked: list[int], each: int) -> dict[str, float]:
    """Shards of `each` images."""
    cache, some = FeatureCache(folder, PRINT), torch.zeros(1, 1, 8, dtype=torch.bfloat16)
    for first in range(0, images, each):
        add(cache, range(first, min(first + each, images)), some)
    opened, cache = seconds(lambda: FeatureCache(folder, PRINT))
    found = [seconds(lambda number=number: cache.find(key(number))) for number in asked]
    assert all(one is not None for _, one in found)
    times = {"open, s": opened, "look again, s": seconds(cache.refresh)[0], "sizes of all, s": seconds(cache.holds)[0]}
    return {"shards": -(-images // each), "find, us": 1e6 * statistics.median(spent for spent, _ in found), **times}


def content(folder: Path, tokens: int, channels: int, each: int) -> dict[str, float]:
    """Finding an image of 7 tiles against reading and writing it."""
    cache, features = FeatureCache(folder, PRINT), torch.zeros(TILES, tokens, channels, dtype=torch.bfloat16)
    written = [seconds(lambda first=first: add(cache, range(first, first + each), features))[0] for first in range(0, 16, each)]
    found = [seconds(lambda number=number: cache.find(key(number))) for number in range(16)]
    read = [seconds(lambda one=one: cache.read([one]))[0] for _, one in found]
    times = [1e3 * statistics.median(part) for part in ([spent for spent, _ in found], read, written)]
    return {"MB": features.nbytes / 1e6, "find, ms": times[0], "read and check, ms": times[1], "write, ms": times[2] / each}


def encoded_again(folder: Path, images: int = 400, epochs: int = 3) -> float:
    """Images encoded again in an epoch, per image that does not fit, where 90 % of a data set fits."""
    some, generator = torch.zeros(1, 64, 64), random.Random(0)
    cache = FeatureCache(folder, PRINT, limit_bytes=0.9 * images * some.nbytes * 1.06)  # with the headers
    misses = 0
    for epoch in range(epochs):
        for number in generator.sample(range(images), images):
            if cache.find(key(number)) is None:
                misses += epoch > 0
                add(cache, range(number, number + 1), some)
    return misses / (epochs - 1) / (images - len(cache))


def main() -> None:
    """Measure, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--asked", type=int, default=2_000, help="number of images to find")
    parser.add_argument("--shard", type=int, nargs="+", default=[1, 8, 64], help="images of a shard")
    parser.add_argument("--output", type=Path, default=RESULTS / f"feature_files_cpu_{date.today()}.json")
    options = parser.parse_args()
    asked = random.Random(1).sample(range(options.images), options.asked)
    result: dict[str, Any] = {"device": f"{platform.machine()} CPU", "images": options.images}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result["index"] = {each: index(folder / f"index {each}", options.images, asked, each) for each in options.shard}
        result["content"] = {
            f"{place}, {each} in a shard": content(folder / f"content {place} {each}", *shape, each)
            for place, shape in TILE.items()
            for each in (1, 8)
        }
        result["encoded again"] = encoded_again(folder / "eviction")
    print(json.dumps(result, indent=1))
    options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Measure a cache of vision features as a file per image (`mpo.training.features.cache`) against shards of many images.

    python benchmarks/feature_files.py      # JSON into results/

`index`: what finding an image costs, with a few bytes of features each: to open the cache in a process (of shards, to read the keys
of all), to find an image, and to add up the sizes of all files, as eviction does. `content`: the time of finding an image against
that of reading and checking its features. Shards are files of `mpo.training.store` with the keys of their images; their index is
that of reference log-probs (`mpo.training.reference.shards.Entries`). CPU seconds of a warm page cache.

`eviction`: a data set of which 90 % fits is read in random orders; images encoded again in an epoch, per image that does not fit. A
shard is used when any of its images is, and goes with all of them.
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

import numpy as np
import torch

from mpo.encoding.keys import KEY_BYTES
from mpo.training.features.cache import FeatureCache
from mpo.training.reference.fingerprint import Fingerprint
from mpo.training.reference.shards import KEY_TYPE, Entries, key_array
from mpo.training.store import KIND, open_tensors, read_tensors, write_tensors

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


def index_of_files(folder: Path, images: int, asked: list[int]) -> dict[str, float]:
    """A file per image."""
    cache, some = FeatureCache(folder, PRINT), torch.zeros(1, 1, 8, dtype=torch.bfloat16)
    for number in range(images):
        cache.add(key(number), b"", (1, 1), some)
    opened, cache = seconds(lambda: FeatureCache(folder, PRINT))
    found = [seconds(lambda number=number: cache.find(key(number)))[0] for number in asked]
    swept, _ = seconds(cache.holds)
    return {"files": images, "open, s": opened, "find, us": 1e6 * statistics.median(found), "sizes of all, s": swept}


def index_of_shards(folder: Path, images: int, asked: list[int], each: int) -> dict[str, float]:
    """Shards of `each` images, with the keys of all in memory."""
    some, count = torch.zeros(each, 1, 8, dtype=torch.bfloat16), -(-images // each)
    for shard in range(count):
        keys = key_array(list(map(key, range(shard * each, (shard + 1) * each)))).view(np.uint8).reshape(-1, KEY_BYTES)
        write_tensors({"features": some, "keys": torch.tensor(keys)}, folder / f"{shard:08}.safetensors", PRINT, durable=False)

    def opened() -> Entries:
        files = [open_tensors(path, PRINT) for path in sorted(folder.glob("*.safetensors"))]
        keys = np.concatenate([file.get_tensor("keys").numpy().reshape(-1).view(KEY_TYPE) for file in files])
        shards = np.repeat(np.arange(len(files), dtype=np.int32), each)
        return Entries.merged([Entries(keys, np.zeros(len(keys), np.float32), shards)])

    def find(entries: Entries, number: int) -> Any:
        known, rows = entries.look_up(key_array([key(number)]))
        assert known.all()
        return open_tensors(folder / f"{entries.tokens[rows[0]]:08}.safetensors", PRINT).get_slice("features")

    spent, entries = seconds(opened)
    found = [seconds(lambda number=number: find(entries, number))[0] for number in asked]
    swept, _ = seconds(lambda: sum(path.stat().st_size for path in folder.glob("*.safetensors")))
    return {"files": count, "open, s": spent, "find, us": 1e6 * statistics.median(found), "sizes of all, s": swept}


def content(folder: Path, tokens: int, channels: int) -> dict[str, float]:
    """Finding an image of 7 tiles against reading it."""
    cache, features = FeatureCache(folder, PRINT), torch.zeros(TILES, tokens, channels, dtype=torch.bfloat16)
    for number in range(16):
        cache.add(key(number), b"", (1, 1), features)
    found = [seconds(lambda number=number: cache.find(key(number))) for number in range(16)]
    read = [seconds(lambda one=one: read_tensors(one.file, one.path, PRINT))[0] for _, one in found]
    times = [1e3 * statistics.median(each) for each in ([spent for spent, _ in found], read)]
    return {"MB": features.nbytes / 1e6, "find, ms": times[0], "read and check, ms": times[1], "fraction": times[0] / sum(times)}


def lost_by_eviction(images: int, each: int, passes: int = 3) -> float:
    """Images computed again per image that does not fit, where a cache of 90 % of a data set sees it in random orders."""
    generator, used, misses = random.Random(0), dict[int, None](), 0
    shard_of, room = {}, int(0.9 * images) // each  # in shards; an image is in that which was written when it was encoded
    members: dict[int, list[int]] = {}
    for epoch in range(passes):
        for image in generator.sample(range(images), images):
            if image not in shard_of:
                misses += epoch > 0
                current = max(members, default=-1)
                if current < 0 or len(members[current]) == each:
                    current += 1
                    members[current] = []
                members[current].append(image)
                shard_of[image] = current
            used.pop(shard_of[image], None)
            used[shard_of[image]] = None
            while len(used) > room:
                oldest = next(iter(used))
                del used[oldest]
                for gone in members.get(oldest, ()):
                    del shard_of[gone]
                members[oldest] = []
    return misses / (passes - 1) / (0.1 * images)


def main() -> None:
    """Measure, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--asked", type=int, default=2_000, help="number of images to find")
    parser.add_argument("--shard", type=int, default=64, help="images of a shard: 1 GB before the projector")
    parser.add_argument("--output", type=Path, default=RESULTS / f"feature_files_cpu_{date.today()}.json")
    options = parser.parse_args()
    asked = random.Random(1).sample(range(options.images), options.asked)
    result: dict[str, Any] = {"device": f"{platform.machine()} CPU", "images": options.images, "images of a shard": options.shard}
    with tempfile.TemporaryDirectory() as folder:
        result["index"] = {
            "files": index_of_files(Path(folder, "files"), options.images, asked),
            "shards": index_of_shards(Path(folder), options.images, asked, options.shard),
        }
        result["content"] = {
            name: content(Path(folder, f"content {place}"), *shape) for place, (name, shape) in enumerate(TILE.items())
        }
    each = {"files": 1, "shards": options.shard}
    result["eviction"] = {name: lost_by_eviction(10_000, images) for name, images in each.items()}
    print(json.dumps(result, indent=1))
    options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

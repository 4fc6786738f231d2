"""Fill a cache of reference log-probs before training, and look a batch up in it.

A finished file says that a data set is in the cache completely. Its name is that of the records and the files that they name.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import TrainerCallback

from mpo.batching.batch import Batch
from mpo.encoding.tiles import AUGMENTED_AND_CACHED
from mpo.io import write_text
from mpo.training.reference.cache import ReferenceCache

FILE_COLUMNS = ("images", "image", "videos")
_THREADS = 32  # a network file system serves many requests at once
Compute = Callable[[Batch], Tensor]
"""Compute the log-prob sums of a batch's completions under the reference, shape (sides, records)."""


def default_folder(name: str = "references") -> Path:
    """Return the default folder of a cache, by its name, which the environment variable ``MPO_CACHE`` changes."""
    return Path(os.environ.get("MPO_CACHE", Path.home() / ".cache" / "mpo")) / name


class ShareEveryEpoch(TrainerCallback):  # type: ignore[misc]
    """Read what other ranks have added before each epoch, since shuffling gives every rank their records."""

    def __init__(self, cache: ReferenceCache, accelerator: Accelerator) -> None:
        self.cache, self.accelerator = cache, accelerator

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        """Flush and read the cache. The trainer calls it on all ranks."""
        self.cache.flush()
        self.accelerator.wait_for_everyone()
        self.cache.refresh()


def refuse_augmented(dataset: Any, message: str = AUGMENTED_AND_CACHED) -> None:
    """Raise ValueError for records whose images change every epoch. (Those of a stream are refused when they are read.)"""
    if "augment" in (getattr(dataset, "column_names", None) or []) and hasattr(dataset, "__len__") and any(dataset["augment"]):
        raise ValueError(message)


def look_up(cache: ReferenceCache, batch: Batch, compute: Compute | None, on_any_rank: Callable[[bool], bool] = bool) -> Tensor:
    """Look up the log-prob sums of a batch's completions, shape (sides, records), float32, on the CPU.

    Args:
        batch: batch with ``completion_keys``. Records that do not count need not be in the cache; their sums are then 0.
        compute: computes what the cache does not have, which is then added. None: raise ValueError.
        on_any_rank: tells whether a value is true on any rank. A forward pass of sharded weights needs all ranks, so all of them
            compute when one of them has to.
    """
    assert batch.completion_keys is not None
    found = cache.get(batch.completion_keys)
    counts = np.arange(batch.size) < (batch.size if batch.counted is None else batch.counted)
    missing = ~found.known & np.tile(counts, batch.sides)
    known, logps = not missing.any(), batch.by_side(torch.from_numpy(np.where(found.known, found.logps, np.float32(0))))
    if not on_any_rank(not known):
        return logps
    if compute is None:
        raise ValueError(
            f"The cache in {cache.folder} lacks {int(missing.sum())} of this batch's {len(found.known)} completions "
            f"({batch.names[0]} and others), and the reference model was released. Pass data for later evaluations to the "
            "trainer as eval_dataset. If image files changed or the cache was pruned since the start of the run, run again: what "
            "is missing is then computed. If records change at random, use reference='live'."
        )
    # float32, as the cache keeps it, so that a later epoch finds the same values.
    sums = compute(batch).float().cpu()
    if known:
        return logps
    cache.add(batch.completion_keys, sums.flatten(), batch.labelled.lengths)
    return torch.where(batch.by_side(torch.from_numpy(found.known)), logps, sums)


def fill(
    cache: ReferenceCache,
    batches: Iterable[Batch],
    compute: Compute,
    *,
    accelerator: Accelerator,
    name: str,
    dataset: Any,
    settings: Any,
    on_any_rank: Callable[[bool], bool] = bool,
) -> None:
    """Compute what the cache lacks of a data set, each rank a part of it.

    After an interruption it continues where it stopped. A complete pass without bad records writes a finished file, with which the
    next run does not read the data. It does not apply once an image file has changed. A bad record prevents it, since the record
    may be fixed later without a trace: the next run then reads the data, and computes what is missing.

    Args:
        batches: this rank's batches of the whole data set.
        compute: see `look_up`, and `on_any_rank`.
        name: name of the data set, for the progress bar.
        dataset: see `finished_name`, and `settings`.
    """
    # Named before anything is computed: a file that changes meanwhile then gives the next run another name.
    file_name = finished_name(dataset, settings) if accelerator.is_main_process else None
    finished = cache.folder / file_name if file_name is not None else None
    is_full = [finished is not None and finished.exists() and finished.read_text() == cache.digest()]
    if broadcast_object_list(is_full)[0]:  # all ranks decide alike
        return
    bad = 0
    bar = tqdm(batches, desc=f"Reference log-probs, {name} data", unit="batch", disable=not accelerator.is_local_main_process)
    for batch in bar:
        look_up(cache, batch, compute, on_any_rank)
        bad += len(batch.bad)
    cache.flush()
    accelerator.wait_for_everyone()
    cache.refresh()
    any_bad = bool(accelerator.reduce(torch.tensor(bad, device=accelerator.device)) > 0)
    if finished is not None and not any_bad:
        write_text(finished, cache.digest())


def finished_name(dataset: Any, settings: Any) -> str | None:
    """Name the finished file of a data set under some settings. The name changes when a file that its records name changes.

    Args:
        dataset: a `datasets.Dataset`; for another class, or with a transform of the user's, None is returned.
        settings: everything else that determines the keys.
    """
    if not isinstance(dataset, Dataset) or dataset.format["type"] == "custom":
        return None
    hasher = hashlib.sha256(repr((dataset._fingerprint, len(dataset), settings)).encode())
    paths = sorted(named_files(dataset))
    with ThreadPoolExecutor(_THREADS) as pool:
        for states in pool.map(_file_states, [paths[start::_THREADS] for start in range(_THREADS)]):
            hasher.update(repr(states).encode("utf-8", "surrogatepass"))
    return f"filled-{hasher.hexdigest()[:16]}"


def named_files(dataset: Dataset) -> set[str]:
    """Return the paths in a data set's image and video columns, and the names of images held as bytes. Open no file."""
    paths: set[str] = set()
    columns = [name for name in FILE_COLUMNS if name in dataset.column_names]
    if columns:
        for table in dataset.select_columns(columns).with_format("arrow").iter(batch_size=1000):
            for name in columns:
                paths.update(_paths(table.column(name).combine_chunks()))
    return paths


def _paths(values: Any) -> Iterable[str]:
    while pa.types.is_list(values.type) or pa.types.is_large_list(values.type) or pa.types.is_fixed_size_list(values.type):
        values = values.flatten()
    if pa.types.is_struct(values.type) and values.type.get_field_index("path") >= 0:
        values = pc.struct_field(values, "path")
    is_text = pa.types.is_string(values.type) or pa.types.is_large_string(values.type)
    return filter(None, pc.unique(values).to_pylist()) if is_text else ()


def _file_states(paths: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return each file's size in bytes and modification time in nanoseconds; -1 for a missing file."""
    found = []
    for path in paths:
        try:
            status = os.stat(path)
            found.append((path, status.st_size, status.st_mtime_ns))
        except (OSError, ValueError):
            found.append((path, -1, -1))
    return found

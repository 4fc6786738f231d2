"""Fill a cache of reference log-probs before training, and look a batch up in it."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor
from tqdm.auto import tqdm
from transformers import TrainerCallback

from mpo.packing.tiles import AUGMENTED_AND_CACHED
from mpo.reference.cache import ReferenceCache
from mpo.reference.marks import mark_name

Compute = Callable[[dict[str, Any]], tuple[Tensor, Tensor]]
"""Log-prob sums of a batch's chosen and rejected answers under the reference, each of shape (pairs,)."""


def default_folder() -> Path:
    """Where reference log-probs are kept unless a run says otherwise; ``MPO_CACHE`` moves it."""
    return Path(os.environ.get("MPO_CACHE", Path.home() / ".cache" / "mpo")) / "references"


class ShareEveryEpoch(TrainerCallback):  # type: ignore[misc]
    """Before each epoch, every rank reads what the others have added: shuffled, their records come to it."""

    def __init__(self, cache: ReferenceCache, accelerator: Accelerator) -> None:
        self.cache, self.accelerator = cache, accelerator

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        """Called by the trainer, on all ranks."""
        self.cache.flush()
        self.accelerator.wait_for_everyone()
        self.cache.refresh()


def refuse_augmented(dataset: Any) -> None:
    """Refuse training records whose images are other ones in every epoch. (Those of a stream are refused when they come.)

    Raises:
        ValueError: when a record's ``augment`` is true.
    """
    if "augment" in (getattr(dataset, "column_names", None) or []) and hasattr(dataset, "__len__") and any(dataset["augment"]):
        raise ValueError(AUGMENTED_AND_CACHED)


def look_up(
    cache: ReferenceCache, batch: dict[str, Any], compute: Compute | None, on_any_rank: Callable[[bool], bool] = bool
) -> Tensor:
    """Log-prob sums of a batch's answers, chosen first, shape (2 pairs,), float32, on the CPU.

    Args:
        cache: of the reference.
        batch: with ``completion_keys``. Pairs that only fill it up need not be known: theirs are 0 then.
        compute: for what the cache does not have yet; it is added. None: that is an error.
        on_any_rank: whether something is so on any rank. Weights that are sharded need all ranks for a forward pass, so that
            what one lacks all compute.

    Raises:
        ValueError: when an answer is missing and cannot be computed.
    """
    found = cache.get(batch["completion_keys"])
    pairs = len(found.known) // 2
    missing = ~found.known & (np.arange(len(found.known)) % pairs < batch.get("counted", pairs))
    known, logps = not missing.any(), np.where(found.known, found.logps, np.float32(0))
    if not on_any_rank(not known):
        return torch.from_numpy(logps)
    if compute is None:
        raise ValueError(
            f"The cache in {cache.folder} has not {int(missing.sum())} of this batch's {len(found.known)} answers "
            f"({batch['names'][0]} and others), and the reference that could give them is gone. Data that is evaluated later must "
            "be given to the trainer as eval_dataset. If image files were changed or the cache was pruned since the run began, "
            "start the run again: it computes what is missing. If records change at random, use reference='live'."
        )
    # Kept in float32 by the cache too: what is used now is what a later epoch will find.
    sums = torch.cat(compute(batch)).float().cpu()
    if known:
        return torch.from_numpy(logps)
    cache.add(batch["completion_keys"], sums, batch["labelled"].lengths)
    return torch.where(torch.from_numpy(found.known), torch.from_numpy(logps), sums)


def fill(
    cache: ReferenceCache,
    batches: Iterable[dict[str, Any]],
    compute: Compute,
    *,
    accelerator: Accelerator,
    name: str,
    dataset: Any,
    settings: Any,
    on_any_rank: Callable[[bool], bool] = bool,
) -> None:
    """Compute what a data set lacks in the cache, every rank its share.

    Killed, it goes on where it was. A data set that was gone through to its end, no record of it bad, leaves a mark, so that the
    next run does not even read it. The mark does not hold when an image file has changed since, and a bad record leaves none,
    since it may be fixed where nothing tells: then the next run reads the data, and computes what it lacks.

    Args:
        cache: of the reference.
        batches: of the whole data set, this rank's.
        compute: for what the cache does not have.
        accelerator: whose ranks fill it.
        name: of the data set, for the progress bar.
        dataset: see `mpo.reference.marks.mark_name`.
        settings: of the collator, which decide the keys.
        on_any_rank: see `look_up`.
    """
    # Before anything is computed: a file that changes meanwhile is another one to the next run.
    name_of_mark = mark_name(dataset, settings) if accelerator.is_main_process else None
    mark = cache.folder / name_of_mark if name_of_mark is not None else None
    is_full = [mark is not None and mark.exists() and mark.read_text() == str(len(cache))]
    if broadcast_object_list(is_full)[0]:  # all ranks go on alike
        return
    bad = 0
    bar = tqdm(batches, desc=f"Reference log-probs, {name} data", unit="batch", disable=not accelerator.is_local_main_process)
    for batch in bar:
        look_up(cache, batch, compute, on_any_rank)
        bad += len(batch.get("bad", ()))
    cache.flush()
    accelerator.wait_for_everyone()
    cache.refresh()
    any_bad = bool(accelerator.reduce(torch.tensor(bad, device=accelerator.device)) > 0)
    if mark is not None and not any_bad:
        mark.write_text(str(len(cache)))

"""Read the tensors of safetensors files one at a time, and write them shard by shard."""

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from mpo.models.strict import read_index, shortened

INDEX, SINGLE = SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
DTYPES = ("BF16", "F16", "F32", "F64")
"""Dtypes of weights, by their names in safetensors files."""
COMPUTED = ("embeddings.position_ids", "rotary_emb.inv_freq")  # buffers that older versions of transformers saved


class TensorFiles:
    """Tensors by name, from the safetensors files of a checkpoint's folder, which are there and agree with its index."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / INDEX
        if index.exists():
            where = read_index(index)
        elif (folder / SINGLE).exists():
            where = dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        else:
            other = sorted(path.name for path in folder.glob("*.bin"))
            what = f" {other[0]} is a pickle, which can run code when it is read." if other else ""
            raise ValueError(f"{folder} has no {SINGLE} and no {INDEX}.{what} Weights are read from safetensors files only.")
        missing = sorted({name for name in where.values() if not (folder / name).exists()})
        if missing:
            raise ValueError(f"{index} names {', '.join(missing)}, missing from the folder. Download the checkpoint again.")
        self._files = {name: self._open(name) for name in sorted(set(where.values()))}
        kept = {name: set(file.keys()) for name, file in self._files.items()}
        unknown = sorted(name for name, file in where.items() if name not in kept[file])
        if unknown:
            raise ValueError(f"{index} names tensors that its files do not have: {', '.join(unknown[:5])}. Download it again.")
        self._where = {name: file for name, file in where.items() if not name.endswith(COMPUTED)}

    def _open(self, name: str) -> Any:
        try:
            return safe_open(self.folder / name, framework="pt")
        except Exception as error:  # safetensors raises its own class, which is not exported
            raise ValueError(f"{self.folder / name} cannot be read ({error}). Download it again.") from error

    def names(self) -> list[str]:
        """Names of all tensors, in the order of the files."""
        return list(self._where)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all tensors, without reading them; dtypes that are not in `DTYPES` (quantised, ...) are refused."""
        found = {name: self._files[file].get_slice(name) for name, file in self._where.items()}
        if other := [f"{name}: {tensor.get_dtype()}" for name, tensor in found.items() if tensor.get_dtype() not in DTYPES]:
            raise ValueError(
                f"{self.folder} has tensors of dtypes that are not {', '.join(DTYPES)}: {shortened(other)}. Give the checkpoint "
                "before its quantisation, or convert them."
            )
        return {name: tuple(tensor.get_shape()) for name, tensor in found.items()}

    def check_finite(self) -> None:
        """Read every tensor; those with NaN or infinite values are refused."""
        if bad := [name for name in self._where if not self[name].isfinite().all()]:
            raise ValueError(f"{self.folder} has weights that are not finite: {shortened(bad)}. Give another checkpoint.")

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._files[self._where[name]].get_tensor(name)
        return tensor


def bytes_of(shard_gb: float) -> int:
    """The largest size of a weight file in bytes; a ValueError for gigabytes that are not above 0, or not finite."""
    if not 0 < shard_gb < math.inf:  # NaN is not
        raise ValueError(f"Expected a file size in gigabytes above 0; got --shard-gb={shard_gb:g}.")
    return max(1, int(shard_gb * 1e9))


def write_shards(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], count: int, *, shard_bytes: int, progress: bool = True
) -> None:
    """Write `count` tensors in order into files of at most `shard_bytes` (or one larger tensor), with an index.

    At most one shard of the named `tensors` is in memory at once.
    """
    written: list[list[str]] = []
    total = 0
    for shard in _shards(tqdm(tensors, total=count, unit="tensor", desc="converting", disable=not progress), shard_bytes):
        save_file(shard, folder / f"part-{len(written)}", metadata={"format": "pt"})
        written.append(list(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
    last = len(written)
    names = [SINGLE] if last == 1 else [f"model-{number:05d}-of-{last:05d}.safetensors" for number in range(1, last + 1)]
    for number, name in enumerate(names):
        (folder / f"part-{number}").rename(folder / name)
    if last > 1:
        where = {tensor: name for name, shard in zip(names, written, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _shards(tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.contiguous().clone() if tensor._is_view() else tensor.contiguous()
        size += tensor.nbytes
    yield shard

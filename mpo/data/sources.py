"""Files of pairs -> a `datasets.Dataset` of records whose pictures are opened when they are read."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, List, Value, load_dataset, load_from_disk

from mpo.data.records import to_record

_MESSAGES = List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})})
FEATURES = Features(
    {"id": Value("string"), "images": List(Image()), "prompt": _MESSAGES, "chosen": _MESSAGES, "rejected": _MESSAGES}
)


def load_pairs(
    path: str | Path,
    *,
    image_root: str | Path | None = None,
    split: str = "train",
    limit: int | None = None,
    tiles: Mapping[str, Any] | None = None,
) -> Any:
    """Load preference pairs.

    Args:
        path: a JSONL file (see `mpo.data.records` for its lines), a Parquet file or a folder of `save_to_disk` in TRL's
            columns, or else the name of a data set on the Hub.
        image_root: what picture paths in a JSONL file are relative to; the file's own folder by default.
        split: the split to take from the Hub.
        limit: only the first so many pairs.
        tiles: how pictures of these pairs are cut, where it is not what the processor does: ``min``, ``max``, ``thumbnail``, each
            optional (`mpo.packing.tiles`).

    Returns:
        a `datasets.Dataset` with ``prompt``, ``chosen``, ``rejected`` and, where there are pictures, ``images``; and ``tiles``,
        when asked for.

    Raises:
        ValueError: for a file that does not exist or has no pairs, and for lines that are not pairs (as ``file:line``).
    """
    path = Path(path).expanduser()
    if path.suffix in (".jsonl", ".json", ".parquet") and not path.is_file():
        raise ValueError(f"There is no file {path}. Set data.path to a file of pairs.")
    if path.suffix in (".jsonl", ".json"):
        rows = list(read_jsonl(path, Path(image_root).expanduser() if image_root else path.parent))
        if not rows:
            raise ValueError(f"{path} has no pairs.")
        pairs = Dataset.from_list(rows, features=FEATURES)
    elif path.suffix == ".parquet":
        pairs = load_dataset("parquet", data_files=str(path), split="train")
    elif path.is_dir():
        pairs = load_from_disk(str(path))
    else:
        pairs = load_dataset(str(path), split=split)
    if limit is not None:
        pairs = pairs.select(range(min(limit, len(pairs))))
    own = {name: value for name, value in (tiles or {}).items() if value is not None}
    return pairs.add_column("tiles", [own] * len(pairs)) if own else pairs


def read_jsonl(path: Path, image_root: Path) -> Iterator[dict[str, Any]]:
    """The records of a JSONL file, one by one; empty lines are passed over."""
    with path.open(encoding="utf-8") as lines:
        for number, text in enumerate(lines, start=1):
            if not text.strip():
                continue
            where = f"{path}:{number}"
            try:
                line = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON ({error.msg}). A pair file holds one JSON object a line.") from error
            if not isinstance(line, dict):
                raise ValueError(f"{where}: a JSON {type(line).__name__} instead of an object with the fields of a pair.")
            yield to_record(line, where=where, image_root=image_root)

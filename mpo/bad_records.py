"""The bad records of a run: each counted once, listed in its folder, and the run stopped when they are too many."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

FILE = "bad_records.jsonl"
MAX_BAD_FRACTION = 0.01
JUDGED_FROM = 100
"""Records: a share of fewer is taken of so many, or of the whole data set where that is smaller."""


class BadRecords:
    """What the collators of all ranks could not use (`mpo.packing.skipping`), by data set.

    The list has a line of JSON a record: ``where`` and ``reason``, and of those listed here also ``data``, ``id``, ``key`` and
    when. Lines of others (`mpo.data.load_preferences` lists what it could not read) stay in it.

    >>> bad = BadRecords("run", most=0.5, writes=False)
    >>> bad.see("train", 2, [{"id": "a", "where": "record 'a'", "reason": "no image.", "key": "17"}], step=1)
    >>> bad.see("train", 2, [{"id": "a", "where": "record 'a'", "reason": "no image.", "key": "17"}], step=2)
    >>> bad.settle({"train": 4})
    >>> bad.count("train")
    1

    Args:
        folder: of the run; the list is ``bad_records.jsonl`` there.
        most: the largest share of the records seen that may be bad.
        writes: whether this process writes the list.
        gather: gives every rank the items of all ranks; by default accelerate's.
    """

    def __init__(
        self, folder: str | Path, *, most: float, writes: bool, gather: Callable[[list[Any]], list[Any]] | None = None
    ) -> None:
        self.path = Path(folder) / FILE
        if gather is None:
            from accelerate.utils import gather_object  # not at the top: those who only read data do without torch

            gather = gather_object
        self._most, self._writes, self._gather = most, writes, gather
        self._forget()

    def _forget(self) -> None:
        self._listed: dict[tuple[str, str], dict[str, Any]] = {}  # by data set and key
        self._seen: dict[str, int] = {}
        self._new: list[dict[str, Any]] = []  # of this rank, since the last `settle`
        self._new_seen: dict[str, int] = {}

    def clear(self) -> None:
        """Begin a run: forget the records of an earlier one."""
        self._forget()
        self._rewrite()

    def see(self, data: str, seen: int, bad: Sequence[Mapping[str, Any]], **moment: Any) -> None:
        """Note what a batch of this rank was made of.

        Args:
            data: which data set it is from.
            seen: its records, those that only fill it up aside.
            bad: those of them that could not be used, as of `mpo.packing.skipping.sort_out`.
            moment: when; put into the list.
        """
        self._new_seen[data] = self._new_seen.get(data, 0) + seen
        self._new += [{"data": data, **entry, **moment} for entry in bad]

    def settle(self, sizes: Mapping[str, int | None]) -> None:
        """Bring together what all ranks saw, write the list, and judge it; every rank must call it.

        Args:
            sizes: records of each data set; None or missing for a stream.

        Raises:
            ValueError: on every rank, when more than the allowed share of the records seen are bad.
        """
        fresh: list[dict[str, Any]] = []
        for seen, new in self._gather([(self._new_seen, self._new)]):
            for data, count in seen.items():
                self._seen[data] = self._seen.get(data, 0) + count
            for entry in new:
                known = (entry["data"], entry["key"])
                if known not in self._listed:
                    self._listed[known] = entry
                    fresh.append(entry)
        self._new, self._new_seen = [], {}
        if self._writes and fresh:  # added, not written anew: workers that read a stream may be adding lines too
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(map(_line, fresh)))
        for data in self._seen:
            self._judge(data, sizes.get(data))

    def seen_again(self, data: str) -> None:
        """A data set is gone through once more: its records count as seen once, its bad ones stay listed."""
        self._seen[data] = 0

    def count(self, data: str) -> int:
        """Different bad records of a data set so far, over all ranks."""
        return sum(of == data for of, _ in self._listed)

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as plain values; call `settle` first."""
        return {"seen": self._seen, "listed": list(self._listed.values())}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on as of a checkpoint; what was listed after it will be met again."""
        self._forget()
        self._seen = dict(state["seen"])
        self._listed = {(entry["data"], entry["key"]): entry for entry in state["listed"]}
        self._rewrite()

    def _rewrite(self) -> None:
        """Bring the file in line with what is listed; before training, when nobody else adds to it."""
        if not self._writes:
            return
        there = self.path.read_text("utf-8").splitlines() if self.path.is_file() else []
        lines = [f"{line}\n" for line in dict.fromkeys(there) if not _is_own(line)]  # once, where several ranks added the same
        lines += map(_line, self._listed.values())
        if not lines:
            self.path.unlink(missing_ok=True)
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_suffix(".tmp")
        aside.write_text("".join(lines), encoding="utf-8")
        aside.replace(self.path)

    def _judge(self, data: str, size: int | None) -> None:
        bad = self.count(data)
        seen = self._seen[data] if size is None else min(self._seen[data], size)
        of = max(seen, JUDGED_FROM) if size is None else min(max(seen, JUDGED_FROM), size)
        if bad <= self._most * of:
            return
        first = [f"{entry['where']}: {entry['reason']}" for (name, _), entry in self._listed.items() if name == data][:3]
        raise ValueError(
            f"{bad} of the {seen} {data} records seen so far are bad, more than max_bad_fraction={self._most:g} allows. All are "
            f"listed in {self.path}; the first: {' | '.join(first)} Fix them, leave them out of the data, or raise "
            "max_bad_fraction."
        )


def _line(entry: Mapping[str, Any]) -> str:
    both = {name: entry[name] for name in ("where", "reason")}
    return json.dumps({**both, **entry}) + "\n"


def _is_own(line: str) -> bool:
    try:
        entry = json.loads(line)
    except ValueError:
        return False
    return isinstance(entry, dict) and {"data", "key"} <= entry.keys()

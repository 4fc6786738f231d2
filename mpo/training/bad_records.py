"""Bad records of a run: count each once, list them in the run's folder, and stop the run when there are too many."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from mpo.io import BAD_RECORDS, MIN_DENOMINATOR, write_text


class BadRecords:
    """Collect the records that the collators of all ranks could not use (`mpo.batching.batch`), by data set.

    They are listed as JSON lines with ``where`` and ``reason``, then ``data``, ``id``, ``key`` and when they were seen (``step``,
    in training also ``epoch``). Lines without ``data`` and ``key``, such as those of `mpo.data.load_preferences`, stay in the file.

    >>> bad = BadRecords("run", most=0.5, writes=False)
    >>> bad.see("train", 2, [{"id": "a", "where": "record 'a'", "reason": "no image.", "key": "17"}], step=1)
    >>> bad.see("train", 2, [{"id": "a", "where": "record 'a'", "reason": "no image.", "key": "17"}], step=2)
    >>> bad.settle({"train": 4})
    >>> bad.count("train")
    1

    Args:
        folder: folder of the run; the list is its ``bad_records.jsonl``.
        most: maximum fraction of the records seen that may be bad.
        writes: whether this process writes the list.
    """

    def __init__(self, folder: str | Path, *, most: float, writes: bool) -> None:
        self.path = Path(folder) / BAD_RECORDS
        self._most, self._writes = most, writes
        self._forget()

    def _forget(self) -> None:
        self._listed: dict[tuple[str, str], dict[str, Any]] = {}  # by data set and key
        self._seen: dict[str, int] = {}
        self._new: list[dict[str, Any]] = []  # of this rank, since the last `settle`
        self._new_seen: dict[str, int] = {}

    def clear(self) -> None:
        """Drop the records of an earlier run, in memory and in the file."""
        self._forget()
        self._rewrite()

    def see(self, data: str, seen: int, bad: Sequence[Mapping[str, Any]], **moment: Any) -> None:
        """Count the records of a batch of this rank, `seen` without padding, and the `bad` ones (`mpo.batching.batch.sort_out`).

        `moment` is when they were seen, for the list.
        """
        self._new_seen[data] = self._new_seen.get(data, 0) + seen
        self._new += [{"data": data, **entry, **moment} for entry in bad]

    def settle(self, sizes: Mapping[str, int | None]) -> None:
        """Gather the counts of all ranks, write the list, and check the bad fraction. Every rank must call it.

        Args:
            sizes: number of records of each data set; None or missing for a stream.

        Raises:
            ValueError: on every rank, when more than the allowed fraction of the records seen is bad.
        """
        fresh: list[dict[str, Any]] = []
        for seen, new in gather_object([(self._new_seen, self._new)]):
            for data, count in seen.items():
                self._seen[data] = self._seen.get(data, 0) + count
            for entry in new:
                known = (entry["data"], entry["key"])
                if known not in self._listed:
                    self._listed[known] = entry
                    fresh.append(entry)
        self._new, self._new_seen = [], {}
        if self._writes and fresh:  # append: workers that read a stream may append too
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(map(_line, fresh)))
        for data in self._seen:
            self._check_fraction(data, sizes.get(data))

    def seen_again(self, data: str) -> None:
        """Reset the number of records seen, for another pass over a data set. Its bad records stay listed."""
        self._seen[data] = 0

    def count(self, data: str) -> int:
        """Return the number of distinct bad records of a data set so far, over all ranks."""
        return sum(of == data for of, _ in self._listed)

    def state(self) -> dict[str, Any]:
        """Return plain values for a checkpoint. Call `settle` first."""
        return {"seen": self._seen, "listed": list(self._listed.values())}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint. Records listed after it are dropped, since the run will see them again."""
        self._forget()
        self._seen = dict(state["seen"])
        self._listed = {(entry["data"], entry["key"]): entry for entry in state["listed"]}
        self._rewrite()

    def _rewrite(self) -> None:
        if not self._writes:
            return
        there = self.path.read_text("utf-8").splitlines() if self.path.is_file() else []
        lines = [f"{line}\n" for line in dict.fromkeys(there) if not _is_own(line)]  # without the copies of several ranks
        lines += map(_line, self._listed.values())
        if not lines:
            self.path.unlink(missing_ok=True)
            return
        write_text(self.path, "".join(lines))

    def _check_fraction(self, data: str, size: int | None) -> None:
        bad = self.count(data)
        seen = self._seen[data] if size is None else min(self._seen[data], size)
        denominator = max(seen, MIN_DENOMINATOR) if size is None else min(max(seen, MIN_DENOMINATOR), size)
        if bad <= self._most * denominator:
            return
        first = [f"{entry['where']}: {entry['reason']}" for (name, _), entry in self._listed.items() if name == data][:3]
        raise ValueError(
            f"{bad} of the {seen} {data} records seen so far are bad, more than max_bad_fraction={self._most:g} allows. All are "
            f"listed in {self.path}; the first: {' | '.join(first)} Fix or remove these records, or raise "
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

"""Check the description of a mixture: its sources, how much to take of each, and files of both.

A source is a dict with the arguments of `load_preferences` and

    name          name of the source (default: the name of its file)
    repeat_time   how often its pairs are used: 0.1: a random tenth; 2.5: all of them twice and a random half (default 1)
    weight        its weight in the mixture, relative to the other weights, instead of repeat_time
    cap           maximum number of its pairs
    tiles         how its images are split into tiles: min, max, thumbnail; a record's own settings take precedence
    augment       whether its images are augmented in training; a record's own setting takes precedence
"""

from __future__ import annotations

import glob
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mpo.data.eval_part import check_eval
from mpo.data.meta import is_meta, one_object, read_meta
from mpo.data.records import checked_tiles
from mpo.data.video import checked_frames
from mpo.io import did_you_mean

Sampling = Literal["repeat_time", "weight", "sqrt"]
SAMPLINGS = ("repeat_time", "weight", "sqrt")
OWN = ("name", "repeat_time", "weight", "cap", "tiles", "augment")
"""Keys of a source that are not arguments of `load_preferences`, or not passed to it."""
LOAD_KEYS = (
    *("path", "format", "image_root", "split", "limit", "frames", "source", "on_bad_record", "max_bad_fraction", "bad_records"),
    *("num_proc", "seed"),
)
"""Arguments of `mpo.data.load_preferences` that a source may have."""
MIXTURES = (".yaml", ".yml")
FILE_KEYS = ("sources", "seed", "sampling", "size", "eval_size", "eval_by")


@dataclass(frozen=True)
class Source:
    """One checked source of a mixture; see the module docstring. ``load`` has the arguments of `load_preferences`."""

    name: str
    load: dict[str, Any]
    repeat_time: float = 1.0
    weight: float | None = None
    cap: int | None = None
    tiles: dict[str, Any] | None = None
    augment: bool | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Source:
        """Check the dict of a source.

        Raises:
            ValueError: for unknown keys, a missing path, and settings with an invalid value or type.
        """
        known = (*OWN, *LOAD_KEYS)
        if not isinstance(given, Mapping) or not isinstance(given.get("path"), (str, Path)) or not given["path"]:
            raise ValueError(
                f"A source of a mixture must have a path, which is text (optional: {', '.join(known)}); got {given!r}."
            )
        given = {key: value for key, value in given.items() if value is not None}
        name = str(given.get("name") or Path(str(given["path"])).stem)
        unknown = next((key for key in given if key not in known), None)
        if unknown is not None:
            meant = did_you_mean(unknown, known)
            raise ValueError(f"Source {name!r} has an unknown key {unknown!r}.{meant} Known keys: {', '.join(known)}.")
        for key in ("cap", "limit"):
            if key in given and not _is_whole(given[key], 1):
                raise ValueError(f"Source {name!r}: {key} must be a number of pairs, 1 or more; got {given[key]!r}.")
        for key in ("image_root", "format", "split"):
            if not isinstance(given.get(key, ""), (str, Path)):
                raise ValueError(f"Source {name!r}: {key} must be text; got {given[key]!r}.")
        if not isinstance(given.get("augment", False), bool):
            raise ValueError(f"Source {name!r}: augment must be true or false; got {given['augment']!r}.")
        for key in ("repeat_time", "weight"):
            number = given.get(key, 1)
            if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 < number < float("inf"):
                raise ValueError(f"Source {name!r}: {key} must be a number above 0; got {number!r}.")
        if "weight" in given and "repeat_time" in given:
            raise ValueError(f"Source {name!r} has a weight and a repeat_time, but only one of them can be used. Remove one.")
        load = {"source": name, **{key: value for key, value in given.items() if key not in OWN}}
        try:
            checked_frames(given.get("frames"))
            tiles = checked_tiles(given.get("tiles"))
        except ValueError as error:
            raise ValueError(f"Source {name!r}: {error}") from None
        own = {key: given[key] for key in ("repeat_time", "weight", "augment") if key in given}
        return cls(name, load, cap=given.get("cap"), tiles=tiles, **own)

    def rng(self, seed: int) -> np.random.Generator:
        """Make the random generator of this source, which is independent of other sources."""
        return np.random.default_rng([seed, zlib.crc32(self.name.encode())])


def check_sources(sources: Sequence[Mapping[str, Any]]) -> list[Source]:
    """Check the dicts of sources.

    Raises:
        ValueError: as in `Source.of`, and for no sources or two with the same name.
    """
    checked = [Source.of(source) for source in sources]
    if not checked:
        raise ValueError("A mixture needs at least one source. Add one to sources.")
    names = [source.name for source in checked]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"Two sources are called {twice!r}. Set different names (name: ...).")
    return checked


def check_settings(
    sources: Sequence[Source],
    *,
    seed: Any = 0,
    sampling: Any = None,
    size: Any = None,
    eval_size: Any = None,
    eval_by: Any = "both",
) -> Sampling:
    """Check the settings of a mixture and return its sampling; arguments as in `mix`.

    Raises:
        ValueError: for settings that are invalid or cannot be combined.
    """
    chosen = _sampling(sources, sampling)
    if not _is_whole(seed, 0):
        raise ValueError(f"seed must be a whole number of 0 or more; got {seed!r}.")
    if size is not None and (chosen == "repeat_time" or not _is_whole(size, 1)):
        raise ValueError(
            f"size={size!r} with sampling={chosen}: size must be a whole number of 1 or more, and is only for sampling=weight or "
            "sqrt. Leave it out for sampling=repeat_time."
        )
    if eval_size is not None:
        check_eval(eval_size, eval_by)
    return chosen


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _sampling(sources: Sequence[Source], sampling: Any) -> Sampling:
    weighted = any(source.weight is not None for source in sources)
    if sampling is None:
        return "weight" if weighted else "repeat_time"
    if sampling not in SAMPLINGS:
        raise ValueError(f"sampling must be one of {', '.join(SAMPLINGS)}, or null; got {sampling!r}.")
    if weighted and sampling != "weight":
        raise ValueError(f"sampling={sampling} does not use the sources' weights. Remove them, or set sampling=weight.")
    return sampling  # type: ignore[no-any-return]  # checked above


def weights_of(sources: Sequence[Source]) -> list[float]:
    """Return the weights of sources that all have one.

    Raises:
        ValueError: for a source without a weight.
    """
    lacking = [source.name for source in sources if source.weight is None]
    if lacking:
        raise ValueError(
            f"Source {lacking[0]!r} has no weight, but others have one. Set it for every source of the mixture, or for none."
        )
    return [float(source.weight) for source in sources if source.weight is not None]


# Files


def is_mixture(path: str | Path) -> bool:
    """Whether a file is a mixture file: by its ending, or as a JSON object with a list of sources."""
    if os.fspath(path).lower().endswith(MIXTURES):
        return True
    sources = one_object(path).get("sources")
    return isinstance(sources, list) and all(isinstance(source, Mapping) for source in sources)


def read_mixture(path: str | Path, *, within: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read the arguments of `mix` from a file: YAML or JSON with a list ``sources`` and settings, or MMPR's meta.json.

    Paths and patterns are relative to the file's folder if they exist there. Settings that are null are left out.

    Args:
        path: the file.
        within: the mixtures that contain this one, the outermost first.

    Raises:
        ValueError: for a missing or invalid file, unknown keys, sources and settings that `mix` refuses, and a mixture that
            contains itself.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"There is no file {path}. Set data.mix to a YAML or JSON file of sources.")
    if is_meta(path):
        return {"sources": [spec.as_source() for spec in read_meta(path)], "sampling": "repeat_time"}
    import yaml

    try:
        text = path.read_text("utf-8-sig")
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is neither YAML nor JSON ({' '.join(str(error).split())}). Fix the file.") from error
    settings = {"sources": found} if isinstance(found, list) else found
    if not isinstance(settings, dict) or not isinstance(settings.get("sources"), list):
        raise ValueError(f"{path} must have a list of sources, or 'sources' with such a list; got {type(found).__name__}.")
    unknown = [key for key in settings if key not in FILE_KEYS]
    if unknown:
        raise ValueError(f"{path} has unknown keys {unknown}. Known keys: {', '.join(FILE_KEYS)}.")
    settings = {key: value for key, value in settings.items() if value is not None}
    settings["sources"] = [_beside(path.parent, source) for source in settings["sources"]]
    try:
        check_settings(check_sources(settings["sources"]), **{key: settings[key] for key in FILE_KEYS[1:] if key in settings})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    _refuse_cycle(path, settings["sources"], within)
    return settings


def _refuse_cycle(path: Path, sources: Sequence[Mapping[str, Any]], within: tuple[Path, ...]) -> None:
    """Follow sources that are mixtures themselves, and refuse one that contains itself."""
    within = (*within, path.resolve())
    for source in sources:
        place = Path(source["path"]).expanduser()
        if place.resolve() in within:
            raise ValueError(
                f"{path} has {place} as a source, which contains {path} itself. Replace it by a file of preference pairs."
            )
        if is_mixture(place):
            read_mixture(place, within=within)


def refuse_beside_mixture(path: str | Path, **settings: Any) -> None:
    """Refuse settings of a single source for a whole mixture.

    Raises:
        ValueError: for the first setting that is not None.
    """
    for name, value in settings.items():
        if value is not None:
            raise ValueError(
                f"{path} is a mixture, whose sources have their own {name}; got {name}={value}. Set it for each source in the file."
            )


def _beside(folder: Path, source: Any) -> Any:
    if not isinstance(source, dict):
        return source
    places = {key: folder / str(source[key]) for key in ("path", "image_root") if source.get(key)}
    return {
        **source,
        **{key: str(place) for key, place in places.items() if place.exists() or glob.glob(str(place), recursive=True)},
    }

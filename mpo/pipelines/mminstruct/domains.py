"""The domains of images: what each is about, queries that find its images, and seed questions of four types in two languages.

Our domains are in ``domains.yaml``, a user's in a YAML file each; prompts and answer-style suffixes are in ``prompts.yaml``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import yaml
from jinja2 import StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from mpo.io import did_you_mean

TYPES = ("judgement", "choice", "long", "short")
ASKED = (*TYPES, "dialogue")
"""What can be asked for: a dialogue's rounds are instructions of the types without options."""
LANGUAGES = ("en", "zh")
OURS = Path(__file__).with_name("domains.yaml")
PLACEHOLDER = re.compile(r"<([^<>]*)>")
"""What a seed question leaves open, such as ``<object>``: the model that writes questions replaces it."""
Type = Literal["judgement", "choice", "long", "short"]
Asked = Literal["judgement", "choice", "long", "short", "dialogue"]
Language = Literal["en", "zh"]
Text = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]


class Domain(BaseModel):
    """A domain.

    Attributes:
        about: what its images show or its questions ask about, by language.
        queries: English texts by which images are found (`mpo.pipelines.mminstruct.retrieve`).
        placeholders: further names of placeholders.
        seeds: questions by type and language.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    about: dict[Language, Text]
    queries: list[Text] = []
    placeholders: list[Text] = []
    seeds: dict[Type, dict[Language, Annotated[list[Text], Field(min_length=1)]]]

    @model_validator(mode="after")
    def _check(self) -> Domain:
        if {*self.about} != {*LANGUAGES}:
            raise ValueError("about needs a text in en and in zh")
        known = {*prompts()["placeholders"], *self.placeholders}
        for type, language in product(TYPES, LANGUAGES):
            if not (texts := self.questions(type, language)):
                raise ValueError(f"there are no seeds for {type}: {language}")
            for found in (name for text in texts for name in PLACEHOLDER.findall(text) if name not in known):
                raise ValueError(f"unknown placeholder <{found}>.{did_you_mean(found, known)} List it under placeholders")
        return self

    def questions(self, type: str, language: str) -> list[str]:
        """The seed questions of a type in a language; of a dialogue, those without options."""
        own = [one for one in TYPES if one != "choice"] if type == "dialogue" else [type]
        return [text for one in own for text in self.seeds.get(one, {}).get(language, [])]  # type: ignore[call-overload]


def load_domains(paths: Iterable[str | Path] = ()) -> dict[str, Domain]:
    """Load our 24 domains, and those of a user, whose name is that of the file.

    Args:
        paths: YAML files, or folders of them. One with the name of one of ours takes its place.

    Raises:
        ValueError: for a file that is missing or no domain, naming the key.
    """
    found: dict[str, Path] = {}
    for path in map(Path, paths):
        files = sorted(path.glob("*.y*ml")) if path.is_dir() else [path] if path.exists() else []
        if not files:
            said = f"{path} has no YAML file. Give that of" if path.is_dir() else f"There is no file {path}. Give the YAML file of"
            raise ValueError(f"{said} a domain, or a folder of such files.")
        for file in files:
            if (other := found.setdefault(file.stem, file)) != file:
                raise ValueError(f"Two domains are called {file.stem!r}: {other} and {file}. Rename one of the files.")
    return _ours() | {name: _read(file, file.stat().st_mtime_ns) for name, file in found.items()}


@cache
def _ours() -> dict[str, Domain]:
    given = yaml.safe_load(OURS.read_text(encoding="utf-8"))
    return {name: Domain.model_validate(one) for name, one in given.items()}


@cache
def _read(file: Path, changed: int) -> Domain:
    try:
        return Domain.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid YAML: {error}. Fix the file.") from None
    except ValidationError as error:
        one = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")  # a misspelt name says why another is missing
        place = ".".join(str(part) for part in one["loc"] if part != "[key]") or "the file"
        if one["type"] == "extra_forbidden":
            known = [*Domain.model_fields]
            raise ValueError(f"{file}: unknown key {place!r}.{did_you_mean(place, known)} Keys are {', '.join(known)}.") from None
        raise ValueError(f"{file}: {place}: {one['msg'].removeprefix('Value error, ')}; got {one['input']!r:.80}.") from None


def check_domain(name: Any, domains: Mapping[str, Domain], where: str) -> str:
    """Return the name of a domain as it is known: spaces and hyphens are underscores. Raises ValueError for an unknown one."""
    found = re.sub(r"[\s-]+", "_", name.strip().lower()) if isinstance(name, str) else name
    for known in domains:
        if found in (known, known.lower()):
            return known
    advice = did_you_mean(found, domains) or f" Domains: {', '.join(domains)}."
    raise ValueError(f"{where}: unknown domain {name!r}.{advice} A new one is a YAML file (docs/mminstruct.md).")


@cache
def prompts() -> dict[str, Any]:
    """The file of prompts."""
    return cast(dict[str, Any], yaml.safe_load(Path(__file__).with_name("prompts.yaml").read_text(encoding="utf-8")))


def prompt(*place: str, **values: Any) -> str:
    """Render a prompt of ``prompts.yaml``, by its keys."""
    found: Any = prompts()
    for key in place:
        found = found[key]
    return _compiled(found).render(**values).strip()


def without_placeholders(text: str) -> str:
    """A prompt in which OCR text and tags are material: a placeholder of an image in them is none."""
    return re.sub(r"<(image|video)>", r"[\1]", text)


_compiled = cache(ImmutableSandboxedEnvironment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string)

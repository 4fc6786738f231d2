"""The configuration of `mpo mmpr make`, a YAML file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mpo.generation.generator import is_server
from mpo.io import did_you_mean
from mpo.pipelines.mmpr.pair import MAX_PAIRS

Whole = Annotated[int, Field(ge=1, strict=True)]
Seed = Annotated[int, Field(ge=0, strict=True)]
Share = Annotated[float, Field(ge=0, le=1)]


class Group(BaseModel):
    """A group of keys; any other is refused."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


Read = TypeVar("Read", bound=Group)


class Model(Group):
    """A folder or a name on the Hub, with arguments of `open_local`, or a server's address, with those of `ServerGenerator`."""

    model: str
    name: str | None = None  # in the output
    model_name: str | None = None  # on a server with several
    max_tiles: Whole | None = None  # of an image
    base: str | None = None
    device: str | None = None
    dtype: str | None = None
    concurrency: Whole | None = None
    kind: str | None = None
    prices: tuple[float, float] | None = None
    template: str | None = None
    extra: dict[str, Any] | None = None


class Until(Group):
    """Sample again, up to `limit` of each model, where a question has fewer right or fewer wrong responses."""

    right: Whole = 1
    wrong: Whole = 1
    limit: Whole = 32


class Sampling(Group):
    """Arguments of `Sample`."""

    prompt: str = "en"
    n: Whole = 8
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_p: float = 1.0
    top_k: Seed = 0
    max_new_tokens: Whole = 1024
    seed: Seed = 0
    until: Until | None = None


class Source(Group):
    """A file of questions, and what is special about it. Without a route, it depends on whether the answer is known."""

    path: str
    name: str | None = None
    image_root: str | None = None
    limit: Whole | None = None
    route: Literal["correctness", "open", "both"] | None = None
    max_tiles: Whole | None = None
    sample: Sampling = Sampling()


class Verifying(Group):
    """Arguments of `Verify`."""

    format: str | None = None
    kind: str | None = None
    tolerance: float | None = None


class Pairing(Group):
    """Arguments of `Pair`."""

    max_pairs: Whole = MAX_PAIRS
    accuracy: tuple[Share, Share] = (0.0, 1.0)
    rewrite: bool = False
    seed: Seed = 0


class Continuing(Group):
    """Arguments of `Continue`, and the prompt of the response; it is sampled as ``sample`` says."""

    ratio: Annotated[float, Field(ge=0, lt=1)] = 0.5
    with_image: bool = False
    prompt: str = "plain"


class Config(Group):
    """What `mpo mmpr make` does."""

    sources: Annotated[list[Source], Field(min_length=1)]
    models: Annotated[list[Model], Field(min_length=1)]
    sample: Sampling = Sampling()
    verify: Verifying = Verifying()
    pair: Pairing = Pairing()
    continue_: Continuing = Field(Continuing(), alias="continue")
    formats: list[Literal["trl", "swift"]] = []  # to write beside MMPR's
    rounds: Whole = 1
    train: list[str] = []  # words of mpo train, between rounds


def read_config(path: str | Path) -> Config:
    """Read a configuration. Paths are relative to its folder if they exist there.

    Raises:
        ValueError: for a file that is no YAML; for each key that is unknown, missing, or has a wrong value; for names
            that are there twice; and for rounds with anything but one local model.
    """
    config = read_yaml(path, Config)
    for model in config.models:
        model.name = model.name or (None if is_server(model.model) else Path(model.model).name)
    for group in (*config.sources, *config.models):
        for name, value in group:
            if name in ("path", "image_root", "model", "base", "template") and value and (Path(path).parent / value).exists():
                setattr(group, name, str((Path(path).parent / value).absolute()))
    names = [file_name(source.name or Path(source.path).name.split(".")[0]) for source in config.sources]
    for source, name in zip(config.sources, names, strict=True):
        source.name = name
    for what, called in (("sources", names), ("models", [model.name for model in config.models if model.name])):
        if twice := next((name for name in called if called.count(name) > 1), None):
            raise ValueError(f"{path}: two {what} are called {twice!r}. Give them names.")
    if config.train and config.rounds == 1:
        raise ValueError(f"{path}: train={config.train} needs rounds of 2 or more: one round makes pairs and trains nothing.")
    if config.rounds > 1 and (len(config.models) > 1 or is_server(config.models[0].model)):
        raise ValueError(f"{path}: rounds={config.rounds} needs one model, which it trains and loads again; give its folder.")
    return config


def read_yaml(path: str | Path, kind: type[Read]) -> Read:
    """Read a YAML file as a group. Raises ValueError for no YAML, and for keys that are unknown, missing, or have a wrong value."""
    try:
        return kind.model_validate(OmegaConf.to_container(OmegaConf.load(path), resolve=True))
    except FileNotFoundError:
        raise ValueError(f"There is no file {path}. Give a YAML file.") from None
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}. Fix the file.") from None
    except ValidationError as error:
        raise ValueError(f"{path}: " + " ".join(_said(one, kind) for one in error.errors())) from None


def _said(error: Any, kind: type[Group]) -> str:
    place = ".".join(map(str, error["loc"])) or "the file"
    if error["type"] != "extra_forbidden":
        return f"{place}: {error['msg']}; got {error['input']!r:.80}."
    groups = {kind}
    for part in error["loc"][:-1]:
        inner = (field.annotation for group in groups for name, field in group.model_fields.items() if part in (name, field.alias))
        groups = {group for one in inner for group in _groups(one)} or groups
    known = {one.alias or name for group in groups for name, one in group.model_fields.items()}
    return f"{place}: unknown key {error['loc'][-1]!r}.{did_you_mean(error['loc'][-1], known)} Keys: {', '.join(sorted(known))}."


def _groups(annotation: Any) -> list[type[Group]]:
    """The groups in the type of a field."""
    if isinstance(annotation, type) and issubclass(annotation, Group):
        return [annotation]
    return [group for one in get_args(annotation) for group in _groups(one)]


def file_name(text: str) -> str:
    """A text as the start of a file's name, which has 255 bytes at most."""
    return re.sub(r"[^\w.-]", "_", text)[:60]

"""The configuration of `mpo mminstruct make`, a YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from mpo.pipelines.mminstruct.domains import TYPES, Asked, Language
from mpo.pipelines.mmpr.config import Group, Model, Seed, Whole, file_name, read_yaml

Price = Annotated[float, Field(ge=0)]


class Images(Group):
    """A folder or data set of images. With `retrieve`, only those that its queries find, so many for each."""

    path: str
    name: str | None = None
    domain: str | None = None  # of all; folder: names of folders; prompt: a model is asked; query: by the query that finds an image
    licence: str | None = None
    origin: str | None = None
    limit: Whole | None = None
    retrieve: Whole | None = None
    queries: list[str] = []  # by default those of its domain, or of all domains


class Collecting(Group):
    """What is collected, the model that names domains, and the CLIP-like model of the index."""

    min_side: Whole = 64
    near: bool = True
    model: Model | None = None
    clip: str | None = None


class Sampling(Group):
    """A model with the settings of `mpo.generation.generator.Generator.generate`."""

    model: Model
    temperature: Annotated[float, Field(ge=0)] = 0.7
    top_p: float = 1.0
    max_new_tokens: Whole = 1024
    seed: Seed = 0

    def sampling(self) -> dict[str, Any]:
        """The settings."""
        return {name: getattr(self, name) for name in Sampling.model_fields if name != "model"}


class Captioning(Sampling):
    """Arguments of `Caption`, and how often it asks."""

    attempts: Whole = 2
    max_side: Whole | None = 512
    shortest: dict[Literal["en", "zh", "ocr"], Whole] = {}


class Generating(Sampling):
    """Arguments of `Seed` and `Generate`."""

    rounds: Whole = 1
    seeds: Annotated[int, Field(ge=0)] = 3
    counts: dict[Asked, Whole] = {}
    form: Literal["tags", "json", "auto"] = "auto"
    max_new_tokens: Whole = 2048


class Asking(Group):
    """The model of `Blind` or `Agree`; without one, that of `generate`."""

    model: Model | None = None
    n: Whole = 3  # of Blind
    seed: Seed = 0


class Expanding(Group):
    """A public set (`mpo.pipelines.mminstruct.expand`)."""

    set: str
    path: str
    name: str | None = None
    image_root: str | None = None
    domain: str | None = None
    licence: str | None = None
    fields: dict[str, str] = {}
    limit: Whole | None = None


class Config(Group):
    """What `mpo mminstruct make` does."""

    images: list[Images] = []
    languages: Annotated[list[Language], Field(min_length=1)] = ["en"]
    types: Annotated[list[Asked], Field(min_length=1)] = [*TYPES]  # type: ignore[list-item]
    domains: list[str] = []  # files of further ones
    collect: Collecting = Collecting()
    caption: Captioning | None = None
    generate: Generating | None = None
    blind: Asking | None = Asking()  # null turns it off
    judge: Asking | None = Asking()
    expand: list[Expanding] = []
    turns: Whole = 1  # instructions of a conversation
    manual_price: Price | None = None  # of an instruction that people write
    seed: Seed = 0


def read_config(path: str | Path) -> Config:
    """Read a configuration. Paths are relative to its folder if they exist there.

    Raises:
        ValueError: as `read_yaml`; and for images without models for them, or nothing to make instructions of.
    """
    config = read_yaml(path, Config)
    asked = (config.caption, config.generate, config.blind, config.judge, config.collect)
    models = [one.model for one in asked if one is not None and one.model is not None]

    def near(given: str) -> str:
        here = Path(path).parent / given
        return str(here.absolute()) if here.exists() else given

    for group in (*config.images, *config.expand, *models, config.collect):
        for name in ("path", "image_root", "model", "base", "template", "clip"):
            if isinstance(value := getattr(group, name, None), str) and value:
                setattr(group, name, near(value))
    config.domains = [*map(near, config.domains)]
    if not config.images and not config.expand:
        raise ValueError(f"{path}: it has neither images nor expand. Give a folder of images, or a public set.")
    lacks: Any = {
        "caption": config.images and config.caption is None,
        "generate": config.images and config.generate is None,
        "collect.model": any(one.domain == "prompt" for one in config.images) and config.collect.model is None,
        "collect.clip": any(one.retrieve or one.domain == "query" for one in config.images) and config.collect.clip is None,
    }
    if lost := [name for name, missing in lacks.items() if missing]:
        raise ValueError(f"{path}: images need {lost[0]}, with a model. Add it.")
    if wrong := [one.path for one in config.images if one.domain == "query" and not one.retrieve]:
        raise ValueError(f"{path}: domain: query of {wrong[0]} needs retrieve, the number of images for each query. Add it.")
    names = [file_name(one.name or one.set) for one in config.expand]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{path}: two sets of expand are called {twice[0]!r}. Give one another name.")
    return config

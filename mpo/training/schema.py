"""The keys of a training job and their types. pydantic checks values as they are: text is not a number, nor 1 a yes or no."""

import types
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal, TypedDict, Union, get_args, get_origin, get_type_hints, is_typeddict

from pydantic import ConfigDict, Field, PydanticUserError, TypeAdapter, ValidationError

from mpo.io import did_you_mean

Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Path = str
Part = Literal["train", "freeze", "lora"] | int | None
DATA_NAMES = ("meta", "mix")
"""Names that data groups give to their path."""


class Tiles(TypedDict, total=False):
    """How images are split into tiles."""

    min: Positive | None
    max: Positive | None
    thumbnail: bool | None


class Frames(TypedDict, total=False):
    """Number of frames of a video."""

    min: Positive | None
    max: Positive | None


class Data(TypedDict, total=False):
    """Arguments of `mpo.data.load_preferences` for the training data, and with ``eval_`` for the evaluation data."""

    path: Path | None
    meta: Path | None  # names that data groups give to their path
    mix: Path | None
    format: str | None
    image_root: Path | None
    split: str | None
    limit: Positive | None
    tiles: Tiles | None
    frames: Frames | None
    source: str | None
    metadata: list[str] | None
    on_bad_record: str | None
    max_bad_fraction: Share | None
    bad_records: Path | None
    streaming: bool
    num_proc: Positive | None
    seed: NotNegative | None
    eval_path: Path | None
    eval_image_root: Path | None
    eval_split: str | None
    eval_format: str | None


class Conversations(Data, total=False):
    """Likewise, of `mpo.data.load_conversations`."""

    from_preferences: bool


class Fuser(TypedDict, total=False):
    """Arguments of `mpo.models.add_fuser`; without layers, no fuser is added."""

    layers: Positive | list[int] | None
    fusion: Literal["mmfuser", "concat"]
    num_heads: Positive
    num_points: Positive


class Model(TypedDict, total=False):
    """Arguments of `mpo.models.loading.load_model`."""

    _target_: str
    name_or_path: Path
    dtype: Any  # checked by `mpo.models.loading.as_dtype`
    attn_implementation: str | None
    min_tiles: Positive | None
    max_tiles: Positive | None
    thumbnail: bool | None
    trust_remote_code: bool


class Launch(TypedDict, total=False):
    """Nodes and ranks (`mpo.training.launch.place`)."""

    nproc_per_node: Positive | None
    nnodes: Positive | None
    node_rank: NotNegative | None
    master_addr: str | None
    master_port: Annotated[int, Field(ge=1, le=65535)] | None


class Samples(TypedDict, total=False):
    """Prompts, arguments of `mpo.training.samples.callback.SampleResponses`, and questions for `MeasureAccuracy`."""

    path: Path | None
    image_root: Path | None
    questions: Path | None
    mode: Literal["direct", "cot"]
    count: NotNegative
    every: Any  # checked by `check_sampling`, like the two below
    max_new_tokens: int
    temperature: float


class Job(TypedDict, total=False):
    """The keys of ``recipes/train.yaml`` and ``recipes/sft.yaml`` whose value is not a group."""

    task: str
    run_dir: Path
    resume: Any  # checked by `TrainJob.checkpoint`
    seed: NotNegative
    chat_template: str | None
    drop_path: Annotated[float, Field(ge=0, lt=1)]
    dry_run: bool
    dry_run_gpu_gb: Rate | None
    dry_run_records: Positive | None


KINDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a group of keys",
    list: "a list",
    type(None): "null",
}


@cache
def hints(schema: type) -> Mapping[str, Any]:
    """The keys of a TypedDict or dataclass, with the types of their values."""
    return get_type_hints(schema, include_extras=True)


def check_data(kind: type, given: Any) -> None:
    """Check the keys of a data group, `Data` or `Conversations`, and that it names a data set.

    Raises ValueError as `check_keys`, or for a path that is not set.
    """
    check_keys(hints(kind), given, "data")
    if given.get("path") in (None, "???"):
        name = next((name for name in DATA_NAMES if name in given), "path")
        raise ValueError(f"data.{name} is not set. Add data.{name}=... to the command.")


def check_keys(known: Mapping[str, Any], given: Any, where: str) -> None:
    """Check the keys of a group and the types of their values.

    Args:
        known: key -> type.
        given: the group.
        where: its name in messages; empty for the top of the configuration.

    Raises:
        ValueError: naming the first unknown key with its closest match, or the key with a value of another type.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"{where} must be a group of keys; got {given!r}.")
    for key, value in given.items():
        if key not in known:
            raise ValueError(f"Unknown key {key!r} in {where or 'the configuration'}.{did_you_mean(str(key), known, most=20)}")
        _check_value(known[key], value, f"{where}.{key}" if where else key)


def _check_value(kind: Any, value: Any, name: str) -> None:
    nested = next((part for part in (kind, *get_args(kind)) if is_typeddict(part)), None)
    if nested is not None and value is not None:
        return check_keys(hints(nested), value, name)
    if nested is not None:
        return None
    try:
        TypeAdapter(kind, config=ConfigDict(strict=True, arbitrary_types_allowed=True)).validate_python(value)
    except PydanticUserError:  # a type that pydantic cannot check
        return None
    except ValidationError as error:
        if isinstance(value, int | float) and not isinstance(value, bool) and {str} == {*_parts(kind)} - {type(None)}:
            return None  # YAML takes run_name=2026 for a number
        limits = [
            one["msg"].removeprefix("Input should be ") for one in error.errors() if not one["type"].endswith(("_type", "_error"))
        ]
        expected = limits[0] if limits else _described(kind)
        raise ValueError(f"{name} must be {expected}; got {value!r}.") from None


def _parts(kind: Any) -> list[Any]:
    if get_origin(kind) is Annotated:
        return _parts(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        return [part for member in get_args(kind) for part in _parts(member)]
    return [kind]


def _described(kind: Any) -> str:
    words: list[str] = []
    for part in _parts(kind):
        if get_origin(part) is Literal:
            words += map(repr, get_args(part))
        else:
            words.append(KINDS.get(get_origin(part) or part) or ("a group of keys" if is_typeddict(part) else "text"))
    return " or ".join(dict.fromkeys(words))

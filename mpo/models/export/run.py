"""Export a trained checkpoint: merge, cast, write, load again, compare."""

import gc
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig

from mpo.io import atomic_folder, refuse_existing
from mpo.models.export.trained import NEW_ROWS, Trained, merged, open_trained, standard_names
from mpo.models.export.trial import Comparison, Trial
from mpo.models.family import INTERNVL
from mpo.models.fit import missing_rows
from mpo.models.loading import official_folder
from mpo.models.official.checkpoint import read_config, read_official
from mpo.models.official.convert import ORIGINAL, check_same_model, checked_difference, to_official
from mpo.models.official.names import expected_shapes
from mpo.models.official.tensors import TensorFiles, bytes_of
from mpo.models.strict import check_shapes, read_json

Form = Literal["transformers", "official"]


@dataclass(frozen=True)
class Export:
    """The result of an export."""

    folder: Path  # the exported folder
    form: Form  # its format
    dtype: str  # dtype of its weights, such as ``"bfloat16"``
    tensors: int  # number of tensors
    files: int  # number of weight files
    bytes: int  # their total size
    base: str | None  # name or path of the base that an adapter was merged into; None for a full model
    comparison: Comparison | None  # comparison with the trained model; None if not compared
    official_difference: float | None  # difference of logits of both formats, relative to the largest; None if not compared


def export(
    source: Path,
    target: Path,
    *,
    base: str | None = None,
    form: Form = "transformers",
    dtype: str | torch.dtype = "auto",
    shard_gb: float = 5.0,
    like: Path | None = None,
    check: bool = True,
    progress: bool = True,
) -> Export:
    """Export a trained checkpoint to a folder for loading and serving.

    An adapter is merged in the export dtype: base + scaling * B A, computed in float32 and rounded. The adapter of a
    QLoRA run is merged into the unquantised base: the result is not the model that was trained, on weights rounded to 4 bits, but
    the same adapter on more precise weights, and is compared as such.

    Peak memory: the model once in the export dtype, one layer in float32, and one weight file; the trained model is freed before
    the exported one is loaded. The official format is compared as by `convert`, in float32, if memory allows; writing it needs
    twice its size on disk.

    Args:
        source: folder written by `mpo train` or `MPOTrainer.save_model`, or a checkpoint of a run.
        target: a new folder. It appears only when complete and compared.
        base: name or path of the checkpoint it was trained from, in either format; by default that of adapter_config.json.
        form: ``"transformers"`` or ``"official"``.
        dtype: as in `load_internvl`; ``"auto"`` for that of the checkpoint, or of the adapter's base.
        shard_gb: the largest size of a weight file, in gigabytes.
        like: for the official format: an official folder whose config, tokenizer and Python files are copied; by default the base.
        check: load the folder again and compare the logits of both models on a question.

    Raises:
        ValueError: for a source that cannot be exported, before anything is written; for a result that differs from the model.
    """
    refuse_existing(target)
    shard_bytes = bytes_of(shard_gb)
    if like is not None and form != "official":
        raise ValueError(f"--like={like} needs the official format. Add --output-format official.")
    trained = open_trained(source, base=base)
    original = _original(trained, like) if form == "official" else None
    processor = trained.processor()
    model = trained.load(dtype)
    _check_rows(source, trained, model, processor)
    trial = Trial.of(model, processor, moves=not trained.residual) if check else None
    if trial is not None and trial.moved == 0 and trained.must_change_logits:
        raise ValueError(f"The adapter in {source} does not change the base's logits. Check the learning rate and the folder.")
    model = merged(model, progress=progress)
    with atomic_folder(target) as partial:
        ours = partial if form == "transformers" else partial / "merged"
        _save(model, processor, ours, shard_bytes)
        name = str(model.dtype).removeprefix("torch.")
        del model
        gc.collect()  # peft's layers and their base layers are reference cycles
        comparison = None if trial is None else trial.compare(ours)
        difference = None if original is None else _to_official(original, ours, partial, shard_bytes, check, progress)
        sizes = [path.stat().st_size for path in partial.glob("*.safetensors")]
        tensors = len(TensorFiles(partial).names())
    merged_into = None if trained.adapter is None else trained.weights
    return Export(target, form, name, tensors, len(sizes), sum(sizes), merged_into, comparison, difference)


def _save(model: Any, processor: Any, folder: Path, shard_bytes: int) -> None:
    """Write a merged model and its processor; an InternVL with the names that the official format and servers expect."""
    is_internvl = model.config.model_type in INTERNVL.types
    if is_internvl:
        standard_names(model)
    model.save_pretrained(folder, max_shard_size=shard_bytes)
    processor.save_pretrained(folder)
    if is_internvl:  # loading the folder does not check that its names are the standard ones
        check_shapes(TensorFiles(folder).shapes(), expected_shapes(AutoConfig.from_pretrained(folder)), str(folder))


def _check_rows(source: Path, trained: Trained, model: Any, processor: Any) -> None:
    if missing := missing_rows(model, processor):
        resize = "Call model.resize_token_embeddings(len(tokenizer)) before training, and train again."
        fix = resize if trained.adapter is None else NEW_ROWS
        raise ValueError(f"{trained.weights} cannot be exported with the tokenizer of {source}: {missing}. {fix}")


def _original(trained: Trained, like: Path | None) -> tuple[dict[str, Any], Path | None]:
    if trained.config.model_type not in INTERNVL.types:
        raise ValueError(f"The official format exists for InternVL alone; {trained.weights} is a {trained.config.model_type}.")
    config, folder = (read_official(like, "--like="), like) if like is not None else _official_config(trained)
    check_same_model(config, trained.config, f"{folder or Path(trained.weights) / ORIGINAL} as --like", trained.weights)
    return config, folder


def _to_official(
    original: tuple[dict[str, Any], Path | None], ours: Path, target: Path, shard_bytes: int, check: bool, progress: bool
) -> float | None:
    """Replace a folder in transformers' format by one in the official format. Return how much their logits differ, if compared."""
    config, folder = original
    (ours / ORIGINAL).write_text(json.dumps(config))
    to_official(ours, target, folder, shard_bytes, progress)
    difference = checked_difference(target, ours, None if check else False)
    shutil.rmtree(ours)
    return difference


def _official_config(trained: Trained) -> tuple[dict[str, Any], Path | None]:
    for place in filter(None, (trained.weights, trained.base)):
        if (folder := official_folder(place)) is not None:
            return read_config(folder), folder
        if (Path(place) / ORIGINAL).exists():
            return read_json(Path(place) / ORIGINAL), None
    raise ValueError(
        f"The official format needs the official config.json, which {trained.weights} does not have. Give a folder of the official "
        "checkpoint with --like, with or without its weights: hf download OpenGVLab/InternVL3-8B --exclude '*.safetensors' "
        "--local-dir DIR."
    )

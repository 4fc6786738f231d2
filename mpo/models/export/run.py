"""Export a trained checkpoint: merge, cast, write, load again, compare."""

import copy
import gc
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig

from mpo.io import atomic_folder, refuse_existing
from mpo.models.export.trained import Trained, merged, open_trained
from mpo.models.export.trial import Comparison, Trial
from mpo.models.fit import missing_rows
from mpo.models.loading import official_folder
from mpo.models.official.checkpoint import read_config
from mpo.models.official.config import is_official, transformers_config
from mpo.models.official.convert import ORIGINAL, checked_difference, to_official
from mpo.models.official.expected import check_shapes, expected_shapes
from mpo.models.official.tensors import TensorFiles

Form = Literal["transformers", "official"]


@dataclass(frozen=True)
class Export:
    """The result of an export.

    Attributes:
        folder: the exported folder.
        form: its format.
        dtype: dtype of its weights, such as ``"bfloat16"``.
        tensors: number of tensors.
        files: number of weight files.
        bytes: their total size.
        base: name or path of the base that an adapter was merged into; None for a full model.
        comparison: comparison with the trained model; None if not compared.
        official_difference: the largest difference of logits between both formats, relative to the largest logit; None if not
            compared.
    """

    folder: Path
    form: Form
    dtype: str
    tensors: int
    files: int
    bytes: int
    base: str | None
    comparison: Comparison | None
    official_difference: float | None


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
        progress: show progress bars.

    Raises:
        ValueError: for a source that cannot be exported, before anything is written; for a result that differs from the trained
            model.
    """
    refuse_existing(target)
    if shard_gb <= 0:
        raise ValueError(f"Expected a file size in gigabytes above 0; got --shard-gb={shard_gb:g}.")
    if like is not None and form != "official":
        raise ValueError(f"--like={like} needs the official format. Add --output-format official.")
    trained = open_trained(source, base=base)
    original = _original(trained, like) if form == "official" else None
    processor = trained.processor()
    model = trained.load(dtype)
    if missing := missing_rows(model, processor):
        raise ValueError(f"{trained.weights} cannot be exported with the tokenizer of {source}: {missing}. {_rows_hint(trained)}")
    trial = Trial.of(model, processor, moves=not trained.residual) if check else None
    if trial is not None and trial.moved == 0 and trained.must_change_logits:
        raise ValueError(
            f"The adapter in {source} does not change the base's logits, so the export would be the base. Check the learning rate "
            "and the folder."
        )
    model = merged(model, progress=progress)
    shard_bytes = int(shard_gb * 1e9)
    difference = None
    with atomic_folder(target) as partial:
        ours = partial if form == "transformers" else partial / "merged"
        model.save_pretrained(ours, max_shard_size=shard_bytes)
        processor.save_pretrained(ours)
        name = str(model.dtype).removeprefix("torch.")
        del model
        gc.collect()  # peft's layers and their base layers are reference cycles
        _check_names(ours)
        comparison = None if trial is None else trial.compare(ours)
        if original is not None:
            config, folder = original
            (ours / ORIGINAL).write_text(json.dumps(config))
            to_official(ours, partial, folder, shard_bytes, progress)
            difference = checked_difference(partial, ours, None if check else False)
            shutil.rmtree(ours)
        files = list(partial.glob("*.safetensors"))
        size = sum(path.stat().st_size for path in files)
        tensors = len(TensorFiles(partial).names())
    merged_into = None if trained.adapter is None else trained.weights
    return Export(target, form, name, tensors, len(files), size, merged_into, comparison, difference)


def _rows_hint(trained: Trained) -> str:
    if trained.adapter is None:
        return "Call model.resize_token_embeddings(len(tokenizer)) before training, and train again."
    return (
        "Tokens were added, and their trained rows are not in the adapter's folder. Give the resized base with --base if its "
        "new rows were not trained, or train again with modules_to_save=['embed_tokens', 'lm_head'] in the adapter's config."
    )


def _check_names(folder: Path) -> None:
    """Check that an InternVL's files have the standard tensor names, which loading them does not check."""
    config = AutoConfig.from_pretrained(folder)
    if config.model_type == "internvl":
        files = TensorFiles(folder)
        check_shapes({name: files.shape(name) for name in files.names()}, expected_shapes(config), str(folder))


def _original(trained: Trained, like: Path | None) -> tuple[dict[str, Any], Path | None]:
    """The official config of a checkpoint, and the official folder that it comes from, if any.

    Raises:
        ValueError: when there is none, or `like` is of another model.
    """
    config, folder = _official_config(trained, like)
    if trained.config.model_type != "internvl":
        raise ValueError(f"The official format exists for InternVL alone; {trained.weights} is a {trained.config.model_type}.")
    fitting = copy.deepcopy(config)
    fitting["llm_config"]["vocab_size"] = trained.config.text_config.vocab_size
    described = transformers_config(fitting, image_token_id=trained.config.image_token_id)
    check_shapes(expected_shapes(trained.config), expected_shapes(described), f"{folder or trained.weights} as --like")
    return config, folder


def _official_config(trained: Trained, like: Path | None) -> tuple[dict[str, Any], Path | None]:
    if like is not None:
        config = read_config(like)
        if not is_official(config):
            raise ValueError(f"--like={like} is not an InternVLChatModel. Give a folder in the official format.")
        return config, like
    for place in filter(None, (trained.weights, trained.base)):
        folder = official_folder(place)
        if folder is not None:
            return read_config(folder), folder
        if (Path(place) / ORIGINAL).exists():
            return json.loads((Path(place) / ORIGINAL).read_text()), None
    raise ValueError(
        f"The official format needs the official config.json, which {trained.weights} does not have. Give a folder of the official "
        "checkpoint with --like, with or without its weights: hf download OpenGVLab/InternVL3-8B --exclude '*.safetensors' "
        "--local-dir DIR."
    )

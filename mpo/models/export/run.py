"""Export: merge, cast, write, load what was written, compare."""

import copy
import gc
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig

from mpo.models.export.trained import Trained, merged, open_trained
from mpo.models.export.trial import Comparison, Trial
from mpo.models.fit import missing_rows
from mpo.models.loading import official_folder
from mpo.models.official.checkpoint import read_config
from mpo.models.official.config import is_official, transformers_config
from mpo.models.official.convert import ORIGINAL, checked_difference, to_official
from mpo.models.official.expected import check_shapes, expected_shapes
from mpo.models.official.tensors import TensorFiles
from mpo.models.whole_folder import refuse_existing, written_whole

Form = Literal["transformers", "official"]


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        folder: of it.
        form: of it.
        dtype: of its weights, such as ``"bfloat16"``.
        tensors: how many.
        files: of weights.
        bytes: of these.
        base: name or path of what an adapter was merged into; None for a whole model.
        comparison: with the trained model; None: not compared.
        official_difference: the largest difference of logits between both forms, of the largest one; None: not compared.
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
    """Export a trained checkpoint as a folder to be loaded and served.

    An adapter is merged in the export dtype: base + scaling * B A, computed in float32 and rounded. That of a QLoRA run is merged
    into the base as it was before quantisation: the adapter was trained on weights that 4 bits had moved, so the export is not
    what was trained but that adapter on better weights, and is compared as such.

    Peak memory: the model once in the export dtype, one layer in float32, and a file of weights; the trained model is gone before
    the exported one is loaded. The official form is compared as `convert` does, in float32, where memory allows; on disk it takes
    twice its size while it is written.

    Args:
        source: folder that `mpo train`, `MPOTrainer.save_model` or a checkpoint of a run left.
        target: a new folder. It appears when it is whole and compared.
        base: name or path of the checkpoint it was trained from, in either form; by default what adapter_config.json says.
        form: ``"transformers"`` or ``"official"``.
        dtype: as of `load_internvl`; ``"auto"`` is that of the checkpoint, or of the adapter's base.
        shard_gb: most gigabytes of a file.
        like: for the official form: a folder of it, whose config, tokenizer and Python files are copied; by default the base.
        check: load the folder again, put a question to both models and compare.
        progress: show bars.

    Raises:
        ValueError: for what cannot be exported, before anything is written; or for a result that is not what was trained.
    """
    refuse_existing(target)
    if shard_gb <= 0:
        raise ValueError(f"--shard-gb is the size of a file in gigabytes, more than 0; got {shard_gb:g}.")
    if like is not None and form != "official":
        raise ValueError("--like is for the official form: add --format official.")
    trained = open_trained(source, base=base)
    original = _original(trained, like) if form == "official" else None
    processor = trained.processor()
    model = trained.load(dtype)
    if missing := missing_rows(model, processor):
        raise ValueError(f"{trained.weights} cannot be exported with the tokenizer of {source}: {missing}. {_rows_hint(trained)}")
    trial = Trial.of(model, processor, moves=not trained.residual) if check else None
    if trial is not None and trial.moved == 0 and trained.moves_answers:
        raise ValueError(
            f"The adapter in {source} changes nothing: the export would be its base. Was the learning rate 0, or was another "
            "folder meant?"
        )
    model = merged(model, progress=progress)
    shard_bytes = int(shard_gb * 1e9)
    difference = None
    with written_whole(target) as partial:
        ours = partial if form == "transformers" else partial / "merged"
        model.save_pretrained(ours, max_shard_size=shard_bytes)
        processor.save_pretrained(ours)
        name = str(model.dtype).removeprefix("torch.")
        del model
        gc.collect()  # peft's layers and what they adapt refer to each other
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
        "Tokens were added, and what was trained of them is not in the adapter's folder. Give the resized base with --base if its "
        "new rows were not trained, or train again with modules_to_save=['embed_tokens', 'lm_head'] in the adapter's config."
    )


def _check_names(folder: Path) -> None:
    """Check that an InternVL's files have the names that other software reads, which loading them here does not."""
    config = AutoConfig.from_pretrained(folder)
    if config.model_type == "internvl":
        files = TensorFiles(folder)
        check_shapes({name: files.shape(name) for name in files.names()}, expected_shapes(config), str(folder))


def _original(trained: Trained, like: Path | None) -> tuple[dict[str, Any], Path | None]:
    """The official config of a checkpoint, and the folder of the official form that it comes from, if there is one.

    Raises:
        ValueError: when it has none, or `like` has another model's.
    """
    config, folder = _official_config(trained, like)
    if trained.config.model_type != "internvl":
        raise ValueError(f"The official form is that of InternVL; {trained.weights} is a {trained.config.model_type}.")
    fitting = copy.deepcopy(config)
    fitting["llm_config"]["vocab_size"] = trained.config.text_config.vocab_size
    described = transformers_config(fitting, image_token_id=trained.config.image_token_id)
    check_shapes(expected_shapes(trained.config), expected_shapes(described), f"{folder or trained.weights} as --like")
    return config, folder


def _official_config(trained: Trained, like: Path | None) -> tuple[dict[str, Any], Path | None]:
    if like is not None:
        config = read_config(like)
        if not is_official(config):
            raise ValueError(f"{like} is not an InternVLChatModel; --like takes a folder of the official form.")
        return config, like
    for place in filter(None, (trained.weights, trained.base)):
        folder = official_folder(place)
        if folder is not None:
            return read_config(folder), folder
        if (Path(place) / ORIGINAL).exists():
            return json.loads((Path(place) / ORIGINAL).read_text()), None
    raise ValueError(
        f"The official form needs the official config.json, which {trained.weights} does not have. Give a folder of the official "
        "checkpoint with --like; its weights may be left out: hf download OpenGVLab/InternVL3-8B --exclude '*.safetensors' "
        "--local-dir DIR."
    )

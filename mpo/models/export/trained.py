"""Open a trained checkpoint, a full model or an adapter, check it strictly, fit the base's rows to its adapter, and merge it."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from peft import PeftConfig, PeftModel, PeftType, get_peft_model_state_dict, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.utils import cached_file

from mpo.models.fit import open_processor
from mpo.models.loading import as_dtype, load_internvl, load_processor, model_config
from mpo.models.official.tensors import TensorFiles
from mpo.models.strict import misfits, read_json, shortened

PREFIX = "base_model.model."
NEW_ROWS = (
    "The rows of new tokens are not in the adapter's folder. If they were not trained, give the resized base with --base; or train "
    "again with modules_to_save=['embed_tokens', 'lm_head'] in the adapter's config."
)

FACTORS = {"lora_B": "lora_A", "lora_embedding_A": "lora_embedding_B"}
"""The LoRA factor that is initialized to zero -> the other factor."""

RESOLVED = "resolved.yaml"

RESIDUAL = ("pissa", "olora")
"""Initializations that move a part of the base's weights into the adapter; peft recomputes it when the adapter is loaded."""

NOT_REPRODUCIBLE = {
    "pissa_niter": "its decomposition draws random numbers, so the remaining base differs each time. "
    "Train with init_lora_weights='pissa'",
    "corda": "it depends on data that is not in the folder. Convert it when saving "
    "(save_pretrained with path_initial_model_for_weight_conversion)",
    "lora_ga": "it depends on gradients that are not in the folder. Convert it when saving "
    "(save_pretrained with path_initial_model_for_weight_conversion)",
    "loftq": "it was trained on a base that LoftQ had changed. Merge it in the training process",
}
"""Initializations that change the base and cannot be reproduced at loading: prefix of the name -> reason and remedy."""

EARLIER = "Export an earlier checkpoint of the run."
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Trained:
    """A trained checkpoint, opened but not loaded."""

    folder: Path  # folder of the checkpoint
    weights: str  # name or path that the model is loaded from: the folder itself, or the adapter's base
    base: str | None = None  # name or path of the checkpoint that it was trained from, if known
    adapter: PeftConfig | None = None  # config of the adapter; None for a full model
    tensors: dict[str, Tensor] = field(default_factory=dict, repr=False)  # tensors of the adapter, by their names on disk

    @cached_property
    def config(self) -> Any:
        """The model's config in transformers' format."""
        return model_config(self.weights)

    def processor(self) -> Any:
        """The processor or tokenizer of the run, or else of the checkpoint that it was trained from."""
        for place in filter(None, (str(self.folder), self.weights, self.base)):
            if Path(place).is_dir() and not any((Path(place) / name).exists() for name in PROCESSOR_FILES):
                continue
            adapter = (Path(place) / CONFIG_NAME).exists()  # no config.json, so the format is unknown
            return open_processor(place) if adapter else load_processor(place)
        raise ValueError(f"{self.folder} has no tokenizer or processor. Give a checkpoint that has one with --base.")

    @property
    def must_change_logits(self) -> bool:
        """Whether a trained adapter changes the logits for every prompt; trained token rows may not occur in a prompt."""
        return self.adapter is not None and self.adapter.peft_type not in (PeftType.LORA, PeftType.TRAINABLE_TOKENS)

    @property
    def residual(self) -> bool:
        """Whether the adapter was initialized with a part of the base's weights, so that the base alone is incomplete."""
        return str(getattr(self.adapter, "init_lora_weights", None)).lower() in RESIDUAL

    def load(self, dtype: str | torch.dtype) -> Any:
        """Load the trained model in eval mode, with an unmerged adapter.

        `dtype` is as in `load_internvl`; for an adapter, that of its base: adapters stay float32, as in peft.

        Raises ValueError naming tensors that are missing, unexpected, of another shape, or not finite.
        """
        chosen = as_dtype(dtype)
        # PiSSA and OLoRA decompose the weights in the dtype of training, not rounded ones.
        model = load_internvl(self.weights, dtype="auto" if self.residual else chosen)
        if self.adapter is not None:
            model = self._adapt(model)
            if chosen != "auto" and model.dtype != chosen:
                _cast_base(model, chosen)  # the adapter keeps its dtype
        if (self.folder / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(self.folder)
        _check_finite(dict(model.named_parameters()), self.weights, model.dtype)
        return model.eval()

    def _adapt(self, model: Any) -> PeftModel:
        assert self.adapter is not None
        carried = fit_rows(model, self.adapter, self.tensors, str(self.folder))
        self.adapter.base_model_name_or_path = self.weights  # peft checks there for added tokens
        try:
            adapted = PeftModel(model, self.adapter)
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
            kind = self.adapter.peft_type.value
            raise ValueError(f"peft cannot load the {kind} adapter in {self.folder} on {self.weights}: {error}") from error
        expected = {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(adapted).items()}
        carried = [name for name in carried if name not in expected]
        found = {name: tuple(tensor.shape) for name, tensor in self.tensors.items() if name not in carried}
        if problems := misfits(found, expected):
            raise ValueError(f"The adapter in {self.folder} does not fit {self.weights}: {problems}. Give its base with --base.")
        set_peft_model_state_dict(adapted, {name: self.tensors[name] for name in found})
        for name in carried:
            adapted.get_parameter(name).data.copy_(self.tensors[name])
        untie(adapted)
        return adapted


def open_trained(folder: Path, *, base: str | None = None) -> Trained:
    """Open a folder written by `mpo train` or `MPOTrainer.save_model`, or a checkpoint of a run, without loading the model.

    `base`: name or path of the checkpoint it was trained from, if its adapter_config.json does not name it or is wrong. Raises
    ValueError for an incomplete checkpoint, an adapter that is zero or not finite, or a base that is not found or quantised.
    """
    if re.fullmatch(r"checkpoint-\d+", folder.name):
        try:
            json.loads((folder / "trainer_state.json").read_text())
        except (OSError, ValueError):
            raise ValueError(f"{folder} is incomplete (trainer_state.json is missing or cut off). {EARLIER}") from None
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}. Give that of a run, a checkpoint of one, or an adapter.")
    if not (folder / CONFIG_NAME).exists():
        if not (folder / "config.json").exists():
            inside = sorted({path.parent.name for name in (CONFIG_NAME, "config.json") for path in folder.glob(f"*/{name}")})
            fix = f" Give one of its folders: {', '.join(inside)}." if inside else ""
            raise ValueError(f"Expected {CONFIG_NAME} or config.json in {folder}, and found neither.{fix}")
        TensorFiles(folder)
        _refuse_quantised(read_json(folder / "config.json"), str(folder))
        return Trained(folder, str(folder), base)
    if whole := sorted(path.name for path in folder.glob("model*.safetensors")):
        raise ValueError(f"{folder} holds an adapter ({CONFIG_NAME}) and a full model ({whole[0]}), of two runs. Move one away.")
    read_json(folder / CONFIG_NAME)
    try:
        config = PeftConfig.from_pretrained(folder)
    except Exception as error:  # of any kind: peft does not check the values of the file
        raise ValueError(f"{folder / CONFIG_NAME} does not describe an adapter of peft: {error!r}. {EARLIER}") from error
    _check_mergeable(config, folder)
    tensors = _read_adapter(folder, config)
    named = base or config.base_model_name_or_path
    _check_base(None if named == "None" else named, folder, given=base is not None)
    if base is not None and config.base_model_name_or_path not in (None, "None", base):
        _check_kind(base, config.base_model_name_or_path, folder)
    return Trained(folder, named, named, config, tensors)


def merged(model: Any, *, progress: bool = True) -> Any:
    """Merge the adapter into the model's weights, layer by layer; a model without adapters is returned unchanged.

    Raises ValueError naming the layer whose merged weights are not finite, or that peft cannot merge.
    """
    if not isinstance(model, PeftModel):
        return model
    dtype, kind = model.dtype, model.active_peft_config.peft_type.value
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    try:
        whole: Any = model.merge_and_unload(progressbar=progress, safe_merge=True)
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:  # NotImplementedError is a RuntimeError
        # Layers before this one are already merged and unwrapped.
        layers = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
        name = layers[0][0].removeprefix(PREFIX) if layers else "?"
        if "NaNs detected" in str(error):
            raise ValueError(f"{name}.weight is not finite after merging.{_range_hint(dtype)}") from error
        raise ValueError(f"peft cannot merge the {kind} adapter of {name} ({error}). Serve the adapter with its base.") from error
    head = whole.get_output_embeddings()
    if tied and head is not None and head.weight is not whole.get_input_embeddings().weight:  # only one of the two was trained
        mark_untied(whole)
    return whole


def _cast_base(model: PeftModel, dtype: torch.dtype) -> None:
    prefix = model.base_model.prefix
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and prefix not in name and "inv_freq" not in name:
            tensor.data = tensor.data.to(dtype)
    model.config.dtype = dtype


def _check_finite(tensors: Mapping[str, Tensor], where: str, dtype: torch.dtype | None = None) -> None:
    bad = [name.removeprefix(PREFIX) for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise ValueError(f"{where} has weights that are not finite: {shortened(bad)}.{_range_hint(dtype)} {EARLIER}")


def _check_mergeable(config: PeftConfig, folder: Path) -> None:
    kind = config.peft_type.value if config.peft_type else "?"
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
    merges = isinstance(tuner, type) and issubclass(tuner, BaseTuner) and config.peft_type not in (PeftType.POLY, PeftType.XLORA)
    if not merges or getattr(config, "alora_invocation_tokens", None):
        raise ValueError(
            f"{folder} is {'an aLoRA' if merges else f'a {kind}'} adapter. It changes the computation and not the weights, so "
            "it cannot be merged. Serve it with peft and its base."
        )
    init = str(getattr(config, "init_lora_weights", None)).lower()
    for name, why in NOT_REPRODUCIBLE.items():
        if init.startswith(name):
            raise ValueError(f"The adapter in {folder} has init_lora_weights={init!r}, which cannot be reproduced: {why}.")
    if init in RESIDUAL and is_qlora(folder):
        raise ValueError(
            f"The adapter in {folder} was initialized with init_lora_weights={init!r} on a 4-bit base ({RESOLVED}), whose "
            "decomposition differs from that of the unquantised base. Train QLoRA with init_lora_weights=true."
        )


def is_qlora(source: Path) -> bool:
    """Whether this run, or the run of this checkpoint, was a QLoRA run of `mpo train`."""
    path = next((path for path in (source / RESOLVED, source.parent / RESOLVED) if path.exists()), None)
    return path is not None and OmegaConf.select(OmegaConf.load(path), "peft.kind") == "qlora"


def _read_adapter(folder: Path, config: PeftConfig) -> dict[str, Tensor]:
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.exists():
        raise ValueError(f"{folder} has {CONFIG_NAME} but no {SAFETENSORS_WEIGHTS_NAME}. Other formats are not read.")
    try:
        tensors = load_file(path)
    except Exception as error:  # safetensors raises its own class, which is not exported
        raise ValueError(f"{path} cannot be read ({error}). {EARLIER}") from error
    _check_finite(tensors, str(folder))
    if config.peft_type != PeftType.LORA:  # other types have no factor initialized to zero
        return tensors
    products = [(name, name.replace(zero, other)) for name in tensors for zero, other in FACTORS.items() if f".{zero}" in name]
    if products and not any(tensors[zero].any() and other in tensors and tensors[other].any() for zero, other in products):
        raise ValueError(f"The adapter in {folder} is zero in all {len(products)} layers. Check the learning rate and the folder.")
    return tensors


def _check_base(name: str | None, folder: Path, *, given: bool) -> None:
    fix = "" if given else " Give it with --base."
    if name is None:
        raise ValueError(f"{folder / CONFIG_NAME} does not name the model that the adapter was trained on.{fix}")
    if (Path(name) / CONFIG_NAME).exists():
        raise ValueError(f"The base {name} is an adapter itself. Export it first, and give the result with --base.")
    try:
        path = Path(cached_file(name, "config.json"))
    except (OSError, TypeError, ValueError) as error:  # TypeError: a folder without that file
        raise ValueError(
            f"The base of the adapter in {folder}, {name}, cannot be found: it is neither a folder with a config.json nor a "
            f"reachable name on the Hub.{fix}"
        ) from error
    _refuse_quantised(read_json(path), name)


def _check_kind(base: str, own: str, folder: Path) -> None:
    try:
        cached_file(own, "config.json", local_files_only=True)
        there, here = (_kinds(model_config(name)) for name in (own, base))
    except (OSError, TypeError, ValueError):
        return
    if there != here:
        raise ValueError(
            f"The adapter in {folder} was trained on {own}, a model of {' with '.join(there)}, and the base {base} is one of "
            f"{' with '.join(here)}. Give a copy of its own base with --base."
        )


def _kinds(config: Any) -> list[str]:
    parts = (config, getattr(config, "vision_config", None), getattr(config, "text_config", None))
    return [part.model_type for part in parts if part is not None]


def _refuse_quantised(config: Mapping[str, Any], name: str) -> None:
    if quantised := config.get("quantization_config"):
        kind = quantised.get("quant_method") if isinstance(quantised, Mapping) else quantised
        raise ValueError(
            f"The weights of {name} are quantised ({kind or 'see its config.json'}), and adapters cannot be merged into them. Give "
            "the unquantised checkpoint with --base."
        )


def _range_hint(dtype: torch.dtype | None) -> str:
    return " float16 ends at 65504; use --dtype bfloat16, which has float32's range." if dtype == torch.float16 else ""


# Rows of embeddings and output head


def fit_rows(model: Any, adapter: PeftConfig, tensors: Mapping[str, Tensor], where: str) -> list[str]:
    """Resize the embeddings and head of a base, without adapter, to the rows its adapter was trained with, if that has them.

    `tensors` are the adapter's, by their names on disk; with embeddings and head if peft saved them (``save_embedding_layers``,
    ``modules_to_save``). Returns those of its names that are complete embedding and head matrices.

    Raises ValueError when a row missing from the base is neither in the folder's matrices nor among its trained tokens.
    """
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    places = {name: module for name, module in model.named_modules() if module in (embeddings, head)}
    stored = {f"{PREFIX}{place}{own}": module for place, module in places.items() for own in (".weight", ".base_layer.weight")}
    whole = {name: stored[name] for name in tensors if name in stored}
    indices = getattr(adapter, "trainable_token_indices", None) or getattr(adapter, "token_indices", None) or {}
    by_name = indices if isinstance(indices, dict) else {"embed_tokens": indices}  # a list refers to the embeddings
    tokens = {
        module: {index for name, own in by_name.items() if place.split(".")[-1] == name.split(".")[-1] for index in own}
        for place, module in places.items()
    }
    tied = head is not None and head.weight is embeddings.weight
    if tied:
        tokens[head] = tokens[embeddings]
    before = len(embeddings.weight)
    sizes = {len(tensors[name]) for name in whole} or {max(before, *(index + 1 for own in tokens.values() for index in own), 0)}
    if len(sizes) > 1:
        raise ValueError(f"Embeddings and output head in {where} differ in their rows: {sorted(sizes)}. Save the adapter again.")
    rows = sizes.pop()
    complete = set(whole.values())
    copied = getattr(adapter, "modules_to_save", None) and not getattr(adapter, "ensure_weight_tying", False)
    if tied and complete and not copied:  # tied: one matrix serves both
        complete = {embeddings, head}
    for name, module in (("embeddings", embeddings), ("output head", head)):
        if module is None or module in complete or tokens.get(module, set()) >= set(range(before, rows)):
            continue
        raise ValueError(f"The adapter in {where} was trained with {rows} rows of the {name}, the base has {before}. {NEW_ROWS}")
    if rows != before:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return list(whole)


def untie(model: Any) -> None:
    """Untie the output head from the embeddings if an adapter is on one of the two.

    Merged into the tied matrix, the update would change both. peft itself merges correctly what it trains in a separate matrix
    (``modules_to_save``) or for both at once (``trainable_token_indices``).
    """
    base = model.get_base_model()
    adapted = base.get_output_embeddings(), base.get_input_embeddings()
    if not any(isinstance(module, BaseTunerLayer) and not isinstance(module, TrainableTokensLayer) for module in adapted):
        return
    head, embeddings = (module.get_base_layer() if isinstance(module, BaseTunerLayer) else module for module in adapted)
    if head is not None and head.weight is embeddings.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        mark_untied(base)


def mark_untied(model: Any) -> None:
    """Configure a model to be saved with an untied output head."""
    standard_names(model)  # those it was loaded with lack the head
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False


def standard_names(model: Any) -> None:
    """Configure a model to be saved under its standard names, not those that it was loaded from."""
    model._weight_conversions = None  # private: computed again when saving

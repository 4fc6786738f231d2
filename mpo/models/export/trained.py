"""What a run left: a whole model, or an adapter on a base; read strictly, and merged."""

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
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, GenerationConfig
from transformers.utils import cached_file

from mpo.models.export.rows import fit_rows, mark_untied, untie
from mpo.models.fit import open_processor
from mpo.models.loading import as_dtype, load_internvl, load_processor, official_folder
from mpo.models.official.checkpoint import open_official
from mpo.models.official.expected import misfits
from mpo.models.official.tensors import TensorFiles

FACTORS = {"lora_B": "lora_A", "lora_embedding_A": "lora_embedding_B"}
"""The factor of an adapter that is zero at the start -> the other one."""

RESOLVED = "resolved.yaml"

RESIDUAL = ("pissa", "olora")
"""Initialisations that take a part of the base's weights into the adapter, which peft computes again when the adapter is loaded."""

NOT_COMPUTED_AGAIN = {
    "pissa_niter": "its decomposition draws random numbers, so the base that is left beside the adapter is another each time. "
    "Train with init_lora_weights='pissa'",
    "corda": "its decomposition depends on data that is not in the folder. Convert it when saving "
    "(save_pretrained with path_initial_model_for_weight_conversion)",
    "lora_ga": "its start depends on gradients that are not in the folder. Convert it when saving "
    "(save_pretrained with path_initial_model_for_weight_conversion)",
    "loftq": "it was trained beside a base whose weights LoftQ had changed. Merge it in the process that trained it",
}
"""Initialisations that change the base so that loading cannot: the beginning of the name -> why, and what to do."""

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Trained:
    """A trained checkpoint, opened but not loaded.

    Attributes:
        folder: of the checkpoint.
        weights: name or path of the checkpoint that the model is loaded from: the folder itself, or the adapter's base.
        base: name or path of what it was trained from, as far as it is known.
        adapter: its config; None for a whole model.
        tensors: of the adapter, by their names on disk.
    """

    folder: Path
    weights: str
    base: str | None = None
    adapter: PeftConfig | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @cached_property
    def config(self) -> Any:
        """The model's config, as transformers has it."""
        official = official_folder(self.weights)
        return AutoConfig.from_pretrained(self.weights) if official is None else open_official(official).config

    def processor(self) -> Any:
        """The processor or tokenizer: the run's own, else that of what it was trained from.

        Raises:
            ValueError: when neither has one.
        """
        for place in filter(None, (str(self.folder), self.weights, self.base)):
            if Path(place).is_dir() and not any((Path(place) / name).exists() for name in PROCESSOR_FILES):
                continue
            adapter = (Path(place) / CONFIG_NAME).exists()  # its folder has no config.json that would tell the form
            return open_processor(place) if adapter else load_processor(place)
        raise ValueError(
            f"{self.folder} has no tokenizer or processor, so nothing could be asked. Give a checkpoint that has one with --base."
        )

    @property
    def moves_answers(self) -> bool:
        """Whether an adapter that was trained moves the answer to any question; of trained tokens a question may have none."""
        return self.adapter is not None and self.adapter.peft_type not in (PeftType.LORA, PeftType.TRAINABLE_TOKENS)

    @property
    def residual(self) -> bool:
        """Whether the adapter stands beside a part of the base, not all of it, and so moves nothing but that."""
        return str(getattr(self.adapter, "init_lora_weights", None)).lower() in RESIDUAL

    def load(self, dtype: str | torch.dtype) -> Any:
        """The trained model in eval mode; an adapter is on its base, not merged.

        Args:
            dtype: as of `load_internvl`; that of the base, for an adapter. Adapters stay float32, as peft holds them.

        Raises:
            ValueError: for tensors that are missing, too many, of another shape, or not finite; they are named.
        """
        chosen = as_dtype(dtype)
        # What PiSSA and OLoRA take out of the base is that of its weights as they were trained, not of rounded ones.
        model = load_internvl(self.weights, dtype="auto" if self.residual else chosen)
        if self.adapter is not None:
            model = self._adapt(model)
            if chosen != "auto" and model.dtype != chosen:
                cast_base(model, chosen)
        if (self.folder / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(self.folder)
        check_finite(dict(model.named_parameters()), self.weights, model.dtype)
        return model.eval()

    def _adapt(self, model: Any) -> PeftModel:
        assert self.adapter is not None
        carried = fit_rows(model, self.adapter, self.tensors, str(self.folder))
        self.adapter.base_model_name_or_path = self.weights  # peft looks there whether tokens were added
        try:
            adapted = PeftModel(model, self.adapter)
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
            kind = self.adapter.peft_type.value
            raise ValueError(f"peft cannot put the {kind} adapter in {self.folder} on {self.weights}: {error}") from error
        expected = {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(adapted).items()}
        carried = [name for name in carried if name not in expected]
        found = {name: tuple(tensor.shape) for name, tensor in self.tensors.items() if name not in carried}
        problems = misfits(found, expected)
        if problems:
            raise ValueError(
                f"The adapter in {self.folder} does not fit {self.weights}: {problems}. Give the checkpoint that it was trained on "
                "with --base."
            )
        set_peft_model_state_dict(adapted, {name: self.tensors[name] for name in found})
        for name in carried:
            adapted.get_parameter(name).data.copy_(self.tensors[name])
        untie(adapted)
        return adapted


def open_trained(folder: Path, *, base: str | None = None) -> Trained:
    """Open what `mpo train`, `MPOTrainer.save_model` or a checkpoint of a run left. No model is loaded.

    Args:
        folder: of the checkpoint.
        base: name or path of the checkpoint it was trained from, when its adapter_config.json does not say or is wrong.

    Raises:
        ValueError: for a folder that is no whole checkpoint, an adapter that learned nothing or is not finite, or a base that
            cannot be found or is not the real weights.
    """
    if re.fullmatch(r"checkpoint-\d+", folder.name) and not _reads(folder / "trainer_state.json"):
        raise ValueError(f"{folder} was not written to its end (trainer_state.json is missing or cut). Export an earlier one.")
    if not (folder / CONFIG_NAME).exists():
        if not (folder / "config.json").exists():
            inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_NAME}"))
            inside += sorted(path.parent.name for path in folder.glob("*/config.json"))
            raise ValueError(
                f"{folder} has no {CONFIG_NAME} and no config.json, so no model was saved there."
                + (f" It holds {', '.join(inside)}: give one of these." if inside else "")
            )
        TensorFiles(folder)
        _refuse_quantised(json.loads((folder / "config.json").read_text()), str(folder))
        return Trained(folder, str(folder), base)
    whole = sorted(path.name for path in folder.glob("model*.safetensors"))
    if whole:
        raise ValueError(
            f"{folder} holds an adapter ({CONFIG_NAME}) and a whole model ({whole[0]}), of two runs. Move the one away that is not "
            "meant."
        )
    config = PeftConfig.from_pretrained(folder)
    _check_mergeable(config, folder)
    tensors = _read_adapter(folder, config)
    named = base or config.base_model_name_or_path
    _check_base(None if named == "None" else named, folder, given=base is not None)
    return Trained(folder, named, named, config, tensors)


def merged(model: Any, *, progress: bool = True) -> Any:
    """The model with its adapter merged into its weights, layer by layer; a model without adapters as it is.

    Raises:
        ValueError: when merged weights are not finite, or peft cannot merge a layer; the layer is named.
    """
    if not isinstance(model, PeftModel):
        return model
    dtype = model.dtype
    kind = model.active_peft_config.peft_type.value
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    try:
        whole: Any = model.merge_and_unload(progressbar=progress, safe_merge=True)
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:  # NotImplementedError is a RuntimeError
        # Layers before this one are merged, and no longer a tuner's.
        layers = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
        name = _short(layers[0][0]) if layers else "?"
        if "NaNs detected" in str(error):
            raise ValueError(f"{name}.weight is not finite once merged.{_range_hint(dtype)}") from error
        raise ValueError(
            f"peft cannot merge the {kind} adapter of {name} into its weights ({error}). Serve the adapter beside its base instead."
        ) from error
    head = whole.get_output_embeddings()
    if tied and head is not None and head.weight is not whole.get_input_embeddings().weight:  # one of them was trained alone
        mark_untied(whole)
    return whole


def cast_base(model: PeftModel, dtype: torch.dtype) -> None:
    """Cast the weights under an adapter; the adapter's own keep their dtype."""
    prefix = model.base_model.prefix
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and prefix not in name and "inv_freq" not in name:
            tensor.data = tensor.data.to(dtype)
    model.config.dtype = dtype


def check_finite(tensors: Mapping[str, Tensor], where: str, dtype: torch.dtype | None = None) -> None:
    """Refuse weights that are not finite.

    Args:
        tensors: by name.
        where: they come from.
        dtype: they were cast to.

    Raises:
        ValueError: naming them.
    """
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        more = f" and {len(bad) - 8} more" if len(bad) > 8 else ""
        raise ValueError(
            f"{where} has weights that are not finite: {', '.join(map(_short, bad[:8]))}{more}.{_range_hint(dtype)} "
            "Export an earlier checkpoint of the run."
        )


def _check_mergeable(config: PeftConfig, folder: Path) -> None:
    kind = config.peft_type.value if config.peft_type else "?"
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
    merges = isinstance(tuner, type) and issubclass(tuner, BaseTuner) and config.peft_type not in (PeftType.POLY, PeftType.XLORA)
    if not merges or getattr(config, "alora_invocation_tokens", None):
        raise ValueError(
            f"{folder} is {'an aLoRA' if merges else f'a {kind}'} adapter, which changes what is computed and not the weights, so "
            "nothing can be merged. Serve it with peft beside its base."
        )
    init = str(getattr(config, "init_lora_weights", None)).lower()
    for name, why in NOT_COMPUTED_AGAIN.items():
        if init.startswith(name):
            raise ValueError(f"The adapter in {folder} began with init_lora_weights={init!r}, and cannot be rebuilt: {why}.")
    if init in RESIDUAL and is_qlora(folder):
        raise ValueError(
            f"The adapter in {folder} began with init_lora_weights={init!r} on a base in 4 bits ({RESOLVED}): what it took out of "
            "that base is not what it takes out of the weights as they were before. Train QLoRA with init_lora_weights=true."
        )


def is_qlora(source: Path) -> bool:
    """Whether `mpo train` wrote down that this run, or the run of this checkpoint, held its base in 4 bits."""
    path = next((path for path in (source / RESOLVED, source.parent / RESOLVED) if path.exists()), None)
    return path is not None and OmegaConf.select(OmegaConf.load(path), "peft.kind") == "qlora"


def _read_adapter(folder: Path, config: PeftConfig) -> dict[str, Tensor]:
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.exists():
        raise ValueError(f"{folder} has {CONFIG_NAME} but no {SAFETENSORS_WEIGHTS_NAME}; adapters are read from safetensors alone.")
    try:
        tensors = load_file(path)
    except Exception as error:  # safetensors raises its own class, which is not exported
        raise ValueError(f"{path} cannot be read ({error}). Export an earlier checkpoint of the run.") from error
    check_finite(tensors, str(folder))
    if config.peft_type != PeftType.LORA:  # others have no factor of their own that begins as zero
        return tensors
    products = [(name, name.replace(zero, other)) for name in tensors for zero, other in FACTORS.items() if f".{zero}" in name]
    if products and not any(
        bool(tensors[zero].any()) and other in tensors and bool(tensors[other].any()) for zero, other in products
    ):
        raise ValueError(
            f"The adapter in {folder} is zero in all {len(products)} layers: it is as it was before training, and the export would "
            "be its base. Was the learning rate 0, or was another folder meant?"
        )
    return tensors


def _check_base(name: str | None, folder: Path, *, given: bool) -> None:
    fix = "" if given else " Give it with --base."
    if name is None:
        raise ValueError(f"{folder / CONFIG_NAME} does not say which model the adapter was trained on.{fix}")
    if (Path(name) / CONFIG_NAME).exists():
        raise ValueError(f"The base {name} is an adapter itself. Export that one first, and give the result with --base.")
    try:
        config = json.loads(Path(cached_file(name, "config.json")).read_text())
    except (OSError, TypeError, ValueError) as error:  # TypeError: a folder without that file
        raise ValueError(
            f"The base of the adapter in {folder}, {name}, cannot be found: it is no folder with a config.json, and no name on the "
            f"Hub that can be reached from here.{fix}"
        ) from error
    _refuse_quantised(config, name)


def _refuse_quantised(config: Mapping[str, Any], name: str) -> None:
    quantised = config.get("quantization_config")
    if quantised:
        raise ValueError(
            f"The weights of {name} are quantised ({quantised.get('quant_method', 'see its config.json')}), and nothing can be "
            "merged into those. Give the checkpoint that they were made from with --base."
        )


def _reads(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return True


def _short(name: str) -> str:
    return name.removeprefix("base_model.model.")


def _range_hint(dtype: torch.dtype | None) -> str:
    return " float16 ends at 65504; --dtype bfloat16 has float32's range." if dtype == torch.float16 else ""

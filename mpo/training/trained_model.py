"""The model of a training job, and what of it is trained: its parts, or adapters on them."""

import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_method
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from mpo.io import did_you_mean
from mpo.models.family import DEFAULT, Family, family_of
from mpo.models.loading import load_model, model_config
from mpo.models.parts import check_adapter, freeze_parts
from mpo.training import schema
from mpo.training.schema import check_keys, hints

PEFT_KINDS = ("none", "lora", "qlora")


@dataclass(kw_only=True)
class TrainedModel:
    """A model, its parts and its adapters.

    Args:
        model: ``_target_``, a function that returns a `LoadedModel`, and its arguments.
        fuser: ``layers`` and other arguments of `mpo.models.add_fuser`, which adds a fuser; None, or layers of None: none is added.
        chat_template: one of LLaVA's templates (`mpo.models.llava`); None: that of the checkpoint.
        peft: ``kind`` (none, lora, qlora) and fields of peft's `LoraConfig`.
        train_parts: part of the model -> train, freeze, lora, or for ``vision`` the number of last layers to train
            (`mpo.models.parts`); None: train all parts, or follow ``peft``.
    """

    model: dict[str, Any]
    fuser: dict[str, Any] | None = None
    chat_template: str | None = None
    peft: dict[str, Any] = field(default_factory=lambda: {"kind": "none"})
    train_parts: dict[str, Any] | None = None

    def loader(self) -> Any:
        """Import the function that loads the model."""
        try:
            return get_method(self.model["_target_"])
        except KeyError:
            raise ValueError("model._target_ (the function that loads it) is not set. Choose a model with model=NAME.") from None
        except ImportError as error:
            raise ValueError(f"model._target_ cannot be imported: {error}") from error

    def settings(self) -> dict[str, Any]:
        """Return the arguments of the function that loads the model, with the fuser and the template that the job adds."""
        given = {key: value for key, value in self.model.items() if key != "_target_"}
        fuser = {name: value for name, value in (self.fuser or {}).items() if value is not None}
        if "layers" in fuser:
            given["fuser"] = fuser
        elif changed := [name for name in fuser if (name, fuser[name]) != ("fusion", "mmfuser")]:
            raise ValueError(f"fuser.{changed[0]}={fuser[changed[0]]} needs fuser.layers, which adds a fuser. Set it too.")
        return given | ({} if self.chat_template is None else {"chat_template": self.chat_template})

    def config(self) -> Any:
        """Load the config of the model, with the fuser that the job adds, without weights."""
        given = self.settings()
        return model_config(given["name_or_path"], bool(given.get("trust_remote_code")), given.get("fuser"))

    def check_loader(self) -> None:
        """Refuse arguments that the function that loads the model does not take."""
        loader = self.loader()
        settings = self.settings()
        if loader is load_model:
            check_keys(hints(schema.Model), self.model, "model")
            return
        try:  # a function of the user's, or a small model of the library
            inspect.signature(loader).bind(**settings)
        except TypeError as error:
            raise ValueError(f"model: {self.model['_target_']} {error}.") from None

    def check_peft(self) -> None:
        """Refuse invalid adapter settings."""
        kind = self.peft.get("kind")
        if kind not in PEFT_KINDS:
            raise ValueError(
                f"peft.kind must be one of {', '.join(PEFT_KINDS)}; got {kind!r}.{did_you_mean(kind, PEFT_KINDS, most=20)}"
            )
        settings = [key for key in self.peft if key != "kind"]
        if kind == "none":
            if settings:
                raise ValueError(f"peft.{settings[0]} needs peft=lora or peft=qlora; peft=none trains without an adapter.")
            return
        known = {"kind": str, **hints(LoraConfig), "r": schema.Positive, "lora_alpha": float, "lora_dropout": schema.Share}
        check_keys({name: of for name, of in known.items() if name != "task_type"}, self.peft, "peft")
        if kind == "qlora":
            try:
                import bitsandbytes  # noqa: F401
            except ImportError:
                raise ValueError("peft=qlora needs bitsandbytes: pip install 'mpo-trainer[qlora]'.") from None
            if "quantization_config" not in inspect.signature(self.loader()).parameters:
                raise ValueError(f"peft=qlora needs a model loader with quantization_config; {self.model['_target_']} has none.")
        if self.parts() and self.peft.get("target_modules"):
            raise ValueError(
                "train_parts and peft.target_modules both select the adapted layers. Set only one of them (with target_modules, "
                "peft.modules_to_save selects the modules to train in full)."
            )

    def parts(self) -> dict[str, Any]:
        """Return the choices of ``train_parts`` that are set."""
        return {part: choice for part, choice in (self.train_parts or {}).items() if choice is not None}

    def family(self, config: Any) -> Family:
        """Return the family of the model, if a setting depends on it.

        Raises ValueError for a vision-language model of an unknown family.
        """
        for setting, value in (("peft=qlora", self.peft["kind"] == "qlora"), ("train_parts", self.parts())):
            if value:
                family = family_of(config, setting)
                if self.parts().get("fuser") and not (family.fuser and (config.fusion == "mmfuser" or self.peft["kind"] == "none")):
                    raise ValueError(
                        f"train_parts.fuser: a {config.model_type} has no fuser. Add one (mpo.models.add_fuser), or leave it out."
                    )
                return family
        if self.peft["kind"] != "none" and not self.peft.get("target_modules"):
            return family_of(config, f"peft={self.peft['kind']} without peft.target_modules")
        return DEFAULT

    def expected_family(self) -> Family:
        """Return the family of a model on this machine, before it is loaded; of another one, InternVL."""
        if not (self.peft["kind"] != "none" or self.parts().get("fuser")) or not self.is_local():
            return DEFAULT
        return self.family(self.config())

    def is_local(self) -> bool:
        """Whether the model's config is on this machine."""
        name = self.model.get("name_or_path")
        return name is not None and (Path(name) / "config.json").is_file()

    def adapter(self, family: Family = DEFAULT) -> Any:
        """Build peft's `LoraConfig` for a model of a family; None without an adapter.

        Raises ValueError for settings that train a frozen part, and a projector that peft cannot train as a whole.
        """
        if self.peft["kind"] == "none":
            return None
        settings = {key: value for key, value in self.peft.items() if key != "kind"}
        settings["target_modules"] = settings.get("target_modules") or family.projections()
        if parts := self.parts():
            settings["target_modules"] = family.adapted_layers(parts)
            for part in ("vision", "projector"):
                if parts.get(part, "freeze") != "freeze" and part not in family.linear:
                    raise ValueError(f"train_parts.{part}={parts[part]}: the model has no such part. Leave it out.")
            if parts.get("projector") == "train" and len(family.projector + family.loose) > 1:
                raise ValueError(
                    f"train_parts.projector=train beside adapters: peft cannot train all of this family's projector, only one "
                    f"module ({', '.join(family.projector + family.loose)}). Use train_parts.projector=lora."
                )
            for part, modules in (("projector", family.projector), ("fuser", family.fuser)):
                if parts.get(part) == "train":
                    settings["modules_to_save"] = [*(settings.get("modules_to_save") or []), *modules]
        adapter = LoraConfig(task_type="CAUSAL_LM", **settings)
        check_adapter(self.parts(), adapter, family)
        return adapter

    def freeze(self, model: Any) -> None:
        """Freeze the parts that are not trained. With an adapter, peft freezes the base model."""
        if self.peft["kind"] == "none" and (parts := self.parts()):
            freeze_parts(model, parts)

    def quantization(self) -> Any:
        """Build the 4-bit quantization config of QLoRA (arXiv 2305.14314); None for other jobs.

        Raises ValueError for a vision-language model of an unknown family, whose vision tower would be quantized.
        """
        if self.peft["kind"] != "qlora":
            return None
        if self.model.get("name_or_path") is None:
            raise ValueError("peft=qlora needs model.name_or_path, whose config says which parts are not to be quantized.")
        family = self.family(self.config())
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=family.not_quantized(),
        )

"""Vision features in a run: what they depend on, what cannot be cached, and how a batch is completed."""

import copy
import logging
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL
import torch
import torchvision  # type: ignore[import-untyped]
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import Trainer

from mpo.batching.batch import Batch
from mpo.batching.randomness import eval_mode
from mpo.encoding.images import VISION_FEATURES, ImageFeatures, OneImage
from mpo.encoding.tiles import AUGMENTED_FEATURES, tile_size
from mpo.generation.local import LocalGenerator
from mpo.models.family import known_family
from mpo.models.features import encode_tiles, take_features, vision_modules, why_not_frozen
from mpo.models.parts import base_model
from mpo.models.tower import find_tower
from mpo.training.features.cache import FeatureCache
from mpo.training.reference.filling import default_folder, refuse_augmented
from mpo.training.reference.fingerprint import Fingerprint, hash_settings, hash_weights, module_settings, plain, processor_parts
from mpo.training.start import compute_dtype
from mpo.training.store import FEATURES, KIND, META_FILE, own_folder

logger = logging.getLogger(__name__)


def vision_fingerprint(
    model: nn.Module,
    processing_class: Any,
    *,
    projected: bool,
    dtype: torch.dtype,
    device: str,
    is_cast: bool = False,
    autocast: bool = False,
) -> Fingerprint:
    """Compute the fingerprint of the features of images: everything that they depend on besides an image and its tile limits.

    Args:
        model: the model, wrapped or not, before it is sharded.
        projected: whether features are the projector's output.
        dtype: dtype and ...
        device: ... type of device that the model computes in and on.
        is_cast: whether the weights are cast to that dtype, instead of computing with autocast.
        autocast: whether the model computes with autocast.

    Raises:
        ValueError: when weights are sharded or not loaded.
    """
    base = base_model(model)
    modules = vision_modules(base.base_model, projected=projected)
    weight = next(modules.parameters())
    config = base.config.to_dict() if projected else {"vision_config": base.config.vision_config.to_dict()}
    config |= {name: getattr(base.config, name, None) for name in ("vision_feature_layer", "fuser_layers")}
    unread = {"text_config", "image_token_id", "model_type", "tie_word_embeddings"}
    settings = plain({name: value for name, value in config.items() if name not in unread}, "the model's config")
    named = {name.replace("_orig_mod.", ""): module for name, module in modules.named_modules() if not hasattr(module, "_orig_mod")}
    kinds = {name: f"{type(module).__name__}({module.extra_repr()})" for name, module in named.items()}
    settings["modules"] = hash_settings([module_settings(modules), kinds])
    software = {"Pillow": PIL.__version__, "torchvision": torchvision.__version__, "transformers": transformers.__version__}
    parts = {
        KIND: FEATURES,
        "vision weights": hash_weights(modules),
        "vision config": hash_settings(settings),
        "features": "after the projector" if projected else "before the projector",
        # On a GPU float32 may be multiplied as TF32.
        "compute dtype": str(dtype).removeprefix("torch.")
        + (", cast weights" if is_cast else "")
        + (", autocast" if autocast and (is_cast or weight.dtype == dtype) and not _norms_feed_products(base) else "")
        + (", tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else ""),
        "device": device,
        "image processor": processor_parts(processing_class)["image processor"],
        "software": hash_settings(software),
    }
    about = {"model": type(base).__name__, "name_or_path": str(base.config._name_or_path)}
    return Fingerprint(parts, {"vision config": settings, "software": software}, about)


def _norms_feed_products(base: Any) -> bool:
    """Whether autocast leaves the features of 16-bit weights as they are.

    On a GPU it returns norms in float32. A product rounds them as they would have been; but a CLIP adds all layers to one.
    """
    tower, fused = find_tower(base), getattr(base.config, "fuser_layers", None)
    return known_family(base.config).tiled and not fused and isinstance(getattr(tower, "layernorm", None), nn.Identity)


def why_not_cached(model: nn.Module, processing_class: Any) -> str | None:
    """Why the features of a model's vision tower cannot be cached; None if they can."""
    base = base_model(model)
    if any(hasattr(parameter, "ds_id") for parameter in base.parameters()):
        return "ZeRO-3 shards the weights while they are loaded (use launch=zero2 or fsdp2)"
    if not known_family(base.config).one_size or tile_size(processing_class) is None:
        kind = f"a {base.config.model_type!r} with a {type(processing_class).__name__}"
        return f"{kind} is not an InternVL or a LLaVA-1.5, whose images or tiles all have one size in pixels"
    return _why_changing(base.base_model, projected=False)


def is_projector_frozen(model: nn.Module) -> bool:
    """Whether features can be those after the projector."""
    return _why_changing(base_model(model).base_model, projected=True) is None


def _why_changing(backbone: Any, *, projected: bool) -> str | None:
    modules = vision_modules(backbone, projected=projected)
    for name, module in modules.named_modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            return f"{name} is adapted"
    return why_not_frozen(modules)


class CachedTower:
    """A frozen vision tower and the cache of its features.

    Args:
        cache: the features that are known.
        backbone: model without its head, whose tower, and projector if `projected`, encode what the cache lacks.
        autocast: makes the context that the model computes in.
    """

    def __init__(self, cache: FeatureCache, backbone: Any, *, projected: bool, autocast: Callable[[], Any] = nullcontext) -> None:
        self.cache, self.backbone, self.projected, self._autocast = cache, backbone, projected, autocast

    def complete(self, found: ImageFeatures, device: torch.device) -> Tensor:
        """Return all features of a batch on a device, shape (T tiles, tokens, channels). Computes and adds what the cache lacks."""
        index = found.index.to(device)
        if found.pixels is None and found.known is not None:
            return found.known.to(device, non_blocking=True).index_select(0, index)
        parts, begin = [], {True: 0, False: 0}
        for one in found.images:
            source: Any = found.known if one.known else found.pixels
            values = source[begin[one.known] : (end := begin[one.known] + one.tiles)].to(device)
            begin[one.known] = end
            # An image at a time: its features then depend on nothing else, in any batch, on any rank, in a resumed run.
            parts.append(values if one.known else self._encoded(one, values))
        self.cache.flush()
        return torch.cat(parts).index_select(0, index)

    def _encoded(self, one: OneImage, pixels: Tensor) -> Tensor:
        if (since := self.cache.find(one.key)) is not None:  # another batch had it
            return self.cache.read([since]).to(pixels.device)
        modules = vision_modules(self.backbone, projected=self.projected)
        with torch.no_grad(), eval_mode(modules), self._autocast():
            features = encode_tiles(self.backbone, pixels, projected=self.projected)
        self.cache.add(one.key, one.image, one.size, features)
        return features


def cached_tower(model: nn.Module, processing_class: Any, folder: str | Path) -> CachedTower:
    """Give a model that is not trained, on its device, the features in the folder of a cache, which trainings may share.

    Features before the projector serve all models with this tower. Those after it are used where the cache has them. Tower and
    projector take no gradients any more. Raises ValueError where features depend on more than their image.
    """
    base = base_model(model)
    vision_modules(base.base_model, projected=True).requires_grad_(False)
    if (reason := why_not_cached(model, processing_class)) is not None:
        raise ValueError(f"Cached vision features are not possible for {base.config._name_or_path}: {reason}. Use no cache for it.")
    how: dict[str, Any] = {"dtype": base.dtype, "device": base.device.type}
    fingerprint, projected = vision_fingerprint(model, processing_class, projected=False, **how), False
    if is_projector_frozen(model):
        after = vision_fingerprint(model, processing_class, projected=True, **how)
        if (own_folder(Path(folder).expanduser(), after) / META_FILE).is_file():
            fingerprint, projected = after, True
    take_features(base.base_model, projected=projected)
    # The limit of the folder is its runs', which is not known here: nothing of theirs is removed.
    return CachedTower(FeatureCache(folder, fingerprint, limit_bytes=math.inf), base.base_model, projected=projected)


def with_cached_features(generator: LocalGenerator, folder: str | Path | None) -> LocalGenerator:
    """Return a generator with its settings and the features of `cached_tower`, or, without a folder, the same generator."""
    return generator if folder is None else generator.with_tower(cached_tower(generator.model, generator.processor, folder))


class UsesFeatures(Trainer):  # type: ignore[misc]
    """Give the models features from a cache in place of pixels; what it lacks is computed, once."""

    data_collator: Any
    _collator_is_ours: bool
    _cached_tower: CachedTower | None = None

    def _open_features(self, others: bool = False) -> None:
        """Open the run's cache, if any (`others`: the reference is no copy); refuse features that more than an image decides."""
        args, models = self.args, [base_model(self.accelerator.unwrap_model(model)) for model in self._all_models()]
        if args.vision_features == "live":
            return
        reason = why_not_cached(models[0], self.processing_class)
        if not self._collator_is_ours:
            reason = "the run has a data_collator of its own"
        if reason is not None:
            raise ValueError(f"vision_features='cached' is not possible here: {reason}. Use vision_features='live'.")
        refuse_augmented(self.train_dataset, AUGMENTED_FEATURES)
        backbone, projected, dtype = models[0].base_model, is_projector_frozen(models[0]), compute_dtype(models[0], args)
        # DeepSpeed and FSDP cast the weights when training begins, which autocast does not: other features, by 2 % in bfloat16.
        sharded, weights = not self._holds_whole_model(), vision_modules(backbone, projected=projected).parameters()
        is_cast = sharded and any(weight.dtype != dtype for weight in weights)
        self._how = {"projected": projected, "dtype": dtype, "device": args.device.type, "is_cast": is_cast}
        self._how["autocast"] = self.accelerator.native_amp
        fingerprint, *rest = (vision_fingerprint(each, self.processing_class, **self._how) for each in models[: 1 + others])
        if rest and (differences := fingerprint.differences(rest[0])):
            raise ValueError(
                f"vision_features='cached' is not possible here: ref_model has other features (ref_model -> model): "
                f"{'; '.join(differences)}. Use vision_features='live'."
            )
        folder = args.vision_feature_cache or default_folder(VISION_FEATURES)
        cache = FeatureCache(folder, fingerprint, limit_bytes=args.vision_feature_cache_gb * 1e9)
        if self.is_world_process_zero():
            logger.info(f"{cache.holds()}.")
        language = getattr(backbone, known_family(backbone.config).language)
        # Ranks lack different images, and a sharded tower would run on all ranks at once: each has a copy of its own.
        own = copy.deepcopy(backbone, {id(language): None}).to(args.device) if sharded else backbone
        own = own.to(dtype) if is_cast else own
        for model in models:
            take_features(model.base_model, projected=projected)
        self._cached_tower = CachedTower(cache, own, projected=projected, autocast=self.accelerator.autocast)
        self.data_collator = replace(self.data_collator, features=cache)

    def _check_features(self) -> None:
        """Refuse a tower that was unfrozen, and weights and settings that changed, after the cache was opened."""
        if self._cached_tower is None:
            return
        model = base_model(self.accelerator.unwrap_model(self.model))
        reason = _why_changing(model.base_model, projected=self._cached_tower.projected)
        if reason is not None:
            raise ValueError(f"vision_features='cached' holds features from before training, but {reason} now. Freeze it.")
        if self._cached_tower.backbone is not model.base_model:
            return  # a copy, whose original may be sharded and cast
        now = vision_fingerprint(model, self.processing_class, **self._how)
        if differences := now.differences(self._cached_tower.cache.fingerprint):
            raise ValueError(
                "vision_features='cached' has features of the model and processor that the trainer was made with, and they differ "
                f"now (then -> now): {'; '.join(differences)}. Make the trainer after that change, or use vision_features='live'."
            )

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate; see `mpo.training.evaluating`."""
        if not self.is_in_train:
            self._check_features()
        return super().evaluation_loop(*args, **kwargs)

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_checkpoint(*args, **kwargs)
        self._check_features()

    def _completed(self, batch: Batch) -> Batch:
        """Return a batch with all its features as one tensor, on the device. Computes and adds what the cache lacks."""
        found = batch.model_inputs.get(VISION_FEATURES)
        if self._cached_tower is None or not isinstance(found, ImageFeatures):
            return batch
        return replace(
            batch, model_inputs={**batch.model_inputs, VISION_FEATURES: self._cached_tower.complete(found, self.args.device)}
        )

"""Encode images outside of a model's forward pass, and give the model their features in place of pixels.

Features are the hidden states of the vision tower that the model reads, or the output of the projector, where that is frozen too.
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mpo.models.family import known_family
from mpo.models.tower import find_tower

KEYWORD = "vision_features"
"""Argument of the model's forward that takes the place of ``pixel_values``: features, shape (tiles, tokens, channels)."""


def vision_modules(backbone: Any, *, projected: bool) -> nn.ModuleDict:
    """Return the modules of a model without its head that features depend on; `projected`: they are the projector's output."""
    family = known_family(backbone.config)
    names = (family.vision, *((*family.fuser, *family.projector) if projected else ()))
    return nn.ModuleDict({name: module for name, module in backbone.named_children() if name in names})


def layers_read(config: Any) -> list[int]:
    """Return the hidden states of the tower that a model reads; -1 is its output."""
    last = config.vision_feature_layer
    layers = getattr(config, "fuser_layers", None)
    if layers is None:
        return list(last) if isinstance(last, (list, tuple)) else [last]
    return [*layers[:-1], -1 if last == -1 else layers[-1]]


def tile_shape(config: Any, *, projected: bool) -> tuple[int, int]:
    """Return the shape of a tile's features, (tokens, channels)."""
    vision = config.vision_config
    if projected and known_family(config).tiled:
        return config.image_seq_length, config.text_config.hidden_size
    (height, width), (down, across) = _sides(vision.image_size), _sides(vision.patch_size)
    tokens, has_class = (height // down) * (width // across), vision.model_type != "siglip_vision_model"
    if projected:
        return tokens + (has_class and config.vision_feature_select_strategy == "full"), config.text_config.hidden_size
    return tokens + has_class, vision.hidden_size * len(layers_read(config))


def _sides(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def encode_tiles(backbone: Any, pixels: Tensor, *, projected: bool) -> Tensor:
    """Encode tiles, shape (tiles, 3, height, width), to features, shape (tiles, tokens, channels).

    The channels of several hidden states are side by side.
    """
    if projected:
        features: Any = type(backbone).get_image_features(backbone, pixel_values=pixels, return_dict=True).pooler_output
        return features if isinstance(features, Tensor) else torch.stack(features)
    layers, normalized = layers_read(backbone.config), known_family(backbone.config).tiled  # a LLaVA never reads the tower's output
    deeper = {"output_hidden_states": True} if layers != [-1] or not normalized else {}
    found = find_tower(backbone)(pixels.to(backbone.dtype), return_dict=True, **deeper)  # type: ignore[misc]
    last = {-1: found.last_hidden_state} if normalized else {}
    return torch.cat([last[layer] if layer in last else found.hidden_states[layer] for layer in layers], dim=-1)


def take_features(backbone: Any, *, projected: bool) -> None:
    """Let a backbone take features (`KEYWORD`) in place of pixels; its tower, and if `projected` its projector, do not run then."""
    place = _place(backbone, projected)
    name = "get_image_features" if projected else "forward"
    usual = place.__dict__.get(_USUAL) or getattr(place, name)
    place.__dict__[_USUAL] = getattr(usual, "unshared", usual)  # without the sharing of an earlier trainer
    place.__dict__["layers_given"] = None if projected else layers_read(backbone.config)
    # An attribute of this instance, since FSDP needs modules and hooks unchanged; bound, so that a copy of the model has its own.
    setattr(place, name, MethodType(_given, place))
    if _PROJECTED not in backbone.__dict__:  # not by an earlier trainer
        backbone.register_forward_pre_hook(_take_keyword, with_kwargs=True)
    backbone.__dict__[_PROJECTED] = projected


_USUAL, _PROJECTED = "method_without_features", "features_are_projected"


def _place(backbone: Any, projected: bool) -> Any:
    return backbone if projected else getattr(backbone, known_family(backbone.config).vision)


def _take_keyword(backbone: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    _place(backbone, backbone.__dict__[_PROJECTED]).__dict__[KEYWORD] = features = kwargs.pop(KEYWORD, None)
    if features is not None:
        kwargs["pixel_values"] = features.new_empty(0, 3, *_sides(backbone.config.vision_config.image_size))
    return args, kwargs


def _given(place: Any, *args: Any, **kwargs: Any) -> Any:
    features, layers = place.__dict__.pop(KEYWORD, None), place.__dict__["layers_given"]
    if features is None:
        return place.__dict__[_USUAL](*args, **kwargs)
    if layers is None:
        pooled = features if known_family(place.config).tiled else list(features)  # as in transformers
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=pooled)
    states: list[Any] = [None] * (place.config.num_hidden_layers + 1)
    for layer, part in zip(layers, features.chunk(len(layers), dim=-1), strict=True):
        states[layer] = part
    return BaseModelOutputWithPooling(last_hidden_state=part, hidden_states=tuple(states))


def why_not_frozen(modules: nn.Module) -> str | None:
    """Why the output of modules is not a function of each tile alone that never changes; None if it is."""
    for name, parameter in modules.named_parameters():
        if parameter.requires_grad:
            return f"{name} is trained"
        if not parameter.is_floating_point() or parameter.element_size() < 2 or hasattr(parameter, "quant_state"):
            return f"{name} is quantized ({parameter.dtype}), so features depend on the other tiles of a batch, or on the kernel"
    for name, module in modules.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            return f"{name} normalizes over the batch"
        if getattr(module, "attention_dropout", 0) or (isinstance(module, nn.Dropout) and module.p):
            return f"{name} has dropout"
    return None

"""InternVL and LLaVA whose projector reads several layers of the vision tower, through an MMFuser or as concatenated channels.

Importing this module registers both with transformers' Auto classes. The models save and load as any other; a plain transformers
does not know their model type, and its classes refuse their configs.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLModel,
    InternVLProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaProcessor,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple

from mpo.models.family import INTERNVL, LLAVA, TEXT, known_family
from mpo.models.mmfuser import DeformableAttention, MMFuser, check_sizes, is_whole

FUSIONS = ("mmfuser", "concat")
NOTE = "is the query of a fuser: import mpo, and load by AutoModelForImageTextToText"
(PROJECTOR,) = INTERNVL.projector
assert (INTERNVL.vision, INTERNVL.projector, INTERNVL.language) == (LLAVA.vision, LLAVA.projector, LLAVA.language)


def evenly_spaced(query: int, levels: int) -> list[int]:
    """Indices of hidden states: `levels` shallow ones in equal steps up to the query's.

    >>> evenly_spaced(23, 4)  # as the published MMFusers on CLIP ViT-L/14-336
    [3, 8, 13, 18, 23]
    """
    step = (query - 1) // levels if levels > 0 else 0
    if step < 1:
        raise ValueError(f"Expected fuser_layers to be 1 to {query - 1} layers below layer {query}, which is read; got {levels}.")
    return [query - step * below for below in range(levels, -1, -1)]


def check_layers(layers: Any, depth: int, query: Any) -> list[int]:
    """The indices of the hidden states that are fused, from 0, which is the output of the tower's embeddings.

    `layers`: the indices, shallow to deep, the query's last; negative ones count from the end. Or the number of shallow layers,
    evenly spaced. `depth`: layers of the tower. `query`: the hidden state that the projector reads without a fuser.
    """
    if not is_whole(query) or not -depth <= query <= depth or query == 0:
        raise ValueError(f"Expected vision_feature_layer to be one of the {depth} layers, the query of the fuser; got {query!r}.")
    query %= depth + 1
    if is_whole(layers):
        return evenly_spaced(query, int(layers))
    if not isinstance(layers, Sequence) or isinstance(layers, str) or not all(map(is_whole, layers)):
        raise ValueError(f"Expected fuser_layers to be a number of layers or a list of indices; got {layers!r}.")
    if outside := [layer for layer in layers if not -depth - 1 <= layer <= depth]:
        raise ValueError(f"fuser_layers={list(layers)}: {outside} are not among the hidden states 0 to {depth} of the tower.")
    found = [int(layer) % (depth + 1) for layer in layers]
    if found != sorted(set(found)) or len(found) < 2:
        raise ValueError(f"Expected fuser_layers to be two layers or more, each once, shallow to deep; got {list(layers)}.")
    if found[-1] != query:
        raise ValueError(
            f"Expected fuser_layers to end with {query}, the query, which the projector reads (vision_feature_layer); got "
            f"{list(layers)}."
        )
    return found


@dataclass(kw_only=True)
class _FuserSettings:
    """How layers are fused.

    fuser_layers: as in `check_layers`; by default four and the query. fuser_heads, fuser_points: of the MMFuser. fusion:
    ``"mmfuser"``, or ``"concat"``, a wider projector that gets the channels of all these layers (arXiv 2503.06063).
    """

    fuser_layers: list[int] | int = 4
    fuser_heads: int = 16
    fuser_points: int = 4
    fusion: str = "mmfuser"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]  # of transformers' config
        config: Any = self
        self.fuser_layers = check_layers(self.fuser_layers, config.vision_config.num_hidden_layers, config.vision_feature_layer)
        if self.fusion not in FUSIONS:
            raise ValueError(f"Expected fusion to be {' or '.join(FUSIONS)}; got fusion={self.fusion!r}.")
        if self.fusion == "mmfuser":
            check_sizes(width=config.vision_config.hidden_size, num_heads=self.fuser_heads, num_points=self.fuser_points)

    def to_diff_dict(self) -> dict[str, Any]:
        """What is saved: with a note at which a class without fuser stops. It would leave out the fuser, and only warn."""
        saved: dict[str, Any] = super().to_diff_dict()  # type: ignore[misc]
        return saved | {"vision_feature_layer": f"{saved['vision_feature_layer']} {NOTE}"}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, without the note."""
        layer = config_dict.get("vision_feature_layer")
        given = {"vision_feature_layer": int(layer.removesuffix(NOTE))} if isinstance(layer, str) else {}
        return super().from_dict(config_dict | given, **kwargs)  # type: ignore[misc]


class InternVLFuserConfig(_FuserSettings, InternVLConfig):  # type: ignore[misc]
    """Config of `InternVLWithFuser`: InternVL's, with fuser_layers, fuser_heads, fuser_points and fusion."""

    model_type = "internvl_mmfuser"


class LlavaFuserConfig(_FuserSettings, LlavaConfig):  # type: ignore[misc]
    """Config of `LlavaWithFuser`: LLaVA's, with fuser_layers, fuser_heads, fuser_points and fusion."""

    model_type = "llava_mmfuser"


class _Fusing(PreTrainedModel):  # type: ignore[misc]
    """The backbone of both families, with a fuser between vision tower and projector."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        levels, width = len(config.fuser_layers) - 1, config.vision_config.hidden_size
        if config.fusion == "mmfuser":
            sizes = {"num_heads": config.fuser_heads, "num_points": config.fuser_points}
            self.fuser = MMFuser(width, num_levels=levels, **sizes)
        else:
            wide = copy.copy(config)
            wide.vision_config = copy.copy(config.vision_config)
            wide.vision_config.hidden_size = width * (levels + 1)
            setattr(self, PROJECTOR, type(getattr(self, PROJECTOR))(wide))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (MMFuser, DeformableAttention)):
            module.reset_parameters()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def get_image_features(
        self,
        pixel_values: Tensor,
        vision_feature_layer: int | None = None,
        vision_feature_select_strategy: str | None = None,
        output_hidden_states: Any = False,
        image_sizes: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As in transformers. A frozen tower builds no graph, and only the hidden states that are fused are kept."""
        config, tower = self.config, getattr(self, INTERNVL.vision)
        if vision_feature_layer not in (None, config.vision_feature_layer):
            known = f"vision_feature_layer={config.vision_feature_layer}"
            raise ValueError(f"Expected {known}, the fuser's query; got {vision_feature_layer}.")
        graph = pixel_values.requires_grad or any(parameter.requires_grad for parameter in tower.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and graph):
            wanted = bool(output_hidden_states) or config.fuser_layers
            found = tower(pixel_values.to(tower.dtype), output_hidden_states=wanted, return_dict=True, **kwargs)
        features = [found.hidden_states[index] for index in config.fuser_layers]
        if self._last_is_normalized and config.vision_feature_layer == -1:
            features[-1] = found.last_hidden_state
        strategy = vision_feature_select_strategy or config.vision_feature_select_strategy
        if strategy == "default":
            features = [feature[:, 1:] for feature in features]  # without class token
        patch = config.vision_config.patch_size
        patch = patch if isinstance(patch, Sequence) else (patch, patch)
        height, width = (pixels // side for pixels, side in zip(pixel_values.shape[-2:], patch, strict=True))
        if (tokens := features[-1].shape[1]) != height * width:
            raise ValueError(
                f"Expected {height} * {width} tokens a tile; got {tokens} with vision_feature_select_strategy={strategy!r}. It is "
                "default for a tower with a class token, and full for one without."
            )
        fused = self.fuser(features, (height, width)) if config.fusion == "mmfuser" else torch.cat(features, dim=-1)
        return BaseModelOutputWithPooling(
            last_hidden_state=found.last_hidden_state,
            pooler_output=self._projected(fused.unflatten(1, (height, width))),  # of each kind
            hidden_states=found.hidden_states if output_hidden_states else None,
            attentions=found.attentions,
        )


class InternVLFuserModel(_Fusing, InternVLModel):  # type: ignore[misc]
    """`InternVLModel` with fused features, which pixel shuffle and projector read."""

    config: InternVLFuserConfig
    _last_is_normalized = True  # its vision_feature_layer=-1 is the tower's output, after a last norm if it has one

    def _projected(self, features: Tensor) -> Any:
        return getattr(self, PROJECTOR)(self.pixel_shuffle(features, self.config.downsample_ratio).flatten(1, 2))


class LlavaFuserModel(_Fusing, LlavaModel):  # type: ignore[misc]
    """`LlavaModel` with fused features, which the projector reads."""

    config: LlavaFuserConfig
    _last_is_normalized = False

    def _projected(self, features: Tensor) -> Any:
        return list(getattr(self, PROJECTOR)(features.flatten(1, 2)))


class InternVLWithFuser(InternVLForConditionalGeneration):  # type: ignore[misc]
    """`InternVLForConditionalGeneration` with fused features. `add_fuser` makes one of an InternVL."""

    config: InternVLFuserConfig

    def __init__(self, config: InternVLFuserConfig) -> None:
        super(InternVLForConditionalGeneration, self).__init__(config)  # its own would build a backbone without fuser
        _build(self, InternVLFuserModel(config))


class LlavaWithFuser(LlavaForConditionalGeneration):  # type: ignore[misc]
    """`LlavaForConditionalGeneration` with fused features. `add_fuser` makes one of a LLaVA-1.5."""

    config: LlavaFuserConfig

    def __init__(self, config: LlavaFuserConfig) -> None:
        super(LlavaForConditionalGeneration, self).__init__(config)  # as above
        _build(self, LlavaFuserModel(config))


def _build(model: Any, backbone: Any) -> None:
    model.model, text = backbone, backbone.config.text_config
    model.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
    model.post_init()


KINDS: dict[str, tuple[Any, ...]] = {
    "internvl": (InternVLForConditionalGeneration, InternVLFuserConfig, InternVLFuserModel, InternVLWithFuser, InternVLProcessor),
    "llava": (LlavaForConditionalGeneration, LlavaFuserConfig, LlavaFuserModel, LlavaWithFuser, LlavaProcessor),
}
for _, _config, _backbone, _model, _processor in KINDS.values():
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _backbone, exist_ok=True)
    AutoModelForImageTextToText.register(_config, _model, exist_ok=True)
    AutoProcessor.register(_config, _processor, exist_ok=True)


def check_can_fuse(config: Any) -> None:
    """Refuse the config of a model with a fuser, without a vision tower, or of another kind than those of `KINDS`."""
    kind = config.model_type
    if any(kind == fused.model_type for _, fused, *_ in KINDS.values()):
        raise ValueError(f"The {kind} already has a fuser of the layers {config.fuser_layers}. Train it, or begin without one.")
    if known_family(config) is TEXT:
        raise ValueError(f"The {kind} has no vision tower, whose layers a fuser could read. Give one of {', '.join(KINDS)}.")
    if kind not in KINDS or known_family(config) not in (INTERNVL, LLAVA):
        raise ValueError(f"Expected a model of the type {' or '.join(KINDS)}, whose layers a fuser can read; got {kind!r}.")


def fused_config(
    config: Any, layers: int | Sequence[int] = 4, *, fusion: str = "mmfuser", num_heads: int = 16, num_points: int = 4
) -> Any:
    """The config of a model with a fuser, from that of the model without; arguments and errors as of `add_fuser`."""
    check_can_fuse(config)
    given = config.to_dict()
    return KINDS[config.model_type][1](
        **{name: given[name] for name in given if name not in ("model_type", "architectures", "vision_config", "text_config")},
        vision_config=copy.deepcopy(config.vision_config),  # building a model changes its attn_implementation
        text_config=copy.deepcopy(config.text_config),
        attn_implementation=config._attn_implementation,
        fuser_layers=layers,
        fuser_heads=num_heads,
        fuser_points=num_points,
        fusion=fusion,
    )


def add_fuser(
    model: Any,
    layers: int | Sequence[int] = 4,
    *,
    fusion: str = "mmfuser",
    num_heads: int = 16,
    num_points: int = 4,
    weights: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> Any:
    """Let the projector of an InternVL or LLaVA-1.5 read several layers of the vision tower.

    With an MMFuser the new model computes what the old one does, until it is trained. With ``"concat"`` the projector gets the
    channels of all layers, and weights of 0 for the new ones: a LLaVA computes the same, an InternVL does not, because the
    projector's layer norm spans all channels.

    Args:
        model: the model. The new one takes over its modules; do not use it afterwards.
        layers: number of shallow layers, evenly spaced; or indices of hidden states (0: the embeddings; negative ones count from
            the end), shallow to deep, of which the last is the layer that the projector reads now.
        fusion: ``"mmfuser"`` or ``"concat"``.
        num_heads: attention heads of the MMFuser.
        num_points: points per head and layer of the MMFuser.
        weights: weights of an official MMFuser (`MMFuser.from_official`), which decide the number of points.
        seed: random seed of new weights. The caller's random state is restored.

    Returns:
        an `InternVLWithFuser` or `LlavaWithFuser`.

    Raises:
        ValueError: for another kind of model, one without a vision tower or with a fuser, and for layers that are out of range,
            repeated, not in order, or not those of `weights`.
    """
    kind = _kind_of(model)
    if weights is not None and fusion != "mmfuser":
        raise ValueError(f"The weights are of an MMFuser, but fusion={fusion!r}. Leave one of the two out.")
    fuser = None if weights is None else MMFuser.from_official(weights, num_heads=num_heads)
    num_points = num_points if fuser is None else fuser.cross_attn.num_points
    config = fused_config(model.config, layers, fusion=fusion, num_heads=num_heads, num_points=num_points)
    levels, width = len(config.fuser_layers) - 1, config.vision_config.hidden_size
    if fuser is not None and (fuser.num_levels, fuser.width) != (levels, width):
        found, named = f"{fuser.num_levels} shallow layers and width {fuser.width}", f"fuser_layers={config.fuser_layers}"
        raise ValueError(f"The weights are of {found}; {named} are {levels} and the query, of width {width}.")
    with torch.device("meta"):
        fused = KINDS[kind][3](config)
    old, new = model.model, fused.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector = getattr(old, PROJECTOR)
        if fusion == "mmfuser":
            fuser = fuser or MMFuser(width, num_levels=levels, num_heads=num_heads, num_points=num_points)
            new.fuser = fuser.to(next(projector.parameters()))  # their device and type
        setattr(new, PROJECTOR, projector if fusion == "mmfuser" else _widened(getattr(new, PROJECTOR), projector, width))
    for name in (INTERNVL.vision, INTERNVL.language):
        setattr(new, name, getattr(old, name))
    config.vision_config, config.text_config = model.config.vision_config, model.config.text_config
    fused.lm_head, fused.generation_config = model.lm_head, model.generation_config
    fused.tie_weights()
    return fused.train(model.training)


def _kind_of(model: Any) -> str:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind is not None:
        check_can_fuse(model.config)
    if kind is None or not isinstance(model, KINDS[kind][0]):
        known = " or ".join(base.__name__ for base, *_ in KINDS.values())
        raise ValueError(
            f"Expected an {known} without adapters; got a {type(model).__name__} of type {kind!r}. Add the fuser before the "
            "adapter, or merge the adapter first."
        )
    if getattr(model, "is_quantized", False):
        raise ValueError("The model is quantized. Add the fuser to the full model, save it, and load that with its quantization.")
    return str(kind)


def _widened(wide: nn.Module, narrow: nn.Module, width: int) -> nn.Module:
    """A projector of several layers' channels that begins as one of the last of them: the others have a weight of 0."""
    wide = wide.to_empty(device=next(narrow.parameters()).device).to(next(narrow.parameters()).dtype)
    with torch.no_grad():
        for name, new in wide.named_parameters():
            old = narrow.get_parameter(name)
            if new.shape != old.shape:
                # A layer norm's weight is 1 as when new: were it 0 too, neither would get a gradient.
                new.fill_(float(new.dim() == 1 and name.endswith("weight")))
                blocks = old.shape[-1] // width  # neighbouring patches, by pixel shuffle
                new.unflatten(-1, (blocks, -1, width))[..., -1, :] = old.unflatten(-1, (blocks, width))  # type: ignore[no-untyped-call]
            else:
                new.copy_(old)
    return wide

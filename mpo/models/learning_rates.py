"""Learning rates per part of the model, with layer-wise decay in the vision tower."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from mpo.models.family import INTERNVL, Family, family_of
from mpo.models.parts import base_model


def learning_rate_of(
    name: str,
    *,
    rate: float,
    rates: Mapping[str, float],
    vision_layer_decay: float,
    vision_layers: int,
    family: Family = INTERNVL,
) -> float:
    """The learning rate of a parameter.

    With decay d, layer i of L in the vision tower has d^(L - i) of the tower's rate, its embeddings d^(L + 1): layer-wise decay as
    in BEiT (arXiv 2106.08254), with the projector in place of its head.

    Args:
        name: name of the parameter.
        rate: learning rate of parts without their own.
        rates: part -> learning rate.
        vision_layer_decay: d; 1 for no decay.
        vision_layers: L.
        family: of the model.

    >>> options = {"rate": 1e-5, "rates": {"vision": 1e-6}, "vision_layer_decay": 0.5, "vision_layers": 2}
    >>> learning_rate_of("vision_tower.encoder.layer.1.lambda_1", **options), learning_rate_of("lm_head.weight", **options)
    (5e-07, 1e-05)
    """
    part = family.part_of(name)
    own = rates.get(part, rate)
    if part != "vision" or vision_layer_decay == 1:
        return own
    depth = family.vision_depth(name)
    return own * float(vision_layer_decay ** (vision_layers + 1 if depth is None else vision_layers - depth))


def split_groups(
    optimizer: torch.optim.Optimizer, model: nn.Module, *, rate: float, rates: Mapping[str, float], vision_layer_decay: float
) -> None:
    """Split a new optimizer's parameter groups by learning rate; other settings of a group are kept.

    Args:
        optimizer: an optimizer without state.
        model: the model whose parameters it has.
        rate: as in `learning_rate_of`.
        rates: as in `learning_rate_of`.
        vision_layer_decay: as in `learning_rate_of`.

    Raises:
        ValueError: for a learning rate of a part that is not trained, and for a model of an unknown family.
    """
    setting = f"{next(iter(rates))}_learning_rate" if rates else "vision_layer_decay"
    family = family_of(base_model(model).config, setting)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    layers = 1 + max((number for name in names.values() if (number := family.vision_depth(name)) is not None), default=-1)
    trained = {family.part_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    for part in rates:
        if part not in trained:
            raise ValueError(
                f"{part}_learning_rate={rates[part]} has no effect: that part is frozen. Leave it out, or train the part."
            )
    if vision_layer_decay != 1 and "vision" not in trained:
        raise ValueError(f"vision_layer_decay={vision_layer_decay} has no effect: the vision tower is frozen. Leave it out.")
    groups = []
    for group in optimizer.param_groups:
        by_rate: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            own = learning_rate_of(
                names[id(parameter)],
                rate=rate,
                rates=rates,
                vision_layer_decay=vision_layer_decay,
                vision_layers=layers,
                family=family,
            )
            by_rate.setdefault(own, []).append(parameter)
        groups += [{**group, "lr": own, "params": parameters} for own, parameters in by_rate.items()]
    optimizer.param_groups[:] = groups

"""Recipes as Hydra composes them, with what is set in them; the choices of groups, which take its time, are composed once."""

import copy
import functools
from collections.abc import Sequence

from hydra import compose, initialize_config_module
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from mpo.commands.train import settable


def composed(overrides: Sequence[str], command: str = "train") -> dict:
    """The configuration of `mpo train` or another command with these words, without Hydra's own."""
    return OmegaConf.to_container(composition(overrides, command), resolve=True)


def composition(overrides: Sequence[str], command: str = "train") -> DictConfig:
    """The same before it is resolved."""
    words = [settable(word) for word in overrides]
    config = copy.deepcopy(_with_choices(command, *(word for word in words if not word.startswith("++"))))
    set_values = OverridesParser.create().parse_overrides([word for word in words if word.startswith("++")])
    ConfigLoaderImpl._apply_overrides_to_config(set_values, config)
    return config


@functools.cache
def _with_choices(command: str, *choices: str) -> DictConfig:
    with initialize_config_module("mpo.recipes", version_base="1.3"):
        return compose(command, list(choices))

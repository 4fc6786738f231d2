"""The models that a command asks, in this process or on a server."""

from typing import Any

from mpo.commands.flags import Args, refuse

LOCAL = {"base", "device", "dtype", "vision_feature_cache"}
"""Flags for a model in this process."""
AT_SERVER = {"model_name", "prices"}


def refuse_unfit(args: Args, *models: str) -> None:
    """Refuse flags that none of the models, by names or addresses, takes, and workers that would each load one of them."""
    from mpo.generation.generator import is_server

    local, given = [model for model in models if not is_server(model)], vars(args).keys()
    if not local:
        from mpo.generation.endpoint import shown_address

        server = shown_address(models[0])  # without a password
        refuse(args, LOCAL & given, f"is for a model in this process, and {server} is a server, which has loaded its own")
    if len(local) == len(models):
        refuse(args, AT_SERVER & given, f"needs the address of a server, and the model is {models[0]}")
    if local and (getattr(args, "workers", None) or 1) > 1:
        refuse(args, ["workers"], f"needs a server, which they share; each would load {local[0]}")


def open_model(args: Args, model: str, max_tiles: int | None = None) -> Any:
    """Open a model, by its name or address, with the flags that the command has (`refuse_unfit`); a generator."""
    from mpo.generation.generator import is_server

    given = vars(args)
    if is_server(model):
        from mpo.generation.server import ServerGenerator

        return ServerGenerator(model, given.get("model_name"), max_tiles=max_tiles, prices=given.get("prices"))
    from mpo.generation.open import open_local
    from mpo.training.features.use import with_cached_features

    how = {"base": given.get("base"), "dtype": given.get("dtype") or "auto", "device": args.device}
    return with_cached_features(open_local(model, max_tiles=max_tiles, **how), given.get("vision_feature_cache"))

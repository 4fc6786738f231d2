"""The reference of a run with adapters: the trained model, with the values from before its first step.

A fresh adapter computes the same as its base, so the reference is the base: adapters are disabled, and parameters trained outside
of them (biases with ``bias="all"``) have their start values. An adapter that is trained further, or whose initialization changes
the base weights (PiSSA, OLoRA), stays enabled, and all trained parameters have their start values. Neither case depends on the
adapter's method or name.
"""

import contextlib
import hashlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftMixedModel, PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import TrainableTokensWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

START_FILE = "reference_start.safetensors"
"""File of a checkpoint with the start values that the reference needs."""

_METHODS = {
    PeftType.ADALORA: "its ranks are set by a schedule (update_and_allocate) that this training loop does not run; use LoRA",
    PeftType.XLORA: "it mixes trained adapters by a router, so it does not start at the base; use LoRA",
    PeftType.LILY: "its router averages over the batch, so a completion's log-prob depends on the others; use LoRA",
    PeftType.ADAPTION_PROMPT: "it supports some text models only, and not the fused output head; use LoRA",
    PeftType.POLY: "its forward needs task_ids, which preference records do not have; use LoRA",
}
_CHANGES = "it is computed from data and changes the base, so its folder does not match the base; use 'pissa' or True"
_INITS = {
    "loftq": "it replaces the base by a quantized copy that its folder lacks; use True, or peft=qlora",
    "eva": "it is computed from data (peft.initialize_lora_eva_weights); make the PeftModel with it and pass that as the model",
    "corda": _CHANGES,
    "lora_ga": _CHANGES,
    "pissa_niter": "it is random at every load, so its folder would not give the trained model; use 'pissa', which is exact",
}
_ELSEWHERE = "so the policy would not start at its reference, the base model"


class AdapterStart:
    """Keep the start values of what a run with adapters trains, and compute with them.

    Args:
        model: the model with its adapters, before training and before it is sharded.
        names: names of the trained parameters that the reference reads.
        adapters_on: whether the reference has the adapters, with their start values; otherwise they are disabled.
        base_changed: whether the adapter's initialization changed the base weights (PiSSA, OLoRA).
    """

    def __init__(self, model: nn.Module, names: Iterable[str], *, adapters_on: bool, base_changed: bool = False) -> None:
        wanted = set(names)
        self.adapters_on, self.base_changed = adapters_on, base_changed
        self.values = {name: p.detach().clone() for name, p in model.named_parameters() if name in wanted}
        self._frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        self._local: dict[str, Tensor] = {}

    @contextlib.contextmanager
    def restored(self, model: PeftModel) -> Iterator[None]:
        """Restore the start values of `model`, which FSDP2 may have sharded, within the context; then it is bitwise as before.

        The graph of an earlier forward pass remains valid, since its values are back before the backward pass. Raises ValueError
        when a weight that was frozen at the start is trained now, since it has no start value.
        """
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and _plain_name(name) in self._frozen:
                raise ValueError(
                    f"{name} was frozen when the trainer was made and requires_grad now, so training would change the reference, "
                    "which reads it. Unfreeze it before (peft's modules_to_save trains whole modules), or pass a "
                    "ref_model."
                )
        with contextlib.nullcontext() if self.adapters_on else model.disable_adapter():
            if not self.values:
                yield
                return
            # Gathered modules stay gathered for a backward pass. The others may be gathered in here, with start values.
            sharded = [module for module in model.modules() if isinstance(module, FSDPModule) and _is_sharded(module)]
            self._exchange(model)
            try:
                yield
            finally:
                for module in sharded:
                    module.reshard()
                self._exchange(model)

    def _exchange(self, model: PeftModel) -> None:
        torch.clear_autocast_cache()  # it may hold 16-bit copies of the values that change
        parameters = {_plain_name(name): parameter.data for name, parameter in model.named_parameters()}
        for name in self.values:
            whole = parameters[name]
            data = whole.to_local() if isinstance(whole, DTensor) else whole
            held = self._held(name, whole, data)
            now = data.clone()
            data.copy_(held)
            held.copy_(now)

    def _held(self, name: str, whole: Tensor, data: Tensor) -> Tensor:
        held = self._local.get(name)
        if held is None or (held.shape, held.device, held.dtype) != (data.shape, data.device, data.dtype):
            held = self.values[name].to(device=data.device, dtype=data.dtype)
            if isinstance(whole, DTensor):
                held = distribute_tensor(held, whole.device_mesh, whole.placements).to_local().clone()
            elif held.dtype == self.values[name].dtype:
                self.values[name] = held  # one copy
            self._local[name] = held
        return held

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the start values into a checkpoint."""
        if self.values:
            Path(folder).mkdir(parents=True, exist_ok=True)
            save_file({name: value.contiguous().cpu() for name, value in self.values.items()}, Path(folder, START_FILE))

    def restore(self, folder: str | os.PathLike[str], *, fixed: str | None = None) -> None:
        """Load the start values of the run that wrote a checkpoint; `fixed`: why others than the current ones cannot be loaded.

        Raises ValueError when the checkpoint has none, or those of other parameters, or values that cannot be loaded.
        """
        if not self.values:
            return
        path = Path(folder, START_FILE)
        saved = load_file(path) if path.exists() else {}
        if saved.keys() != self.values.keys():
            raise ValueError(
                f"{path} does not hold the start values of this run's {len(self.values)} trained tensors, so the reference is "
                "unknown. Resume with the adapter that the run started with, or pass the folder's adapter to a new run."
            )
        for name, value in saved.items():
            now = self.values[name]
            if fixed is not None and not torch.equal(value.to(now), now):
                raise ValueError(
                    f"The run that wrote {folder} started from another {name}; {fixed}. Make the model as that run did (same base, "
                    "same adapter, same seed)."
                )
            self.values[name] = value.to(now)
        self._local.clear()


def adapted(
    model: nn.Module, config: PeftConfig, wrap: Callable[[nn.Module, PeftConfig], PeftModel]
) -> tuple[PeftModel, AdapterStart]:
    """Add a fresh adapter to a model without one by `wrap` (`get_peft_model`); return the start values that its reference needs.

    Raises ValueError for a method that does not start at the base model, by name.
    """
    _check_method(config, fresh=True)
    init = str(getattr(config, "init_lora_weights", "")).lower()
    if init in ("pissa", "olora") and (getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)):
        raise ValueError(
            f"init_lora_weights={init!r} decomposes the base weights, and the rest would be quantized again, so the "
            "policy would not start at its base. Use True with a quantized base."
        )
    before = {id(parameter): _checksum(parameter) for parameter in model.parameters()}
    with warnings.catch_warnings():
        # peft asks by a name that transformers 5.24 deprecates, of which a user can change nothing.
        warnings.filterwarnings("ignore", ".*checkpointing.* is deprecated", FutureWarning)
        with_adapter = wrap(model, config)
    _check_head(with_adapter)
    parameters = dict(with_adapter.named_parameters())
    same = sum(before.get(id(parameter)) == _checksum(parameter) for parameter in parameters.values() if id(parameter) in before)
    changed = same < len(before)
    names = [name for name, p in parameters.items() if p.requires_grad and (changed or id(p) in before)]
    if config.peft_type == PeftType.LORA and config.bias != "none":
        # Switched off they are trained biases still; here these have their start values.
        warnings.filterwarnings("ignore", message="Careful, disabling adapter layers with bias configured to be")
    return with_adapter, AdapterStart(with_adapter, names, adapters_on=changed, base_changed=changed)


def continued(model: PeftModel) -> AdapterStart:
    """Return the start values that the reference of a model with adapters needs: the current ones.

    Raises ValueError for adapters that cannot be trained further, or that start elsewhere, by name.
    """
    if isinstance(model, PeftMixedModel):
        raise ValueError("A PeftMixedModel cannot be saved. Pass a PeftModel.")
    if "ref" in model.peft_config:
        raise ValueError(
            "The model has an adapter named 'ref', TRL's name for a reference, but the reference is the model as it is passed. For "
            "another one pass a ref_model; otherwise call model.delete_adapter('ref')."
        )
    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and module.merged:
            raise ValueError("An adapter is merged into the model, so it would not be trained. Call model.unmerge_adapter() first.")
    for name in model.active_adapters:
        _check_method(model.peft_config[name], fresh=False)
    _check_head(model)
    return AdapterStart(model, [name for name, p in model.named_parameters() if p.requires_grad], adapters_on=True)


def _check_method(config: PeftConfig, *, fresh: bool) -> None:
    """Refuse adapters without an exact reference, or whose folder does not give the trained model; `fresh`: a new one."""
    method = getattr(config.peft_type, "value", config.peft_type)
    init = str(getattr(config, "init_lora_weights", "")).lower()
    refused = {f"{method} adapters": _METHODS.get(config.peft_type)}
    if fresh or init != "eva":
        refused[f"init_lora_weights={init!r}"] = _INITS.get("pissa_niter" if init.startswith("pissa_niter") else init)
    if fresh and config.is_prompt_learning:
        fix = "use LoRA, or train a PeftModel with finished virtual tokens further"
        refused[f"{method} adapters"] = f"it puts virtual tokens before the prompt, {_ELSEWHERE}; {fix}"
    for name, value in vars(config).items() if fresh else ():
        if name.startswith("init") and name.endswith("weights") and value is False:
            refused[f"{name}=False"] = f"it starts the {method} adapter at random, {_ELSEWHERE}; use {name}=True"
    for what, reason in refused.items():
        if reason is not None:
            raise ValueError(f"{what} cannot be trained here: {reason}.")


def _check_head(model: PeftModel) -> None:
    head = model.get_output_embeddings()
    if isinstance(head, TrainableTokensWrapper):
        setting = "trainable_token_indices reaches"
        fix = "use modules_to_save=['embed_tokens', 'lm_head'] to train both as a whole"
    elif not isinstance(head, BaseTunerLayer):
        return
    elif any(getattr(config, "ensure_weight_tying", False) for config in model.peft_config.values()):
        setting, fix = "ensure_weight_tying=True puts the embeddings' adapter on", "leave it out"
    else:
        setting = "target_modules puts an adapter on"
        fix = "take the head out of them; modules_to_save=['lm_head'] trains it as a whole"
    raise ValueError(f"{setting} the output head, whose weight the loss reads directly, without adapters: {fix}.")


def identity(model: nn.Module, *, frozen: bool = False) -> str:
    """Return a checksum of unsharded weights (`frozen`: of those not trained), by which a resumed run checks its start."""
    checksums = [(name, _checksum(p)) for name, p in model.named_parameters() if not (frozen and p.requires_grad)]
    return hashlib.blake2b(repr(checksums).encode(), digest_size=16).hexdigest()


def has_tuner_layers(model: nn.Module) -> bool:
    """Whether adapters were put into a model."""
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def _is_sharded(module: Any) -> bool:
    """Whether what an FSDPModule shards itself, not the ones inside it, is sharded now rather than gathered."""
    return any(isinstance(parameter, DTensor) for parameter in _own_parameters(module))


def _own_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    yield from module.parameters(recurse=False)
    for child in module.children():
        if not isinstance(child, FSDPModule):
            yield from _own_parameters(child)


def _plain_name(name: str) -> str:
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def _checksum(tensor: Tensor) -> Any:
    data = tensor.detach()
    if data.device.type not in ("cpu", "cuda", "meta"):
        data = data.cpu()
    if data.is_meta or data.numel() == 0 or isinstance(data, DTensor):
        return tuple(data.shape)
    data = data.contiguous()
    if data.storage_offset() * data.element_size() % 8:  # words are read at multiples of 8 bytes alone
        data = data.clone()
    bits = data.view(-1).view(torch.uint8)
    words = bits[: len(bits) // 8 * 8].view(torch.int64)
    # Two words that are the same cancel out in the first; the second is a sum modulo 2^64.
    parts = [torch.hash_tensor(words).view(torch.int64), words.sum()] if len(words) else []
    return tuple(data.shape), *(int(part) for part in parts), bits[len(words) * 8 :].tolist()

"""Run one training step of a model without memory, and count what its tensors would take.

The model is on the meta device, where operators compute shapes and dtypes only; a dispatch mode sees every tensor that they make
and when it is freed. What the planned device would do differently is put in place of what the meta device does: the products that
autocast casts, flash attention, the varlen kernel of packed rows, and the Triton kernels of TRL's LM head.

`torch._subclasses.FakeTensorMode` gives the same sums (within 4 % of these on the 19 cases of ``benchmarks/memory.py``), but
takes three times as long, 3 to 11 s instead of 1 to 3; and tensors of its device ``cuda`` have no backward pass on a machine
without a GPU ("hasPrimaryContext expects a valid device index", PyTorch 2.14).

Private names of other libraries, checked on TRL 1.16: `trl.kernels.chunked_logprob._forward_tile`, `_backward_tile` and
`_addmm_fp32`, `trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE`.
"""

import contextlib
import copy
import os
import warnings
import weakref
from collections.abc import Callable, Mapping
from itertools import groupby
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers.modeling_layers import GradientCheckpointingLayer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, add_fused_lm_head

from mpo.batching import attention
from mpo.batching.attention import use_packed_attention
from mpo.batching.batch import Batch
from mpo.batching.logits_to_keep import add_logits_to_keep
from mpo.batching.randomness import disable_dropout, eval_mode
from mpo.encoding.images import add_tile_order
from mpo.models.features import layers_read
from mpo.models.packable import find_text_model
from mpo.models.parts import base_model
from mpo.models.tower import SharedTower, can_share, tower_layers

INPUTS = ("input_ids", "position_ids", "segments", "positions_to_keep", "shift_labels", "pixel_values", "tile_order")
INPUTS += ("image_grid_thw", "image_sizes")
"""The fields of a batch that the model gets. The attention mask of padded rows is left out: it is read by value."""
CAST_DOWN = ("linear", "matmul", "__matmul__", "mm", "bmm", "addmm", "baddbmm", "conv1d", "conv2d", "conv3d")
CAST_DOWN += ("scaled_dot_product_attention",)
CAST_UP = ("layer_norm", "group_norm", "softmax")
"""Functions that autocast computes in half precision, and on GPUs in float32 (``torch.amp``, "Autocast Op Reference")."""

CASTS = "casts of weights"
KEPT, PHASE = "kept", "phase"


class StepMemory(NamedTuple):
    """Bytes of the tensors that a step makes, without weights, gradients that stay, and optimizer state.

    ``kept``: of the activations at the end of the forward pass, by part of the model, and of the weights that autocast has cast to
    half precision (`CASTS`). ``phases``: the largest sum at once in each phase of the step, with the gradients so far.
    """

    kept: dict[str, int]
    phases: dict[str, int]


def trace_step(
    model: nn.Module,
    batch: Any,
    args: Any,
    part_of: Callable[[str], str],
    *,
    gpu: bool,
    reference: bool,
    gradients: Callable[[Tensor], float],
    dtype: torch.dtype | None = None,
    layers: int = 2,
) -> StepMemory:
    """Run the policy's forward pass, the reference's while the policy's activations are kept, and the backward pass.

    Of equal layers after one another `layers`, 2 or more, are run; each sum grows by the same amount with every further one.

    `model` is the policy on the meta device, with its adapters, which is not changed; `part_of` maps a module's name to the title
    of its part. `gpu`: count what an NVIDIA GPU would allocate; otherwise a CPU. `reference`: the step runs one, the policy or a
    copy of it. `gradients` gives the bytes that stay on this rank after the gradient of a parameter is computed; `dtype` is that
    of the weights during the step, if it is not theirs.
    """
    runs = _equal_layers(model)
    lengths = [min(len(run), layers) for run in runs]

    def traced(lengths: list[int]) -> dict[tuple[str, ...], int]:
        left_out = {id(layer): layer for run, length in zip(runs, lengths, strict=True) for _, layer in run[length:]}
        shorter = copy.deepcopy(model, left_out)  # which are not copied: of 80 layers two are needed
        places = _cut(shorter, lengths)
        return _trace(shorter.to(dtype), batch, args, part_of, places, gpu=gpu, reference=reference, gradients=gradients)

    short = traced(lengths)
    sums = dict(short)
    for index, run in enumerate(runs):
        if left := len(run) - lengths[index]:
            longer = traced([length + (index == other) for other, length in enumerate(lengths)])
            sums = {key: size + left * (longer[key] - short[key]) for key, size in sums.items()}
    phases: dict[str, int] = {}
    for key, size in sums.items():
        if key[0] == PHASE:
            phases[key[1]] = max(phases.get(key[1], 0), size)
    return StepMemory({key[1]: size for key, size in sums.items() if key[0] == KEPT}, phases)


def fields_of(batch: Batch) -> dict[str, Any]:
    """The fields of a batch that the model or its head gets, by name: the only place where the dry run looks into one."""
    return {**batch.model_inputs, "positions_to_keep": batch.positions_to_keep, "shift_labels": batch.shift_labels}


def _trace(
    model: Any,
    batch: Any,
    args: Any,
    part_of: Callable[[str], str],
    places: Mapping[nn.Module, str],
    *,
    gpu: bool,
    reference: bool,
    gradients: Callable[[Tensor], float],
) -> dict[tuple[str, ...], int]:
    autocast = (torch.bfloat16 if args.bf16 else torch.float16) if args.bf16 or args.fp16 else None
    base = base_model(model)
    add_fused_lm_head(base, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    add_logits_to_keep(base.base_model)
    add_tile_order(base.base_model)
    if args.disable_dropout:
        disable_dropout(model)
    inputs = {name: value.to("meta") for name, value in fields_of(batch).items() if name in INPUTS}
    if inputs.get("segments") is not None:
        use_packed_attention(model, "segments" if args.packed_attention == "segments" else "auto")
    tower = SharedTower(model, model) if can_share(model) else None
    checkpointing: dict[str, Any] = {"use_reentrant": False}
    live = _Live(model)
    planned = _Planned(autocast, gpu, live)
    with contextlib.ExitStack() as stack:
        for replaced in _kernels(autocast, gpu, base):
            stack.enter_context(replaced)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        if args.gradient_checkpointing:
            checkpointing["context_fn"] = lambda: (contextlib.nullcontext(), _Planned(autocast, gpu, live))
            base.gradient_checkpointing_enable(checkpointing)
            if hasattr(model, "disable_adapter"):
                base.enable_input_require_grads()
        model.train()
        live.follow(base, part_of, places)
        live.free_gradients(model, gradients)
        stack.enter_context(planned)
        stack.enter_context(live)
        output: Tensor = model(**inputs, use_cache=False, fused_lm_head=True).log_probs
        kept = {(KEPT, part): size for part, size in live.kept().items()}
        if reference:
            live.phase = ("reference's forward pass",)
            with contextlib.ExitStack() as frozen:
                frozen.enter_context(torch.no_grad())
                frozen.enter_context(eval_mode(model))
                frozen.enter_context(disable_gradient_checkpointing(base, checkpointing))
                if hasattr(model, "disable_adapter"):
                    frozen.enter_context(model.disable_adapter())
                if tower is not None:
                    frozen.enter_context(tower.playing())
                model(**inputs, use_cache=False, fused_lm_head=True)
        planned.casts.clear()
        live.phase = ("LM head, backward pass",)
        output.sum().backward()  # type: ignore[no-untyped-call]
    return kept | {(PHASE, *phase): size for phase, size in live.phases.items()}


def _equal_layers(model: nn.Module) -> list[list[tuple[nn.ModuleList, nn.Module]]]:
    """Equal layers after one another, each with the stack that it is in; not of a tower whose layers are read by their number."""
    config = base_model(model).config
    read = layers_read(config) if hasattr(config, "vision_feature_layer") else []
    whole = set() if {-1, -2}.issuperset(read) else set(tower_layers(model))

    def kind(layer: nn.Module) -> Any:
        return type(layer), *((name, w.shape, w.dtype, w.requires_grad) for name, w in layer.named_parameters())

    stacks = (module for module in model.modules() if isinstance(module, nn.ModuleList) and whole.isdisjoint(module))
    stacks = (stack for stack in stacks if all(isinstance(layer, GradientCheckpointingLayer) for layer in stack))
    return [[(stack, layer) for layer in run] for stack in stacks for _, run in groupby(stack, kind)]


def _cut(model: nn.Module, lengths: list[int]) -> dict[nn.Module, str]:
    """Keep the first layers of runs of equal ones. Return their runs and places: only those between first and last grow evenly."""
    kept: dict[nn.ModuleList, list[nn.Module]] = {}
    places = {}
    for number, (run, length) in enumerate(zip(_equal_layers(model), lengths, strict=True)):
        for index, (stack, layer) in enumerate(run[:length]):
            kept.setdefault(stack, []).append(layer)
            places[layer] = f"{number}, {'first' if index == 0 else 'last' if index == length - 1 else 'between'}"
    for stack, layers in kept.items():
        del stack[:]
        stack.extend(layers)
    return places


class _Live(TorchDispatchMode):
    """Count the bytes of the storages that exist at once."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.phases: dict[tuple[str, ...], int] = {}
        self.phase: tuple[str, ...] | None = None  # None: the forward pass of the part that runs
        self._given = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
        self._alive: dict[int, tuple[str, int]] = {}  # address of the storage: part of the model, bytes
        self._sum = 0
        self.parts = [""]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in (output,) if isinstance(output, Tensor) else tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        phase = self.phase or (f"{next(part for part in reversed(self.parts) if part != CASTS)}, forward pass",)
        self.phases[phase] = max(self.phases.get(phase, 0), self._sum)
        return output

    def _see(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address not in self._alive and address not in self._given:
            self._alive[address] = (self.parts[-1], size)
            self._sum += size
            weakref.finalize(storage, self._forget, address)

    def _forget(self, address: int) -> None:
        self._sum -= self._alive.pop(address)[1]

    def kept(self) -> dict[str, int]:
        """Bytes that are allocated now, by part of the model."""
        found: dict[str, int] = {}
        for part, size in self._alive.values():
            found[part] = found.get(part, 0) + size
        return found

    def follow(self, model: Any, part_of: Callable[[str], str], places: Mapping[nn.Module, str]) -> None:
        """Know what runs: forward by hooks of the parts' modules, backward by the gradients of their outputs and of layers'."""
        text = find_text_model(model)
        parts = {name: part_of(name) for name, _ in model.named_modules()}
        self.parts = [parts[""]]
        for name, module in model.named_modules():
            phase = (f"{parts[name]}, backward pass", *([places[module]] if module in places else []))
            if module is text or (name and parts[name] not in (parts[name.rpartition(".")[0]], "adapters")):
                module.register_forward_pre_hook(lambda *_, part=parts[name]: self.parts.append(part))
                module.register_forward_hook(lambda *_: self.parts.pop() and None, always_call=True)
            elif module not in places:
                continue
            module.register_forward_hook(lambda *given, phase=phase: self._expect_gradient(given[-1], phase))

    def _expect_gradient(self, output: Any, phase: tuple[str, ...]) -> None:
        leaves = tree_leaves(dict(output) if isinstance(output, Mapping) else output)
        tensor = next((leaf for leaf in leaves if isinstance(leaf, Tensor)), None)
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            tensor.register_hook(lambda _: setattr(self, "phase", phase))

    def free_gradients(self, model: nn.Module, size: Callable[[Tensor], float]) -> None:
        """Count each gradient by `size` once it is computed."""

        def free(parameter: Tensor) -> None:
            parameter.grad = None
            self._sum += int(size(parameter))

        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(free)


class _Planned(TorchFunctionMode):
    """Call functions as the planned device does: with autocast, which the meta device does not have, and flash attention."""

    def __init__(self, autocast: torch.dtype | None, gpu: bool, live: _Live) -> None:
        super().__init__()
        self.casts: dict[int, Tensor] = {}
        self._autocast, self._gpu, self._live = autocast, gpu, live

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if self._autocast is not None and name in CAST_DOWN:
            args, kwargs = tree_map(self._down, (args, kwargs))
        elif self._autocast is not None and self._gpu and name in CAST_UP:
            args, kwargs = tree_map(self._up, (args, kwargs))
        if name == "scaled_dot_product_attention":
            return _flash(*args, **kwargs)
        if name == "dropout":
            return self._dropout(*args, **kwargs)
        if name in ("grouped_mm", "_grouped_mm"):  # (rows, in) x (experts, in, out); on the meta device only in half precision
            return torch.mm(args[0], args[1][0])
        return func(*args, **kwargs)

    def _down(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == self._autocast:
            return value
        if not isinstance(value, nn.Parameter):
            return value.to(self._autocast)
        if id(value) in self.casts:
            return self.casts[id(value)]
        self._live.parts.append(CASTS)
        cast = value.to(self._autocast)
        self._live.parts.pop()
        if value.requires_grad and value.dtype == torch.float32:  # autocast keeps these until it ends
            self.casts[id(value)] = cast
        return cast

    def _dropout(self, given: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0:
            return given
        if self._gpu:
            return torch.native_dropout(given, p, True)[0]  # its mask has one byte per number
        return given * torch.empty_like(given).bernoulli_(1 - p)

    def _up(self, value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _flash(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False, **more: Any
) -> Tensor:
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # becomes numbers
        attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output: Tensor = flash(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=more.get("scale"))[0]
    return output


def _kernels(autocast: torch.dtype | None, gpu: bool, model: Any) -> list[Any]:
    replaced: dict[str, Any] = {
        "torch.is_autocast_enabled": lambda device=None: autocast is not None,
        "torch.get_autocast_dtype": lambda device=None: autocast or torch.bfloat16,
        # Whether positions restart inside a padded row is read from their values; they do not.
        "transformers.masking_utils.find_packed_sequence_indices": lambda position_ids: None,
        f"{attention.__name__}.{attention.takes_groups.__name__}": lambda query: not gpu,
    }
    if gpu:  # Triton kernels work in place
        replaced |= {
            f"trl.kernels.chunked_logprob.{name}": lambda *_, **__: None
            for name in ("_forward_tile", "_backward_tile", "_addmm_fp32")
        }
        replaced[f"{attention.__name__}.{attention.varlen_fits.__name__}"] = lambda query: (
            query.dtype in (torch.bfloat16, torch.float16)
        )
    else:  # a tile of logits is wider than a small vocabulary; a CPU has no memory for columns that are never written
        columns = min(_CHUNKED_LOGPROB_CHUNK_SIZE, len(model.get_output_embeddings().weight))
        replaced["trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE"] = columns
    # transformers' checks of values (`torch_compilable_check`) are left out.
    unchecked = mock.patch.dict(os.environ, TRANSFORMERS_DISABLE_TORCH_CHECK="1")
    return [unchecked, *(mock.patch(name, function) for name, function in replaced.items())]

"""Compare packed rows with padded ones on a batch of a real run."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from mpo.batching.batch import Batch
from mpo.batching.randomness import dropout_sites


def compare(
    sums: Callable[[Batch], Tensor],
    packed: Batch,
    padded: Batch,
    parameters: Sequence[nn.Parameter],
    usual: Callable[[], AbstractContextManager[None]],
) -> str:
    """Describe the difference of log-prob sums and gradients between packed and padded rows.

    Args:
        sums: a function from a batch to its log-prob sums, shape (completions,), for a model that attends by segments.
        packed, padded: the same records in packed and in padded rows.
        parameters: parameters whose gradients (of the mean of the sums) are compared; may be empty. Needs twice their memory.
        usual: a context manager that restores the model's usual attention.
    """
    first, first_gradients = _with_gradients(sums, packed, parameters)
    with usual():
        second, second_gradients = _with_gradients(sums, padded, parameters)
    lines = [
        f"verify_first_batch: log-probs of {len(first)} completions in packed and in padded rows differ by at most "
        f"{(first - second).abs().max():.2e} (sums of up to {second.abs().max():.1f}; "
        f"{((first - second).abs() / second.abs().clamp_min(1e-6)).max():.1e} relative)"
    ]
    if parameters:
        apart = _norm([a - b for a, b in zip(first_gradients, second_gradients, strict=True)])
        lines.append(f"gradients by {apart / _norm(second_gradients):.1e} of their norm")
    return ", ".join(lines) + "."


@contextmanager
def without_dropout(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Set all dropout probabilities of a model to 0 inside the context; then restore them and the random states.

    (Not `model.eval()`, which would also disable gradient checkpointing.)
    """
    before = dropout_sites(model)
    devices = [] if device.type in ("cpu", "mps") else [device]  # the CPU's state is always restored
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        try:
            for module, name, _ in before:
                setattr(module, name, 0.0)
            yield
        finally:
            for module, name, value in before:
                setattr(module, name, value)


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([tensor.double().square().sum() for tensor in tensors]).sum().sqrt()


def _with_gradients(
    sums: Callable[[Batch], Tensor], batch: Batch, parameters: Sequence[nn.Parameter]
) -> tuple[Tensor, list[Tensor]]:
    with torch.set_grad_enabled(bool(parameters)):
        values = sums(batch)
    if not parameters:
        return values, []
    gradients = torch.autograd.grad(values.mean(), parameters, allow_unused=True)
    pairs = zip(gradients, parameters, strict=True)
    return values.detach(), [torch.zeros_like(p) if g is None else g for g, p in pairs]

"""Report the attention kernel that packed rows use on each device."""

from __future__ import annotations

from collections.abc import Iterator

from mpo.preflight.doctor.finding import Finding
from mpo.preflight.doctor.gpus import kinds, numbers


def attention() -> Iterator[Finding]:
    """Report the kernel for each kind of GPU, or for the CPU."""
    import torch

    from mpo.batching.attention import kernel_for

    found = kinds() if torch.cuda.is_available() else {}
    for kind, indices in found.items():
        dtype = torch.float16 if kind.bf16 == "no" else torch.bfloat16
        yield Finding(f"on {numbers(indices)}", kernel_for(torch.device("cuda", indices[0]), dtype))
    if not found:
        device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        yield Finding(f"on the {device.type.upper()}", kernel_for(device, torch.bfloat16))

"""bitsandbytes at work: one layer in 4 bits, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator

from mpo.doctor.finding import Finding, one_line
from mpo.doctor.imports import import_failure
from mpo.doctor.versions import installed

TOLERANCE = 0.2
"""NF4 is about 10 % off the layer it holds (arXiv 2305.14314); twice that is an error."""


def four_bits() -> Iterator[Finding]:
    """Nothing where bitsandbytes is not there to be tried."""
    there = installed("bitsandbytes")
    if there is None or import_failure("bitsandbytes") is not None:
        return  # said already
    try:
        device, error = layer_error()
    except Exception as failure:
        fix = f"pip install --upgrade --force-reinstall --no-deps bitsandbytes   (here is {there})"
        yield Finding("4-bit layer", f"fails: {one_line(failure)}", "problem", fix)
        return
    value = f"NF4 on {device}: forward and backward, {error:.0%} off the dense layer"
    if error < TOLERANCE:
        yield Finding("4-bit layer", value)
    else:
        fix = "pip install --upgrade --force-reinstall --no-deps bitsandbytes"
        yield Finding("4-bit layer", f"{value}, which is too much", "problem", fix)


def layer_error() -> tuple[str, float]:
    """The device at hand, and how far output and input gradient of a 4-bit layer are off the dense one's, relatively."""
    import torch
    from bitsandbytes.nn import Linear4bit

    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    dense = torch.nn.Linear(256, 128, bias=False)
    dense.weight.data = torch.randn(128, 256, generator=generator) / 16
    layer = Linear4bit(256, 128, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.load_state_dict(dense.state_dict())
    results = []
    for module in (dense, layer):
        given = torch.randn(8, 256, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()
        output = module.to(device)(given)
        output.square().sum().backward()
        results.append((output.detach(), given.grad))
    errors = [((mine - exact).norm() / exact.norm()).item() for exact, mine in zip(*results, strict=True)]
    return device.type, max(errors)

"""Check bitsandbytes with the forward and backward pass of one 4-bit layer."""

from __future__ import annotations

from collections.abc import Iterator

from mpo.preflight.doctor.finding import Finding, one_line
from mpo.preflight.doctor.imports import import_failure
from mpo.preflight.doctor.versions import installed

TOLERANCE = 0.2
"""Maximum relative error. That of NF4 is about 10 % (arXiv 2305.14314); twice as much indicates a defect."""


def four_bits() -> Iterator[Finding]:
    """Check a 4-bit layer; no findings if bitsandbytes is not installed or cannot be imported."""
    found = installed("bitsandbytes")
    if found is None or import_failure("bitsandbytes") is not None:
        return  # already reported by the check of packages
    try:
        device, error = layer_error()
    except Exception as failure:
        fix = f"pip install --upgrade --force-reinstall --no-deps bitsandbytes   (installed: {found})"
        yield Finding("4-bit layer", f"fails: {one_line(failure)}", "problem", fix)
        return
    value = f"NF4 on {device}: forward and backward pass differ by {error:.0%} from the dense layer"
    if error < TOLERANCE:
        yield Finding("4-bit layer", value)
    else:
        fix = "pip install --upgrade --force-reinstall --no-deps bitsandbytes"
        yield Finding("4-bit layer", f"{value}; expected less than {TOLERANCE:.0%}", "problem", fix)


def layer_error() -> tuple[str, float]:
    """Return the device and the relative error of a 4-bit layer: the larger one of its output and its input gradient."""
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
        inputs = torch.randn(8, 256, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()
        output = module.to(device)(inputs)
        output.square().sum().backward()
        results.append((output.detach(), inputs.grad))
    errors = [((quantized - exact).norm() / exact.norm()).item() for exact, quantized in zip(*results, strict=True)]
    return device.type, max(errors)

"""Compare our MMFuser with the official block itself, and print the digests that tests/models/test_mmfuser.py has recorded of it.

    git clone https://github.com/yuecao0119/MMFuser OFFICIAL && git -C OFFICIAL checkout 2d296fc
    python tests/official_mmfuser.py OFFICIAL

Its compiled operator is replaced by the fallback in PyTorch beside it (`ms_deform_attn_core_pytorch`), in float32. Every element of
outputs, input gradients and parameter gradients is compared; the exit status is 1 when one differs by more than 1e-5 of
its tensor's largest (or of 1). Nothing of that repository is part of this one.
"""

import sys
import types
import warnings
from importlib import import_module
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent / "models"))
from test_mmfuser import RECORDED, digest, filled, official_features, waves  # noqa: E402

from mpo.models.mmfuser import MMFuser  # noqa: E402


def official_block(repository: Path):
    """Its class, without the packages around it, which need the compiled operator and DeepSpeed."""
    folder = repository / "llava/model/multimodal_projector"
    sys.modules["MultiScaleDeformableAttention"] = types.ModuleType("MultiScaleDeformableAttention")
    for name, path in (("official", folder), ("official.deformable_attention", folder / "deformable_attention")):
        sys.modules[name] = package = types.ModuleType(name)
        package.__path__ = [str(path)]
    attention = import_module("official.deformable_attention.ops.modules.ms_deform_attn")
    fallback = import_module("official.deformable_attention.ops.functions.ms_deform_attn_func").ms_deform_attn_core_pytorch

    class Fallback:
        @staticmethod
        def apply(value, shapes, starts, places, weights, step):
            return fallback(value, [tuple(map(int, shape)) for shape in shapes], places, weights)

    attention.MSDeformAttnFunction = Fallback
    return import_module("official.ms_cross_attn").MSCrossAttnBlock


def results(block, features, call) -> dict[str, torch.Tensor]:
    """Output and gradients, for the output's weighted sum."""
    features = [feature.detach().clone().requires_grad_() for feature in features]
    output = call(features)
    (output * waves(output.shape, 200)).sum().backward()
    found = {"output": output.detach(), **{f"feature {place}": feature.grad for place, feature in enumerate(features)}}
    return found | {name: parameter.grad for name, parameter in block.named_parameters()}


def difference(block, features, side: int) -> tuple[dict[str, torch.Tensor], float]:
    """The official results, and the largest difference of ours, relative to a tensor's largest element or 1."""
    ours = MMFuser.from_official(block.state_dict(), num_heads=block.cross_attn.n_heads)
    official, found = results(block, features, block), results(ours, features, lambda given: ours(given, (side, side)))
    assert official.keys() == found.keys()
    return official, max(float((found[name] - true).abs().max() / max(1, true.abs().max())) for name, true in official.items())


def main() -> int:
    """Compare and print."""
    warnings.simplefilter("ignore")
    kind = official_block(Path(sys.argv[1]))
    block = kind(32, n_levels=2)
    block.load_state_dict(filled().state_dict())
    official, worst = difference(block, official_features(), 3)
    recorded = max(abs(digest(true) - RECORDED[name]) / max(1, float(true.norm())) for name, true in official.items())
    print({name: round(digest(true), 6) for name, true in sorted(official.items())})
    print(f"width 32, 2 levels, 3 x 3: {worst:.1e}; recorded digests: {recorded:.1e}")
    for width, levels, heads, points, side in ((64, 4, 16, 4, 6), (128, 1, 8, 2, 5), (96, 6, 4, 1, 7), (1024, 4, 16, 4, 24)):
        for new in (True, False):  # as it is initialized, but for gammas of 0.5; and with noise on all weights
            torch.manual_seed(0)
            block = kind(width, n_levels=levels, n_heads=heads, n_points=points)
            for name, parameter in block.named_parameters():
                noise = torch.randn_like(parameter) * (0.02 if parameter.dim() > 1 else 0.3)
                parameter.data += 0.5 * name.startswith("gamma") if new else noise
            features = [torch.randn(2 if side < 24 else 1, side * side, width) for _ in range(levels + 1)]
            worst = max(worst, found := difference(block, features, side)[1])
            print(f"width {width}, {levels} levels, {heads} heads, {points} points, {side} x {side}, new={new}: {found:.1e}")
    return int(max(worst, recorded) > 1e-5)


if __name__ == "__main__":
    raise SystemExit(main())

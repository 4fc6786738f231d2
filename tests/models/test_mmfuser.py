"""The block of MMFuser: equal to the official one, to a plain loop, and in bounded memory."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mpo.models import mmfuser
from mpo.models.mmfuser import DeformableAttention, MMFuser

RECORDED = {
    "output": -1.277117,
    **{"feature 0": -0.074769, "feature 1": -0.081075, "feature 2": 2.022921},
    **{"cross_attn.attention_weights.bias": 0.315387, "cross_attn.attention_weights.weight": -0.383753},
    **{"cross_attn.output_proj.bias": -0.065775, "cross_attn.output_proj.weight": 15.34546},
    **{"cross_attn.sampling_offsets.bias": 4.043757, "cross_attn.sampling_offsets.weight": -2.068253},
    **{"cross_attn.value_proj.bias": 0.200866, "cross_attn.value_proj.weight": 0.348108},
    **{"feat_norm.bias": -0.149436, "feat_norm.weight": -0.070188, "gamma1": 13.196969, "gamma2": 3.497665},
    **{"norm1.bias": 0.257027, "norm1.weight": 1.744505, "query_norm.bias": -2.082529, "query_norm.weight": -3.94467},
    **{"self_attn.attention_weights.bias": -0.095877, "self_attn.attention_weights.weight": 0.027161},
    **{"self_attn.output_proj.bias": -0.252033, "self_attn.output_proj.weight": 0.083789},
    **{"self_attn.sampling_offsets.bias": 0.873789, "self_attn.sampling_offsets.weight": -0.963647},
    **{"self_attn.value_proj.bias": -0.081264, "self_attn.value_proj.weight": 0.316821},
}
"""Digests of output and gradients of the official MSCrossAttnBlock(32, n_levels=2) (yuecao0119/MMFuser at 2d296fc, with its
`ms_deform_attn_core_pytorch` in float32), with the weights and features of `filled` and `official_features`; recorded, and compared
element by element with a clone of that repository, by tests/official_mmfuser.py."""


def waves(shape, seed, scale=0.5):
    places = torch.arange(math.prod(shape), dtype=torch.float64)
    return (scale * torch.sin(places * 1.7 + (places * 0.013) ** 2 + seed)).float().view(*shape)


def digest(tensor) -> float:
    return float(tensor.detach().double().flatten() @ torch.cos(torch.arange(tensor.numel(), dtype=torch.float64) * 0.7))


def filled(width=32, levels=2, **sizes) -> MMFuser:
    fuser = MMFuser(width, num_levels=levels, **sizes)
    with torch.no_grad():
        for place, (_, parameter) in enumerate(sorted(fuser.named_parameters())):
            parameter.copy_(waves(parameter.shape, place))
    return fuser


def official_features():
    return [waves((2, 9, 32), 100 + place, 1.0).requires_grad_() for place in range(3)]


@pytest.mark.parametrize("prefix, chunk", [("", 2**22), ("model.mm_projector.0.", 300), ("0.", 1)])
def test_outputs_and_gradients_are_the_officials(monkeypatch, prefix, chunk):
    """Also in chunks of a few rows, and of one query of one head. In a LLaVA the projector's other layers are ignored."""
    monkeypatch.setattr(mmfuser, "CHUNK", chunk)
    others = {"model.mm_projector.2.weight": torch.zeros(3), "lm_head.weight": torch.zeros(3)} if prefix else {}
    fuser = MMFuser.from_official({prefix + name: tensor for name, tensor in filled().state_dict().items()} | others)
    features = official_features()
    output = fuser(features, (3, 3))
    (output * waves(output.shape, 200)).sum().backward()
    found = {"output": output, **{f"feature {place}": feature.grad for place, feature in enumerate(features)}}
    found |= {name: parameter.grad for name, parameter in fuser.named_parameters()}
    assert found.keys() == RECORDED.keys()
    for name, tensor in found.items():
        assert digest(tensor) == pytest.approx(RECORDED[name], abs=1e-5 * max(1, float(tensor.detach().norm()))), name


def test_size_and_start():
    """5,190,592 parameters at width 1024; the output is the query, and the first step changes gamma1 alone."""
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in MMFuser(1024).parameters()) == 5_190_592
    fuser = MMFuser(32)
    features = [torch.randn(2, 6, 32) for _ in range(5)]
    assert torch.equal(fuser(features, (2, 3)).view(torch.int32), features[-1].view(torch.int32))
    half = [feature.bfloat16() for feature in features]
    assert torch.equal(fuser.bfloat16()(half, (2, 3)), half[-1])
    fuser = fuser.float()
    assert fuser([feature[:0] for feature in features], (2, 3)).shape == (0, 6, 32)
    optimizer = torch.optim.SGD(fuser.parameters(), lr=0.1)
    later = ("self_attn", "norm1", "query_norm")  # they act through gamma2 and through weights that are still 0
    second = {name for name, _ in fuser.named_parameters() if not name.startswith(later)}
    for expected in ({"gamma1"}, second):
        optimizer.zero_grad()
        fuser(features, (2, 3)).pow(3).sum().backward()
        moving = {name for name, parameter in fuser.named_parameters() if parameter.grad.count_nonzero()}
        assert moving == expected
        optimizer.step()


def test_other_grids_by_a_plain_loop():
    """Each query of a 2 x 3 grid, head, level and point by hand: the four patches around the place that it samples."""
    height, width, channels, heads, levels, points = 2, 3, 8, 2, 3, 2
    attention = DeformableAttention(channels, levels, heads, points).double()
    with torch.no_grad():
        for place, parameter in enumerate(attention.parameters()):
            parameter.copy_(waves(parameter.shape, place, 0.9))
    query, values = waves((1, 6, channels), 7).double(), waves((1, 6 * levels, channels), 8).double()
    maps = attention.value_proj(values).view(levels, height, width, heads, channels // heads)
    offsets = attention.sampling_offsets(query).view(6, heads, levels, points, 2)
    weights = attention.attention_weights(query).view(6, heads, -1).softmax(-1).view(6, heads, levels, points)
    expected = torch.zeros(6, heads, channels // heads, dtype=torch.float64)
    for place in range(6):
        for head, level, point in ((h, v, p) for h in range(heads) for v in range(levels) for p in range(points)):
            x, y = torch.tensor([place % width, place // width]) + offsets[place, head, level, point].detach()  # in patches
            for row, column in ((r, c) for r in range(height) for c in range(width)):
                share = max(0, 1 - abs(float(y) - row)) * max(0, 1 - abs(float(x) - column))
                expected[place, head] += weights[place, head, level, point] * share * maps[level, row, column, head]
    expected = attention.output_proj(expected.view(1, 6, channels))
    torch.testing.assert_close(attention(query, values, (height, width)), expected, rtol=1e-12, atol=1e-12)


def test_gradients_by_finite_differences():
    fuser = filled(8, num_heads=2, num_points=2).double()
    features = [waves((1, 6, 8), 30 + place).double().requires_grad_() for place in range(3)]
    assert torch.autograd.gradcheck(lambda *given: fuser(given, (2, 3)), features, eps=1e-6, atol=1e-6, fast_mode=True)


def test_sampling_is_in_float32():
    """In bfloat16 the error against float32 is that of rounding weights and features, not of rounded places."""
    fuser, features = filled(), [feature.detach() for feature in official_features()]
    half = filled().bfloat16()
    rounded = filled()
    rounded.load_state_dict(half.state_dict())
    expected = rounded([feature.bfloat16().float() for feature in features], (3, 3))
    found = half([feature.bfloat16() for feature in features], (3, 3))
    assert found.dtype == torch.bfloat16
    assert half.cross_attn.where(features[-1].bfloat16(), (3, 3))[0].dtype == torch.float32
    assert (found - expected).norm() < 0.02 * expected.norm()
    with torch.autocast("cpu", torch.bfloat16):
        assert fuser([feature.bfloat16() for feature in features], (3, 3)).dtype == torch.bfloat16
        assert (fuser(features, (3, 3)) - fuser(features, (3, 3)).float()).norm() == 0


class Largest(TorchDispatchMode):
    """The size of the largest tensor that is made, in bytes."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.size = max(self.size, made.nbytes) if isinstance(made, torch.Tensor) else self.size
        return made


def test_memory_is_bounded(monkeypatch):
    """Width 256, 24 x 24 queries, 16 heads, 4 levels of 8 points between 4 patches: 4.7 MB of shares in float32. In chunks of 64 KB
    neither a pass without gradients nor what autograd keeps has a tensor larger than the concatenated features, 2.4 MB."""
    fuser, kept = MMFuser(256, num_points=8), []
    features = [torch.randn(1, 576, 256) for _ in range(5)]
    monkeypatch.setattr(mmfuser, "CHUNK", 2**30)
    whole, limit = 576 * 16 * 4 * 8 * 4 * 4, 4 * 576 * 256 * 4
    with torch.no_grad(), Largest() as largest:
        expected = fuser.cross_attn(features[4], torch.cat(features[:4], dim=1), (24, 24))
    assert largest.size == whole  # one chunk
    monkeypatch.setattr(mmfuser, "CHUNK", 2**14)
    with torch.no_grad(), Largest() as largest:
        torch.testing.assert_close(fuser.cross_attn(features[4], torch.cat(features[:4], dim=1), (24, 24)), expected)
    assert largest.size == limit
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.nbytes) or tensor, lambda tensor: tensor):
        fuser([feature.requires_grad_() for feature in features], (24, 24))
    assert max(kept) == limit


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: MMFuser(40), "width=40, num_heads=16"),
        (lambda: MMFuser(32, num_levels=0), "num_levels=0"),
        (lambda: MMFuser(32, num_points=True), "num_points=True"),
        (lambda: MMFuser(32)([torch.zeros(1, 4, 32)] * 4, (2, 2)), "4 shallow .*4 features"),
        (lambda: MMFuser(32)([torch.zeros(1, 5, 32)] * 5, (2, 2)), r"2 \* 2, 32.*\(1, 5, 32\) for feature 0"),
        (lambda: MMFuser(32)([torch.zeros(1, 4, 16)] * 5, (2, 2)), r"\(1, 4, 16\)"),
        (lambda: MMFuser(32)([torch.zeros(1, 4, 32)] * 4 + [torch.zeros(2, 4, 32)], (2, 2)), "feature 0"),
        (lambda: MMFuser(32)([torch.zeros(1, 4, 32)] * 5, (4,)), r"grid=\(4,\)"),
        (lambda: MMFuser(32)([torch.zeros(1, 4, 32)] * 5, 4), "grid=4"),
        (lambda: MMFuser(32)([torch.zeros(1, 4, 32)] * 5, (2.0, 2)), r"grid=\(2.0, 2\)"),
        (lambda: MMFuser.from_official({}), "found 0"),
        (lambda: MMFuser.from_official({f"{p}{n}": t for n, t in filled().state_dict().items() for p in ("a.", "b.")}), "a., b."),
        (lambda: MMFuser.from_official({n: t for n, t in filled().state_dict().items() if n != "gamma2"}), "missing .gamma2"),
        (lambda: MMFuser.from_official(filled().state_dict() | {"ffn.weight": torch.zeros(2)}), "ffn.weight"),
        (lambda: MMFuser.from_official(filled().state_dict() | {"gamma1": torch.zeros(31)}), "gamma1"),
        (lambda: MMFuser.from_official(filled().state_dict(), num_heads=5), "num_heads=5"),
        *(
            (lambda heads=heads: MMFuser.from_official(filled().state_dict(), num_heads=heads), f"num_heads={heads!r}")
            for heads in (0, -1, True, 16.0, "16", None)
        ),
        (lambda: MMFuser.from_official(filled().state_dict() | {"cross_attn.value_proj.weight": torch.tensor(1.0)}), "width 0"),
        (lambda: MMFuser.from_official(filled().state_dict() | {"self_attn.attention_weights.bias": torch.tensor(1.0)}), "0 over"),
        (lambda: MMFuser(32)([torch.zeros(1, 4, 32).bfloat16()] * 5, (2, 2)), "float32.*bfloat16 for feature 0"),
        (lambda: MMFuser(32)([torch.zeros(1, 4, 32)] * 4 + [torch.zeros(1, 4, 32).double()], (2, 2)), "float64 for feature 4"),
        (lambda: MMFuser(32).bfloat16()([torch.zeros(1, 4, 32)] * 5, (2, 2)), "bfloat16.*float32 for feature 0"),
        (lambda: MMFuser(32)([torch.zeros(())] * 5, (2, 2)), r"got \(\) for feature 0"),
        (lambda: MMFuser(32)([None] * 5, (2, 2)), "NoneType"),
    ],
)
def test_what_cannot_be_fused_is_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_official_weights_keep_their_dtype():
    fuser = MMFuser.from_official(filled(64, 3, num_points=2).bfloat16().state_dict())
    assert {parameter.dtype for parameter in fuser.parameters()} == {torch.bfloat16}
    mixed = {name: tensor if "norm" in name else tensor.bfloat16() for name, tensor in filled().state_dict().items()}
    assert torch.equal(MMFuser.from_official(mixed).norm1.weight, filled().norm1.weight)  # nothing is rounded
    assert (fuser.num_levels, fuser.width, fuser.cross_attn.num_points) == (3, 64, 2)


def test_counted_without_memory():
    """On the meta device as on the CPU, where each linear layer is a multiplication forward and two backward."""
    counted = []
    for device in ("cpu", "meta"):
        fuser = filled().to(device)
        features = [torch.zeros(2, 6, fuser.width, device=device, requires_grad=True) for _ in range(fuser.num_levels + 1)]
        with FlopCounterMode(display=False) as count:
            fuser(features, (2, 3)).sum().backward()
        counted.append(count.get_total_flops())
    assert counted[0] == counted[1] > 0

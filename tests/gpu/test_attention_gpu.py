"""The varlen kernel against PyTorch's attention segment by segment, on a GPU."""

import copy

import pytest
import torch
from support import perturbed

from mpo.batching.attention import _attend, use_packed_attention, usual_attention, varlen_fits
from mpo.batching.layout import concatenate, lay_out
from mpo.encoding.labels import Completion
from mpo.models.small import small_internvl

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0), reason="needs an NVIDIA GPU, Ampere or newer"
)
# Heads, key-value heads and head width of InternVL3's 1B and 8B language models.
SHAPES = [(14, 2, 64), (28, 4, 128)]


def ids(seed, count):
    return torch.randint(3, 250, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def completion(tokens):
    return Completion(tokens, [True] * len(tokens))


def branching_rows():
    """Branches of one query and of hundreds, a completion that shares half of another, and a row without branches."""
    first = ids(0, 300)
    completions = [completion(first), completion(first[:150] + ids(1, 140)), completion(ids(2, 1)), completion(ids(3, 77))]
    return [lay_out(ids(4, 700), completions), lay_out(ids(5, 3), [completion(ids(6, 40)), completion(ids(7, 500))]), lone_row(8)]


def lone_row(seed):
    return lay_out(ids(seed, 33), [completion(ids(seed + 1, 20))])


def attend(tensors, segments, dtype, backend):
    """Output and gradients, float64."""
    query, key, value = (tensor.to(dtype, copy=True).requires_grad_() for tensor in tensors)
    assert varlen_fits(query) == (dtype in (torch.bfloat16, torch.float16))
    scaling = query.shape[-1] ** -0.5
    output, _ = _attend(torch.nn.Identity(), query, key, value, None, scaling, segments=segments, backend=backend)
    weights = torch.randn(output.shape, generator=torch.Generator("cuda").manual_seed(9), device="cuda")
    (output.double() * weights).sum().backward()
    return [tensor.double() for tensor in (output.detach(), query.grad, key.grad, value.grad)]


@pytest.mark.parametrize(("heads", "kv_heads", "width"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("branching", [True, False])
def test_varlen_equals_segments(heads, kv_heads, width, dtype, branching):
    """Output and gradients err no more than twice what the path by segments errs against float64."""
    batch = concatenate(branching_rows() if branching else [lone_row(1), lone_row(2)])
    segments, count = batch.segments.to("cuda"), batch.input_ids.shape[1]
    assert (segments.key_index is not None) == branching
    generator = torch.Generator("cuda").manual_seed(0)
    tensors = [torch.randn(1, n, count, width, generator=generator, device="cuda") for n in (heads, kv_heads, kv_heads)]
    tensors = [tensor.to(dtype).float() for tensor in tensors]  # the same inputs for all
    exact = attend(tensors, segments, torch.float64, "segments")
    plain = attend(tensors, segments, dtype, "segments")
    varlen = attend(tensors, segments, dtype, "auto")
    for name, right, reference, found in zip(("output", "query", "key", "value"), exact, plain, varlen, strict=True):
        allowed = 2 * (reference - right).norm()
        assert (found - right).norm() <= allowed, (name, (found - right).norm() / allowed)


@pytest.mark.parametrize(("backend", "package"), [("flash_attn_2", "flash_attn"), ("flash_attn_3", "flash_attn_interface")])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), SHAPES)
def test_flash_attention_equals_segments(heads, kv_heads, width, backend, package):
    """The flash-attn package's kernels, where they are installed: as the varlen kernel above."""
    pytest.importorskip(package)
    batch = concatenate(branching_rows())
    segments, count = batch.segments.to("cuda"), batch.input_ids.shape[1]
    generator = torch.Generator("cuda").manual_seed(0)
    tensors = [torch.randn(1, n, count, width, generator=generator, device="cuda") for n in (heads, kv_heads, kv_heads)]
    tensors = [tensor.to(torch.bfloat16).float() for tensor in tensors]
    exact = attend(tensors, segments, torch.float64, "segments")
    plain = attend(tensors, segments, torch.bfloat16, "segments")
    flash = attend(tensors, segments, torch.bfloat16, backend)
    for name, right, reference, found in zip(("output", "query", "key", "value"), exact, plain, flash, strict=True):
        assert (found - right).norm() <= 2 * (reference - right).norm(), name


def test_nothing_waits_for_the_device():
    """Forward and backward launch their kernels without synchronizing with the GPU."""
    segments = concatenate(branching_rows()).segments
    count = sum(queries for queries, _ in segments.lengths)
    segments = segments.to("cuda")
    query, key, value = (torch.randn(1, n, count, 64, device="cuda", dtype=torch.bfloat16) for n in (14, 2, 2))
    query.requires_grad_()

    def step():
        output, _ = _attend(torch.nn.Identity(), query, key, value, None, 0.125, segments=segments, backend="auto")
        output.sum().backward()

    step()  # kernels load, properties are asked for
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("text", ["qwen2", "qwen3", "llama"])
def test_whole_model(processor, text):
    """Logits of a bfloat16 model, packed, err no more than twice what separate rows err against float32."""
    exact_model = perturbed(small_internvl(processor, text=text, hidden_size=128, heads=4), scale=0.05).cuda()
    model = copy.deepcopy(exact_model).to(torch.bfloat16)
    prompt, completions = ids(0, 200), [completion(ids(1, 60)), completion(ids(2, 90))]
    batch = concatenate([lay_out(prompt, completions)])
    use_packed_attention(model)
    with torch.no_grad():
        inputs = {"input_ids": batch.input_ids.cuda(), "position_ids": batch.position_ids.cuda()}
        packed = model(**inputs, segments=batch.segments.to("cuda"), use_cache=False).logits[0].float()
        for number, one in enumerate(completions):
            nodes = batch.labelled.select([number]).node.cuda()
            row = torch.tensor([prompt + one.ids], device="cuda")
            exact = exact_model(input_ids=row, use_cache=False).logits[0, len(prompt) - 1 : -1]
            with usual_attention(model):
                separate = model(input_ids=row, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
            assert (packed[nodes] - exact).norm() <= 2 * (separate - exact).norm()

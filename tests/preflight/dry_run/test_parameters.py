"""Parameter counts against models with weights and against published numbers."""

import pytest
from peft import LoraConfig, get_peft_model
from real_shapes import config_of
from support import TEXTS

from mpo.models.small import small_internvl, small_processor
from mpo.models.tower import find_tower
from mpo.preflight.structure import count_parameters, meta_model


def totals(model):
    return count_parameters(model)


@pytest.mark.parametrize("text", ["qwen2", "qwen3", "llama"])
def test_meta_counts_as_built(text):
    real = small_internvl(small_processor(TEXTS), text=text)
    meta = meta_model(real.config)
    assert all(parameter.is_meta for parameter in meta.parameters())
    assert totals(meta) == totals(real)
    assert sum(total for total, _ in totals(meta).values()) == real.num_parameters()
    parts = {"vision tower": find_tower(real), "projector": real.model.multi_modal_projector, "LM head": real.lm_head}
    for part, module in parts.items():
        assert totals(meta)[part][0] == sum(parameter.numel() for parameter in module.parameters())


def test_tied_embeddings_count_once():
    real = small_internvl(small_processor(TEXTS), tie_word_embeddings=True)
    assert totals(meta_model(real.config))["LM head"] == (0, 0)
    assert sum(total for total, _ in totals(meta_model(real.config)).values()) == real.num_parameters()


def test_adapters_count_alone():
    """Rank 4 on q_proj (64 -> 64) and v_proj (64 -> 32) of two layers: 2 x 4 x (128 + 96) = 1792."""
    model = small_internvl(small_processor(TEXTS), hidden_size=64, layers=2, heads=4)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|v_proj)"))
    counts = totals(adapted)
    assert counts["adapters"] == (1792, 1792)
    assert sum(trained for _, trained in counts.values()) == 1792


@pytest.mark.parametrize(
    ("size", "total", "tower", "projector"),
    [
        ("1B", 938.19e6, 304.01e6, 4.48e6),
        ("2B", 2.21e9, 304.01e6, 12.60e6),
        ("4B", 3.71e9, 304.01e6, 12.60e6),
        ("8B", 8.08e9, 304.01e6, 33.57e6),
        ("26B", 25.51e9, 5.54e9, 116.43e6),
        ("38B", 38.39e9, 5.54e9, 91.79e6),
        ("78B", 78.41e9, 5.54e9, 172.01e6),
    ],
)
def test_published_sizes(size, total, tower, projector):
    """Table 1 of arXiv 2412.05271 (InternVL 2.5), to 0.2 %."""
    counts = totals(meta_model(config_of(f"InternVL2_5-{size}", 1)))
    assert sum(count for count, _ in counts.values()) == pytest.approx(total, rel=0.002)
    assert counts["vision tower"][0] == pytest.approx(tower, rel=0.002)
    assert counts["projector"][0] == pytest.approx(projector, rel=0.002)

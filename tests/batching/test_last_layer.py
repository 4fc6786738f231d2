"""The last decoder layer computes the positions that predict a labelled token alone, and nothing but rounding changes by it."""

import copy
import random
from dataclasses import replace

import pytest
import torch
import transformers
from packed_and_padded import (
    FAMILIES,
    SIZES,
    batches_of,
    in_bfloat16,
    in_float64,
    internvl,
    random_batches,
    random_group,
    text_model,
    trained_sums,
    with_head,
)
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from mpo.batching.attention import packed_attention
from mpo.batching.layout import concatenate, lay_out
from mpo.batching.logits_to_keep import LogitsToKeep, add_logits_to_keep
from mpo.encoding.labels import Completion
from mpo.models.packable import find_text_model


def unnarrowed(batch):
    """The same batch, of which the last layer computes every position."""
    return replace(batch, positions_to_keep=replace(batch.positions_to_keep, segments=None))


def layer_of(model):
    return find_text_model(model).layers[-1]


class Rows:
    """The number of rows that modules get, in the order of their calls."""

    def __init__(self, *modules):
        self.seen = []
        for module in modules:
            module.register_forward_hook(lambda _, args, __: self.seen.append(args[0].shape[:-1].numel()))


def with_lora(model, **settings):
    model = get_peft_model(model, LoraConfig(r=4, target_modules=".*language_model.*_proj", init_lora_weights=False, **settings))
    return model.train()


def frozen_tower(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("vision_tower" not in name and "projector" not in name)
    return model


TRAINED = {"full": lambda model: model, "frozen tower": frozen_tower, "lora": with_lora}


def values_and_gradients(model, batch, reference=False):
    """Log-prob sums, and the gradients of a weighted sum of them; with a reference, of the policy less that."""
    model.zero_grad()
    with packed_attention(model):
        if reference:
            with torch.no_grad():
                trained_sums(model, unnarrowed(batch))  # another forward pass, of which nothing may be left
        sums = trained_sums(model, batch)
        (sums * torch.linspace(-1, 1.5, len(sums))).sum().backward()
    return sums.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [None, False, True])
@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("family", FAMILIES)
def test_in_float64_values_and_gradients_are_the_same(processor, family, trained, checkpointing):
    """To 1e-12, of images and text, shared and nested completions, with labels in between that do not count."""
    model = with_head(in_float64(TRAINED[trained](internvl(processor, family))))
    if checkpointing is not None:
        model.train().gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    for seed in range(4):
        batch, _ = random_batches(processor, seed)
        first, mine = values_and_gradients(model, batch, reference=True)
        second, theirs = values_and_gradients(model, unnarrowed(batch))
        torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)
        assert mine.keys() == theirs.keys()
        whole = torch.stack([gradient.norm() for gradient in theirs.values()]).norm()
        for name in theirs:
            assert (mine[name] - theirs[name]).norm() <= 1e-12 * whole, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_no_larger(processor, dtype):
    """Against float64, at most twice what the whole layer errs, by norm over four batches; in float32 equal to 1e-6."""
    model = internvl(processor) if dtype == torch.float32 else in_bfloat16(internvl(processor))
    exact = with_head(in_float64(model))
    with_head(model)
    found = [[], [], []]
    for seed in range(4):
        batch, _ = random_batches(processor, seed)
        for place, (one, given) in enumerate(((model, batch), (model, unnarrowed(batch)), (exact, unnarrowed(batch)))):
            sums, gradients = values_and_gradients(one, given)
            found[place] += [sums.double(), *(gradient.double().flatten() for gradient in gradients.values())]
    narrowed, whole, true = map(torch.cat, found)
    assert (narrowed - true).norm() <= 2 * (whole - true).norm()
    assert dtype != torch.float32 or (narrowed - whole).norm() <= 1e-6 * whole.norm()


@pytest.mark.parametrize("trained", TRAINED)
def test_projections_and_mlp_get_kept_positions_alone(processor, trained):
    """Also when checkpointing computes the layer again; and the layer before gets all."""
    model = with_head(TRAINED[trained](internvl(processor)))
    layer, before = layer_of(model), find_text_model(model).layers[-2]
    rows, others = Rows(layer.mlp.down_proj, layer.self_attn.o_proj), Rows(before.mlp.down_proj, layer.self_attn.k_proj)
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    batch, _ = random_batches(processor, 1)
    values_and_gradients(model, batch)
    assert set(rows.seen) == {len(batch.positions_to_keep.index)} and len(rows.seen) >= 3
    assert set(others.seen) == {batch["input_ids"].numel()}


def test_flops_that_are_saved():
    """A prompt of 60 tokens, completions of 9 and 5, all labelled: nodes 60 + 8 + (1 + 4) = 73, kept 9 + 5 = 14.

    Widths 64 and 96 (MLP), 3 products with it and 2 (queries, output) with 64 by 64: 26,624 multiplications a position, and twice
    the operations. Attention, 2 products of width 64: before, 68 queries over 68 keys and 5 over 64; now 9 over 68, and 5 over 64.
    """
    batch, _ = batches_of([one_group()], [(0, 1)])
    model = with_head(text_model())
    counts = []
    for given in (unnarrowed(batch), batch):
        with packed_attention(model), torch.no_grad(), counting_attention() as counter:
            trained_sums(model, given)
        counts.append(counter.get_total_flops())
    assert counts[0] - counts[1] == 2 * 26_624 * (73 - 14) + 2 * 2 * 64 * (68 - 9) * 68


def one_group():
    group = random_group(random.Random(0), 1)
    group.prompt = list(range(3, 63))
    group.completions = [Completion(list(range(100 * n, 100 * n + size)), [True] * size) for n, size in ((1, 9), (2, 5))]
    return group


def counting_attention():
    """Count attention of the CPU's kernel too."""
    aten = torch.ops.aten

    def formula(query, key, value, *args, out_shape=None, **kwargs):
        batch, heads, queries, width = query
        return 2 * 2 * batch * heads * queries * key[2] * width

    return FlopCounterMode(display=False, custom_mapping={aten._scaled_dot_product_flash_attention_for_cpu: formula})


def test_segments_of_the_last_layer():
    """Queries begin at a segment's first labelled node; a row without labels has none; keys are as before."""
    labelled = lay_out([1, 2, 3], [Completion([11, 12, 13], [False, True, True]), Completion([21, 22], [True, True])])
    rows = concatenate([labelled, lay_out([1, 2], [Completion([5, 6], [False, False])])])
    # nodes: 1 2 3 11 12 | 3 21 || 1 2 5; node 3 (token 11) predicts the 12
    assert rows.segments.lengths == ((5, 5), (2, 4), (3, 3)) and rows.segments.query_index is None
    last = rows.labelled_segments
    assert last.lengths == ((2, 5), (2, 4))
    assert last.query_index.tolist() == [3, 4, 5, 6] and last.key_index.tolist() == [0, 1, 2, 3, 4, 0, 1, 5, 6]
    assert last.cu_seqlens_q.tolist() == [0, 2, 4] and last.cu_seqlens_k.tolist() == [0, 5, 9]
    assert concatenate([lay_out([1, 2], [Completion([5], [False])])]).labelled_segments is None


# Where it is off


def experts():
    config = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
    sizes = {**SIZES, "num_key_value_heads": 2, "head_dim": 16}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes, **config))


def with_dropout():
    return transformers.PhiForCausalLM(transformers.PhiConfig(**SIZES, num_key_value_heads=4, resid_pdrop=0.1))


@pytest.mark.parametrize("build", [experts, with_dropout])
def test_models_with_experts_or_dropout_compute_all_positions(build):
    torch.manual_seed(0)
    model = with_head(build())
    rows = Rows(layer_of(model).mlp)
    batch, _ = batches_of([one_group()], [(0, 1)])
    with packed_attention(model):
        trained_sums(model, batch)
    assert rows.seen == [73]


def test_returned_hidden_states_are_those_of_all_positions(processor):
    model = internvl(processor)
    batch, _ = random_batches(processor, 1)
    with packed_attention(model), torch.no_grad():
        expected = model(**batch.model_inputs, output_hidden_states=True).hidden_states[-1]
        add_logits_to_keep(model.base_model)
        for given in ({"output_hidden_states": True}, {}):
            model.config.text_config.output_hidden_states = not given
            found = model.base_model(**batch.model_inputs, **given, positions_to_keep=batch.positions_to_keep)
            torch.testing.assert_close(found.hidden_states[-1], expected)
            assert found.last_hidden_state.shape[1] == len(batch.positions_to_keep.index)


def test_other_forward_passes_are_as_before(processor):
    """Without the keyword, padded, generated, and after a pass that an error ended within the layer; a copy has its own state."""
    model = internvl(processor)
    batch, padded = random_batches(processor, 2)
    inputs = {name: value for name, value in padded.model_inputs.items() if name != "segments"}
    with torch.no_grad():
        expected = model(**inputs).logits
        with packed_attention(model):
            packed = model(**batch.model_inputs).logits
        add_logits_to_keep(model.base_model)
        copied, trained = with_head(copy.deepcopy(model)), with_head(model)
        broken = layer_of(trained).mlp.act_fn.register_forward_hook(lambda *_: 1 / 0)
        with packed_attention(trained), pytest.raises(ZeroDivisionError):
            trained_sums(trained, batch)
        broken.remove()
        for one in (trained, copied):
            with packed_attention(one):
                trained_sums(one, batch)
                torch.testing.assert_close(one(**batch.model_inputs).logits, packed)
            torch.testing.assert_close(one(**inputs).logits, expected)
        hidden = torch.ones(1, 3, 64)
        torch.testing.assert_close(layer_of(trained).mlp(hidden), layer_of(copied).mlp(hidden))
        assert layer_of(trained).mlp.narrowed is not layer_of(copied).mlp.narrowed


def test_compiled_layers_compute_all_positions_and_give_the_same(processor):
    model = with_head(internvl(processor))
    batch, _ = random_batches(processor, 1)
    expected, gradients = values_and_gradients(model, batch)
    for layer in find_text_model(model).layers:
        layer.compile(backend="eager", dynamic=True)
    found, mine = values_and_gradients(model, batch)
    torch.testing.assert_close(found, expected)
    for name in gradients:
        torch.testing.assert_close(mine[name], gradients[name], rtol=1e-3, atol=1e-4)


def test_batches_without_a_label_and_positions_without_segments(processor):
    """A rank's batch may have nothing labelled, and a caller may give positions alone."""
    model = with_head(text_model())
    rows = concatenate([lay_out([1, 2, 3], [Completion([5], [False])])])
    inputs = {"input_ids": rows.input_ids, "position_ids": rows.position_ids, "segments": rows.segments}
    for kept in (torch.empty(0, dtype=torch.int64), torch.tensor([1])):
        with packed_attention(model):
            output = model(**inputs, positions_to_keep=LogitsToKeep(kept, 3), use_cache=False)
        assert output.logits.shape[1] == len(kept)
        output.logits.sum().backward()


@pytest.mark.parametrize("part", ["self_attn.k_proj", "self_attn.o_proj", "post_attention_layernorm", "mlp.down_proj"])
def test_nothing_is_left_of_a_pass_that_an_error_ended(part):
    model, hidden = with_head(text_model()), torch.ones(1, 3, 64)
    expected = layer_of(model).mlp(hidden)
    batch, _ = batches_of([one_group()], [(0, 1)])
    layer_of(model).get_submodule(part).register_forward_pre_hook(lambda *_: 1 / 0)
    with packed_attention(model), pytest.raises(ZeroDivisionError):
        trained_sums(model, batch)
    if "mlp" not in part:
        assert torch.equal(layer_of(model).mlp(hidden), expected)
    assert not layer_of(model).mlp.narrowed


def test_a_text_model_that_two_models_share(processor):
    """Prepared in each of them, it serves both; of a layer that is no longer the last, all positions are computed."""
    model = in_float64(internvl(processor))
    batch, _ = random_batches(processor, 1)
    expected, _ = values_and_gradients(with_head(copy.deepcopy(model)), unnarrowed(batch))
    add_logits_to_keep(find_text_model(model))
    torch.testing.assert_close(values_and_gradients(with_head(model), batch)[0], expected, rtol=1e-12, atol=1e-12)
    layers = find_text_model(model).layers
    rows = Rows(layers[1].mlp, layers[0].mlp)
    layers[0], layers[1] = layers[1], layers[0]
    values_and_gradients(model, batch)
    assert set(rows.seen) == {batch["input_ids"].numel()}

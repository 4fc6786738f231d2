"""Packed rows against padded rows on real models: log-probs, gradients, what each completion attends to, supported models."""

import copy
import json

import pytest
import torch
import transformers
from accelerate.utils import send_to_device
from packed_and_padded import FAMILIES, SIZES, internvl, random_ids, text_model
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from support import make_image
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.parallel import DistributedDataParallel

import mpo.batching.attention as attention
from mpo.batching.attention import BACKENDS, use_packed_attention, usual_attention
from mpo.batching.layout import completion_sums, concatenate, lay_out
from mpo.encoding.labels import Completion
from mpo.models.packable import find_text_model, why_not


def some_completions(seed, count):
    """Completions of different lengths; the third shares half of the first, the fourth is the first, the fifth has one token."""
    completions = [random_ids(seed + index, 5 + 7 * index % 11) for index in range(count)]
    if count > 2:
        completions[2] = completions[0][:3] + random_ids(seed + 50, 4)
    if count > 3:
        completions[3] = completions[0]
    if count > 4:
        completions[4] = completions[4][:1]
    return [Completion(ids, [index % 5 != 4 for index in range(len(ids))]) for ids in completions]


def with_images(processor, seed, image_count, count):
    """A prompt with images: token ids, tiles, completions."""
    text = "<IMG_CONTEXT>\n" * image_count + "Which one?"
    if not image_count:
        return random_ids(seed, 9), None, some_completions(seed, count)
    images = [make_image(seed + index, width=32 + 32 * (index % 2)) for index in range(image_count)]
    inputs = processor(text=text, images=images, return_tensors="pt")
    return inputs["input_ids"][0].tolist(), inputs["pixel_values"], some_completions(seed, count)


def token_logps(logits, labels):
    """Shapes (rows, tokens, vocabulary) and (rows, tokens) -> (rows, tokens)."""
    return torch.log_softmax(logits.float(), -1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)


def packed_sums(model, groups, batch=None):
    """Log-prob sums of all completions from one packed row, (completions,); every image goes in once."""
    batch = batch or concatenate([lay_out(prompt, completions) for prompt, _, completions in groups])
    tiles = [pixels for _, pixels, _ in groups if pixels is not None]
    images = {"pixel_values": torch.cat(tiles)} if tiles else {}
    inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "segments": batch.segments}
    logits = model(**inputs, **images, use_cache=False).logits
    return completion_sums(token_logps(logits, batch.shift_labels), batch.labelled)


def padded_sums(model, groups):
    """The same from one padded row per completion, images repeated."""
    rows = [
        (prompt + completion.ids, len(prompt), completion.loss_mask)
        for prompt, _, completions in groups
        for completion in completions
    ]
    tiles = [pixels for _, pixels, completions in groups for _ in completions if pixels is not None]
    images = {"pixel_values": torch.cat(tiles)} if tiles else {}
    width = max(len(ids) for ids, _, _ in rows)
    input_ids, mask, loss_mask = (torch.zeros(len(rows), width, dtype=torch.int64) for _ in range(3))
    for row, (ids, prompt_length, flags) in enumerate(rows):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        mask[row, : len(ids)] = 1
        loss_mask[row, prompt_length : len(ids)] = torch.tensor(flags, dtype=torch.int64)
    logits = model(input_ids=input_ids, attention_mask=mask, **images, use_cache=False).logits
    return (token_logps(logits[:, :-1], input_ids[:, 1:]).double() * loss_mask[:, 1:]).sum(1).float()


def gradients(model, sums):
    """Of a loss in which every completion counts differently."""
    model.zero_grad()
    (sums * torch.linspace(-1, 1.5, len(sums))).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same(model, groups):
    """Sums to 1e-6 of their size, every parameter's gradient to 1e-5 of its norm."""
    use_packed_attention(model)
    sums = packed_sums(model, groups)
    found = gradients(model, sums)
    with usual_attention(model):
        expected_sums = padded_sums(model, groups)
        expected = gradients(model, expected_sums)
    torch.testing.assert_close(sums, expected_sums, rtol=1e-6, atol=0)
    assert found.keys() == expected.keys()
    # In theory a key's bias has no gradient without rotary positions (the vision tower's): rounding is all it holds.
    floor = 1e-4 * torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm()
        assert error <= 1e-5 * gradient.norm().clamp(min=floor), (name, error / gradient.norm())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("completions", [1, 2, 3, 4, 5])
def test_images(processor, family, completions):
    """Three prompts with one, two and no images in one row."""
    groups = [with_images(processor, 10 * images, images, completions) for images in (1, 2, 0)]
    assert_same(internvl(processor, family), groups)


@pytest.mark.parametrize("family", FAMILIES)
def test_text(family):
    groups = [(random_ids(seed, length), None, some_completions(seed, 5)) for seed, length in ((1, 20), (2, 3), (3, 1))]
    assert_same(text_model(family), groups)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(processor, family, reentrant):
    """The layers run again in the backward pass, with the same segments."""
    model = internvl(processor, family).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    assert_same(model, [with_images(processor, 0, 1, 3), with_images(processor, 5, 0, 2)])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora(processor, checkpointing):
    torch.manual_seed(0)
    model = get_peft_model(internvl(processor), LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    assert_same(model, [with_images(processor, 0, 1, 3)])
    frozen = [parameter for name, parameter in model.named_parameters() if "lora" not in name]
    assert all(parameter.grad is None for parameter in frozen)


def fsdp2(model):
    for layer in model.model.language_model.layers:
        fully_shard(layer)
    return fully_shard(model)


@pytest.mark.parametrize("wrap", [DistributedDataParallel, fsdp2])
def test_distributed_wrappers(processor, tmp_path, wrap):
    """The segments reach the layers through the wrappers' hooks, unchanged."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = internvl(processor)
        groups = [with_images(processor, 0, 1, 3)]
        expected = padded_sums(model, groups)
        norm = torch.stack([gradient.norm() for gradient in gradients(model, expected).values()]).norm()
        wrapped = wrap(model)
        use_packed_attention(wrapped)
        sums = packed_sums(wrapped, groups)
        torch.testing.assert_close(sums, expected, rtol=1e-6, atol=0)
        found = gradients(wrapped, sums)
        torch.testing.assert_close(torch.stack([float_norm(gradient) for gradient in found.values()]).norm(), norm)
    finally:
        torch.distributed.destroy_process_group()


def float_norm(gradient):
    norm = gradient.norm()
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def test_half_precision(processor):
    """In bfloat16 packed rows err no more than twice what padded rows err against float32."""
    exact_model = internvl(processor)
    groups = [with_images(processor, seed, 1, 4) for seed in range(4)]
    exact = padded_sums(exact_model, groups)
    model = copy.deepcopy(exact_model).to(torch.bfloat16)
    padded_error = (padded_sums(model, groups) - exact).norm()
    use_packed_attention(model)
    assert (packed_sums(model, groups) - exact).norm() <= 2 * padded_error


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_autocast(family):
    """Float32 weights under autocast: rotary embeddings and norms leave queries in float32, values are bfloat16."""
    model = text_model(family)
    groups = [(random_ids(seed, 20), None, some_completions(seed, 4)) for seed in range(4)]
    exact = padded_sums(model, groups)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        padded_error = (padded_sums(model, groups) - exact).norm()
        use_packed_attention(model)
        assert 0 < (packed_sums(model, groups) - exact).norm() <= 2 * padded_error


def test_only_labelled_nodes_need_the_head(processor):
    model = internvl(processor)
    use_packed_attention(model)
    prompt, pixels, completions = with_images(processor, 0, 1, 5)
    batch = concatenate([lay_out(prompt, completions)])
    inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "segments": batch.segments}
    logits = model(**inputs, pixel_values=pixels, logits_to_keep=batch.labelled_positions).logits
    assert logits.shape[1] == len(batch.labelled_positions) < batch.input_ids.shape[1]
    logps = token_logps(logits, batch.shift_labels[:, batch.labelled_positions])[0]
    sums = completion_sums(torch.zeros(batch.input_ids.shape[1]).index_copy(0, batch.labelled_positions, logps), batch.labelled)
    torch.testing.assert_close(sums, packed_sums(model, [(prompt, pixels, completions)]), rtol=1e-6, atol=0)


def changed(completion, by=1):
    return Completion([(token + by) % 250 + 3 for token in completion.ids], completion.loss_mask)


def test_completions_do_not_see_each_other(processor):
    """Other tokens in one completion do not change the other's log-prob, bitwise; another prompt changes both."""
    model = internvl(processor).eval()
    use_packed_attention(model)
    prompt, pixels, (chosen, rejected) = with_images(processor, 0, 1, 2)

    def sums(prompt, chosen, rejected, pixels=pixels):
        with torch.no_grad():
            return packed_sums(model, [(prompt, pixels, [chosen, rejected])]).tolist()

    before = sums(prompt, chosen, rejected)
    other_rejected, other_chosen = sums(prompt, chosen, changed(rejected)), sums(prompt, changed(chosen), rejected)
    assert other_rejected[0] == before[0] and other_rejected[1] != before[1]
    assert other_chosen[1] == before[1] and other_chosen[0] != before[0]
    for other in (sums([prompt[0] + 1, *prompt[1:]], chosen, rejected), sums(prompt, chosen, rejected, pixels + 1)):
        assert other[0] != before[0] and other[1] != before[1]


def test_prompts_do_not_see_each_other():
    model = text_model()
    use_packed_attention(model)
    first, second = ((random_ids(seed, 8), None, some_completions(seed, 2)) for seed in (1, 2))
    other = (random_ids(3, 8), None, second[2])
    with torch.no_grad():
        assert torch.equal(packed_sums(model, [first, second])[:2], packed_sums(model, [first, other])[:2])


@pytest.mark.parametrize("mask", [True, False])
def test_usual_attention_does_not_fit_packed_rows(mask):
    """Why this module exists: on the same row, PyTorch's attention silently leaks or truncates.

    With a mask of ones the rejected completion sees the chosen one; without, transformers takes the copy's position for the start
    of another text, and the rejected completion loses the prompt.
    """
    model = text_model()
    prompt, _, (chosen, rejected) = group = (random_ids(1, 12), None, some_completions(1, 2))

    @torch.no_grad()
    def usual(prompt, chosen):
        batch = concatenate([lay_out(prompt, [chosen, rejected])])
        attention_mask = torch.ones_like(batch.input_ids) if mask else None
        inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "attention_mask": attention_mask}
        logits = model(**inputs, use_cache=False).logits
        return completion_sums(token_logps(logits, batch.shift_labels), batch.labelled)

    before = usual(prompt, chosen)
    assert not torch.allclose(before, padded_sums(model, [group]), rtol=1e-3)
    if mask:
        assert usual(prompt, changed(chosen))[1] != before[1]  # leaks
    else:
        assert usual(random_ids(7, 11) + prompt[-1:], chosen)[1] == before[1]  # truncates


@pytest.mark.parametrize("grouped_kernel", [True, False])
def test_varlen_call(monkeypatch, grouped_kernel):
    """The arguments of the varlen kernel, with PyTorch 2.11's signature and later ones; a mock computes it here."""
    model = text_model()
    groups = [(random_ids(seed, 6), None, some_completions(seed, 4)) for seed in (1, 2)]
    use_packed_attention(model)
    expected = packed_sums(model, groups)
    calls = []

    def kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        assert window_size == (-1, 0) and query.shape[1] == key.shape[1] == value.shape[1]
        assert cu_seq_q is not cu_seq_k and cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
        calls.append((max_q, max_k))
        outputs = []
        for begin, end, first, last in zip(cu_seq_q[:-1], cu_seq_q[1:], cu_seq_k[:-1], cu_seq_k[1:], strict=True):
            q, k, v = (x.transpose(0, 1) for x in (query[begin:end], key[first:last], value[first:last]))
            assert q.shape[1] <= max_q and k.shape[1] <= max_k
            mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
            outputs.append(scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(0, 1))
        return torch.cat(outputs)

    def grouped(query, key, value, *lengths, scale=None, window_size=(-1, -1), enable_gqa=False):
        assert enable_gqa and key.shape[1] < query.shape[1]
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
        return kernel(query, key, value, *lengths, scale=scale, window_size=window_size)

    monkeypatch.setattr(attention, "varlen_attn", grouped if grouped_kernel else kernel)
    monkeypatch.setattr(attention, "VARLEN_TAKES_GROUPS", grouped_kernel)
    monkeypatch.setattr(attention, "varlen_fits", lambda query: True)
    torch.testing.assert_close(packed_sums(model, groups), expected, rtol=1e-6, atol=0)
    assert len(calls) == 2  # one a layer
    use_packed_attention(model, "segments")
    packed_sums(model, groups)
    assert len(calls) == 2


@pytest.mark.slow
def test_compiled_layers_are_not_compiled_again_and_again():
    """Ten batches of different lengths: a few graphs, not ten."""
    torch._dynamo.reset()
    model = text_model()
    use_packed_attention(model)
    groups = [[(random_ids(seed, 5 + 40 * seed), None, some_completions(seed, 1 + seed % 4))] for seed in range(10)]
    expected = [packed_sums(model, group) for group in groups]
    graphs = torch._dynamo.testing.CompileCounter()
    for layer in model.model.layers:
        layer.compile(backend=graphs, dynamic=True)
    for group, sums in zip(groups, expected, strict=True):
        torch.testing.assert_close(packed_sums(model, group), sums, rtol=1e-6, atol=0)
    assert 0 < graphs.frame_count <= 8
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_layers_with_a_varlen_kernel_are_one_graph(monkeypatch):
    """No graph break, and one more graph for rows with branches; the kernel is a mock that computes nothing."""
    torch._dynamo.reset()
    monkeypatch.setattr(attention, "varlen_attn", lambda query, key, value, *offsets_and_maxima, **options: query)
    monkeypatch.setattr(attention, "varlen_fits", lambda query: True)
    model = text_model()
    use_packed_attention(model)
    graphs = torch._dynamo.testing.CompileCounter()
    for layer in model.model.layers:
        layer.compile(backend=graphs, dynamic=True, fullgraph=True)
    for seed in range(10):
        packed_sums(model, [(random_ids(seed, 5 + 60 * seed), None, some_completions(seed, 1 + seed % 4))])
    assert graphs.frame_count <= 2
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", BACKENDS)
def test_names_mean_nothing_to_transformers(backend):
    assert not any(part in BACKENDS[backend] for part in ("flash", "sdpa", "flex", "paged", "/", "|"))


def test_only_the_text_model_changes_and_can_change_back(processor, tmp_path):
    model = internvl(processor)
    before = model.config.text_config._attn_implementation
    vision = model.model.vision_tower.config._attn_implementation
    use_packed_attention(model)
    use_packed_attention(model)
    assert find_text_model(model) is model.model.language_model
    assert model.model.language_model.config._attn_implementation == BACKENDS["auto"]
    assert model.model.vision_tower.config._attn_implementation == vision
    model.save_pretrained(tmp_path)
    assert BACKENDS["auto"] not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    for one in (model, copy.deepcopy(model)):
        with pytest.raises(RuntimeError, match="stop"), usual_attention(one):
            assert one.model.language_model.config._attn_implementation == before
            raise RuntimeError("stop")
        assert one.model.language_model.config._attn_implementation == BACKENDS["auto"]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("adapter", [False, True])
def test_a_forward_without_segments_attends_as_before(processor, attention, adapter):
    """`generate` with a batch of left-padded prompts gives the same scores to the bit, and so does a forward of padded rows."""
    model = internvl(processor).eval()
    if adapter:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)).eval()
    find_text_model(model).set_attn_implementation(attention)
    prompts = [random_ids(0, 6), random_ids(1, 3), random_ids(2, 9)]
    ids = torch.tensor([[0] * (9 - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (9 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_scores": True, "eos_token_id": -1}

    def results():
        generated = model.generate(input_ids=ids, attention_mask=mask, **options)
        with torch.no_grad():
            rows = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return [generated.sequences, *generated.scores, rows]

    expected = results()
    alone = model.generate(input_ids=torch.tensor(prompts[1:2]), attention_mask=torch.ones(1, 3), **options)
    assert torch.equal(alone.sequences[0, 3:], expected[0][1, 9:])  # padding is masked
    for again in (1, 2):
        use_packed_attention(model)
        assert all(map(torch.equal, results(), expected)), again
        assert find_text_model(model).config._attn_implementation == BACKENDS["auto"]
    with usual_attention(model):
        assert all(map(torch.equal, results(), expected))
        assert find_text_model(model).config._attn_implementation == attention
    find_text_model(model).norm.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    assert find_text_model(model).config._attn_implementation == BACKENDS["auto"]


def test_wrong_segments_are_refused():
    model = text_model()
    use_packed_attention(model)
    group = (random_ids(1, 4), None, some_completions(1, 2))
    batch = concatenate([lay_out(group[0], group[2])])
    with pytest.raises(ValueError, match="Pass `segments=`"):  # a layer on its own, not the model
        layer = model.model.layers[0]
        positions = torch.arange(batch.input_ids.shape[1]).unsqueeze(0)
        hidden = model.get_input_embeddings()(batch.input_ids)
        layer(hidden, position_ids=positions, position_embeddings=model.model.rotary_emb(hidden, positions))
    with pytest.raises(ValueError, match=f"1 row of {batch.input_ids.shape[1]} tokens"):
        model(input_ids=batch.input_ids[:, 1:], segments=batch.segments)
    with pytest.raises(ValueError, match="got 2 rows"):
        model(input_ids=batch.input_ids.repeat(2, 1), segments=batch.segments)
    with pytest.raises(ValueError, match="attention_mask"):
        mask = torch.ones(1, 1, *[batch.input_ids.shape[1]] * 2)
        model(input_ids=batch.input_ids, segments=batch.segments, attention_mask=mask)


def test_segments_move_with_the_batch():
    """Accelerate moves objects with `to`; nothing already on the device is copied."""
    segments = concatenate([lay_out([1, 2], [Completion([3], [True]), Completion([4], [True])])]).segments
    moved = send_to_device({"segments": segments}, "meta")["segments"]
    assert {moved.cu_seqlens_q.device.type, moved.cu_seqlens_k.device.type, moved.key_index.device.type} == {"meta"}
    assert send_to_device({"segments": segments}, torch.device("cpu"))["segments"] is segments


def test_refused_backends():
    model = text_model()
    with pytest.raises(ValueError, match="auto, segments, .*'triton'"):
        use_packed_attention(model, "triton")
    with pytest.raises(ValueError, match="flash_attn_interface"):
        use_packed_attention(model, "flash_attn_3")
    assert model.config._attn_implementation not in BACKENDS.values()


@pytest.mark.parametrize("family", FAMILIES)
def test_models_that_fit(processor, family):
    assert why_not(internvl(processor, family)) is None
    assert why_not(text_model(family)) is None
    assert why_not(get_peft_model(text_model(family), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))) is None


def small(config, model, **changes):
    """On the meta device: only the modules and config matter."""
    with torch.device("meta"):
        return getattr(transformers, model)(getattr(transformers, config)(**{**SIZES, "num_key_value_heads": 2, **changes}))


UNFIT = [
    ("Qwen2Config", "Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "sliding"),
    ("MistralConfig", "MistralForCausalLM", {"sliding_window": 8}, "sliding"),
    ("Gemma2Config", "Gemma2ForCausalLM", {"head_dim": 16}, "sliding_attention"),
    ("GptOssConfig", "GptOssForCausalLM", {"head_dim": 16, "layer_types": ["full_attention"] * 2, "sliding_window": None}, "sinks"),
    ("Qwen2Config", "Qwen2ForCausalLM", {"attention_dropout": 0.1}, "attention dropout"),
    ("GPT2Config", "GPT2LMHeadModel", {}, "stack of layers"),
    ("StableLmConfig", "StableLmForCausalLM", {}, "does not pass keyword arguments on"),
    ("MambaConfig", "MambaForCausalLM", {}, ""),
    ("Qwen3NextConfig", "Qwen3NextForCausalLM", {"head_dim": 16}, "linear_attention"),
    ("T5Config", "T5ForConditionalGeneration", {"d_model": 32, "d_kv": 8, "d_ff": 32}, "encoder-decoder"),
    ("DeepseekV3Config", "DeepseekV3ForCausalLM", {"n_routed_experts": 8}, "another width"),
]


@pytest.mark.parametrize(("config", "model", "changes", "reason"), UNFIT, ids=[f"{case[1]}-{case[3]}" for case in UNFIT])
def test_models_that_do_not_fit(config, model, changes, reason):
    model = small(config, model, **changes)
    assert reason in (why_not(model) or "it fits")
    with pytest.raises(ValueError, match="Use padded rows"):
        use_packed_attention(model)


def test_image_models_with_masks_or_positions_of_their_own():
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 64, "embed_dim": 32}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    text = {**SIZES, "num_key_value_heads": 2, "rope_parameters": rope}
    with torch.device("meta"):
        config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
        assert "plain text model" in why_not(transformers.Qwen2_5_VLForConditionalGeneration(config))
    assert "several dimensions" in why_not(text_model(rope_parameters=rope))


def test_virtual_tokens_do_not_fit():
    adapter = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    assert "virtual tokens" in why_not(get_peft_model(text_model(), adapter))


def test_other_modules_do_not_fit():
    assert "no text decoder" in why_not(torch.nn.Linear(2, 2))
    with usual_attention(torch.nn.Linear(2, 2)):
        pass

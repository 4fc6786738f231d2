"""Log-probs of given completions: packed rows against padded ones, and against a plain forward pass of each completion."""

import copy

import pytest
import torch
from packed_and_padded import in_bfloat16, internvl, text_model
from peft import LoraConfig, get_peft_model
from support import make_image

from mpo.batching.logprobs import completion_logprobs
from mpo.generation.generator import Request
from mpo.generation.local import LocalGenerator

REQUESTS = [
    Request.ask("What is the sum?", images=[make_image(1, width=96)]),
    Request.ask("What is 2 plus 3?"),
    Request.ask("Which is larger?", images=[make_image(2), make_image(3, width=32)], prefix="The answer"),
    Request.ask("And now?", images=[make_image(1, width=96)]),
]
COMPLETIONS = [["2 plus 3 is 5.", "2 plus 3 is not 5.", "5"], ["5", "5", "a cat"], [" is 5.", " is"], []]


def by_hand(model, processor, request, completion):
    """The prompt and the completion as one row, without padding, through the processor."""
    content = [part for part in request.messages[0]["content"]]
    chat = [{"role": "user", "content": content}, {"role": "assistant", "content": [{"type": "text", "text": completion}]}]
    chat[1]["content"][0]["text"] = (request.prefix or "") + completion
    whole = processor.apply_chat_template(chat, tokenize=False).removesuffix("\n")
    opening = processor.apply_chat_template(chat[:1], add_generation_prompt=True, tokenize=False) + (request.prefix or "")
    assert whole.startswith(opening)
    images = {"images": list(request.images)} if request.images else {}
    images |= {"max_patches": max(1, 4 // len(request.images))} if request.images else {}
    inputs, start = (processor(text=text, return_tensors="pt", add_special_tokens=False, **images) for text in (whole, opening))
    with torch.no_grad():
        logps = model(**inputs).logits.float().log_softmax(-1)[0, :-1].gather(1, inputs["input_ids"][0, 1:, None])[:, 0]
    return logps[start["input_ids"].shape[1] - 1 :]


@pytest.mark.parametrize("max_tokens", [1, 100, 8192])
@pytest.mark.parametrize("layout", [None, "padded"])
def test_log_probs_are_those_of_each_completion_alone(processor, layout, max_tokens):
    model = internvl(processor)
    found = completion_logprobs(model, processor, REQUESTS, COMPLETIONS, layout=layout, max_tokens_per_batch=max_tokens)
    assert [len(several) for several in found] == [3, 3, 2, 0]
    for request, given, several in zip(REQUESTS, COMPLETIONS, found, strict=True):
        for completion, logps in zip(given, several, strict=True):
            torch.testing.assert_close(logps, by_hand(model, processor, request, completion), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("prefix", ["The ", "The answer", "The\n", None])
def test_log_probs_are_those_of_generation_whatever_else_is_scored(processor, layout, prefix):
    """Alone and with others that merge with the prefix; and those of sampled responses are what the sampler said."""
    model = internvl(processor)
    request = Request.ask("What is 2 plus 3?", prefix=prefix)
    given = [" five", "five", "fi", "s", "\nno", "  5"]
    together = completion_logprobs(model, processor, [request], [given], layout=layout)[0]
    for text, logps in zip(given, together, strict=True):
        torch.testing.assert_close(completion_logprobs(model, processor, [request], [[text]], layout=layout)[0][0], logps)
    checked = 0
    for one in LocalGenerator(model, processor).generate([request], n=16, max_new_tokens=1, logprobs=True, seed=1)[0]:
        ids = processor.tokenizer(one.text)["input_ids"]
        if one.finish_reason == "length" and one.text.strip() and len(ids) == 1 and "\ufffd" not in one.text:
            ((logps,),) = completion_logprobs(model, processor, [request], [[one.text]], layout=layout)
            assert logps[0].item() == pytest.approx(one.logprobs[0], abs=1e-4) and len(logps) == 2
            checked += 1
    assert checked > 3


def test_training_mode_attention_and_generation_are_as_before(processor):
    model = internvl(processor).train()
    before = model.config.text_config._attn_implementation
    first = LocalGenerator(model, processor).generate(REQUESTS[:1], temperature=0, max_new_tokens=4)
    completion_logprobs(model, processor, REQUESTS, COMPLETIONS)
    assert model.training and model.config.text_config._attn_implementation == before
    assert LocalGenerator(model, processor).generate(REQUESTS[:1], temperature=0, max_new_tokens=4) == first


def test_bfloat16_errs_no_more_than_padded_rows(processor):
    """Against float32: at most twice what padded rows err, plus one rounding."""
    exact = completion_logprobs(internvl(processor), processor, REQUESTS, COMPLETIONS, layout="padded")
    model = in_bfloat16(internvl(processor))
    errors = []
    for layout in ("packed", "padded"):
        found = completion_logprobs(model, processor, REQUESTS, COMPLETIONS, layout=layout)
        pairs = [pair for one, other in zip(found, exact, strict=True) for pair in zip(one, other, strict=True)]
        errors.append(max((one - other).abs().max().item() for one, other in pairs))
    assert errors[0] <= 2 * errors[1] + 2**-8


def test_adapters_text_models_and_models_that_cannot_be_packed(processor):
    text = text_model(vocab_size=len(processor.tokenizer))
    adapted = get_peft_model(text, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"))
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.chat_template = processor.chat_template
    one, other = (
        completion_logprobs(adapted, tokenizer, REQUESTS[1:2], COMPLETIONS[1:2], layout=layout) for layout in ("packed", "padded")
    )
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    sliding = text_model(vocab_size=len(tokenizer), use_sliding_window=True, sliding_window=4, max_window_layers=0)
    assert completion_logprobs(sliding, tokenizer, REQUESTS[1:2], COMPLETIONS[1:2])
    with pytest.raises(ValueError, match="layout='padded'"):
        completion_logprobs(sliding, tokenizer, REQUESTS[1:2], COMPLETIONS[1:2], layout="packed")


@pytest.mark.parametrize(
    ("requests", "completions", "settings", "name"),
    [
        (REQUESTS[:2], [["5"]], {}, "2 requests and 1"),
        (REQUESTS[:2], [["5"], [""]], {}, "request 1"),
        (REQUESTS[:1], [["5"]], {"layout": "rows"}, "layout='rows'"),
        (REQUESTS[:1], ["5 6"], {}, "'5 6'"),
        (REQUESTS[:1], [[5]], {}, "5"),
        (REQUESTS[:1], [["5"]], {"max_tokens_per_batch": 0}, "max_tokens_per_batch=0"),
        ([Request.ask("?", images=["gone.png"])], [["5"]], {}, "request 0.*gone"),
        ([Request.ask("5 " * 40_000)], [["5"]], {}, "request 0.*context"),
        (REQUESTS[:2], [["5"], ["5", "5 " * 40_000]], {}, "request 1.*context"),
        (REQUESTS[:1], [["<IMG_CONTEXT>"]], {}, "request 0.*completion 0.*IMG_CONTEXT"),
    ],
)
def test_what_cannot_be_scored_is_named(processor, requests, completions, settings, name):
    with pytest.raises(ValueError, match=name):
        completion_logprobs(internvl(processor), processor, requests, completions, **settings)

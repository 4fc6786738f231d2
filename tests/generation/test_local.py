"""Text generation with a model in this process."""

import asyncio
import copy
import re

import pytest
import torch
from support import make_image
from tokenizers.processors import TemplateProcessing
from transformers import Qwen2ForCausalLM

from mpo.data.images import open_image
from mpo.encoding.encoder import Encoder
from mpo.generation.generator import Decoding, GenerationError, Request
from mpo.generation.local import LocalGenerator, _record
from mpo.generation.steps import TextStream, gumbel_noise
from mpo.models.export import trial

QUESTIONS = [
    Request.ask("What is the sum?", images=[make_image(1, width=96)]),
    Request.ask("Which is the largest of all the numbers in this image?", images=[make_image(2, width=32)]),
    Request.ask("What is 2 plus 3?"),
    Request.ask("Is the first image like the second?", images=[make_image(3, width=64), make_image(4, width=32)]),
    Request.ask("What is the sum?", images=[make_image(5, width=64)]),
]


def texts(responses):
    return [[response.text for response in several] for several in responses]


def streamed(generator, requests, **settings):
    async def collect():
        return [found async for found in generator.stream(requests, **settings)]

    return asyncio.run(collect())


@pytest.fixture
def lively(internvl):
    """Larger weights, so that the model's output depends on its input."""
    with torch.no_grad():
        for parameter in internvl.parameters():
            parameter.mul_(3)
    return internvl


def test_every_question_gets_n_responses_in_order(lively, processor):
    generator = LocalGenerator(lively, processor)
    responses = generator.generate(QUESTIONS, n=3, max_new_tokens=6)
    assert [len(several) for several in responses] == [3] * len(QUESTIONS)
    assert all(isinstance(response.text, str) for several in responses for response in several)
    assert generator.usage.responses == 15 and generator.usage.requests == 5 and generator.usage.cost is None
    assert generator.usage.completion_tokens == sum(one.completion_tokens for several in responses for one in several)


def test_seed_decides_the_responses_and_leaves_the_random_state(lively, processor):
    generator = LocalGenerator(lively, processor, responses_per_batch=4)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first, again, other = (generator.generate(QUESTIONS, n=2, max_new_tokens=8, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(torch.rand(1), expected)
    assert first == again
    assert first != other


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"n": 2}, {"temperature": 0.7, "top_p": 0.9, "top_k": 50}], ids=str)
def test_responses_do_not_depend_on_the_batch(lively, processor, settings):
    """Alone, in a batch with others, in another order, batch by batch and streamed: the same text of each request and sample."""
    settings = {"max_new_tokens": 5, "seed": 4, **settings}
    requests = [*QUESTIONS, Request.ask("And 3 plus 4?"), Request.ask("What is the sum?", images=QUESTIONS[1].images)]
    generator = LocalGenerator(lively, processor)
    alone = [texts(generator.generate([request], **settings))[0] for request in requests]
    assert texts(generator.generate(requests[::-1], **settings)) == alone[::-1]
    for size in (1, 64):
        assert texts(LocalGenerator(lively, processor, responses_per_batch=size).generate(requests, **settings)) == alone
    found = {(place, number): response.text for place, number, response in streamed(generator, requests, concurrency=3, **settings)}
    assert found == {(place, number): text for place, several in enumerate(alone) for number, text in enumerate(several)}
    assert len({text for several in alone for text in several}) > len(requests) - 2


def test_a_stream_samples_the_numbers_that_are_missing(lively, processor):
    generator = LocalGenerator(lively, processor)
    (expected,) = texts(generator.generate(QUESTIONS[:1], n=4, max_new_tokens=6))

    async def requests():
        yield QUESTIONS[0], (1, 3)

    found = streamed(generator, requests(), n=4, max_new_tokens=6)
    assert [(place, number, response.text) for place, number, response in found] == [(0, 1, expected[1]), (0, 3, expected[3])]


def test_a_stream_answers_what_others_wait_for(lively, processor):
    """The next request comes when the one before has its response, in a batch that is never full."""
    answered = asyncio.Event()

    async def requests():
        yield QUESTIONS[0]
        await answered.wait()
        yield QUESTIONS[0]

    async def collect():
        found = []
        async for place, *_ in LocalGenerator(lively, processor).stream(requests(), max_new_tokens=2):
            found.append(place)
            answered.set()
        return found

    assert asyncio.run(asyncio.wait_for(collect(), 60)) == [0, 1]


def test_a_stream_goes_on_after_a_request_that_fails(lively, processor):
    gone = Request.ask("What is it?", images=["gone.png"])
    found = streamed(LocalGenerator(lively, processor), [QUESTIONS[2], gone, QUESTIONS[2]], n=2, max_new_tokens=2)
    failed = [(place, number) for place, number, response in found if isinstance(response, GenerationError)]
    assert failed == [(1, 0), (1, 1)] and len(found) == 6
    assert all("gone.png" in response.reason for place, _, response in found if place == 1)
    with pytest.raises(ValueError, match=r"request 1.*gone\.png"):
        LocalGenerator(lively, processor).generate([QUESTIONS[2], gone])


def test_a_stream_takes_no_more_requests_than_it_needs(lively, processor):
    """Of endless requests, two batches of two are taken until the third response is here."""
    taken = []

    def endless():
        while True:
            taken.append(len(taken))
            yield QUESTIONS[2]

    async def three():
        stream = LocalGenerator(lively, processor, responses_per_batch=2).stream(endless(), max_new_tokens=1)
        return [await anext(stream) for _ in range(3)]

    assert [place for place, _, _ in asyncio.run(three())] == [0, 1, 2] and len(taken) == 4


def test_shared_prompts_give_what_separate_prompts_give(lively, processor):
    """With top_k=1 sampling is greedy, so each of the n responses from one shared prompt is the greedy response.

    Images of several tiles are what `generate(num_return_sequences=n)` may mix up.
    """
    generator = LocalGenerator(lively, processor)
    greedy = texts(generator.generate(QUESTIONS, temperature=0, max_new_tokens=8))
    shared = texts(generator.generate(QUESTIONS, n=3, temperature=1.0, top_k=1, max_new_tokens=8))
    assert shared == [several * 3 for several in greedy]
    assert len({several[0] for several in greedy}) > 1  # the response depends on the question
    coldest = generator.generate(QUESTIONS, temperature=1e-320, max_new_tokens=8)  # 0 in float32
    assert texts(coldest) == greedy


def test_sampling_follows_the_models_distribution(lively, processor):
    """4,000 first tokens of one question against the softmax of its logits: no frequency is 5 standard errors off."""
    question = QUESTIONS[0]
    generator = LocalGenerator(lively, processor, responses_per_batch=4000)
    inputs = generator.encode([_record(question, 0)])[1]
    with torch.no_grad():
        expected = lively(**inputs).logits[0, -1].softmax(-1)
    (responses,) = texts(generator.generate([question], n=4000, max_new_tokens=1))
    likeliest = expected.argmax()
    text = processor.tokenizer.decode(likeliest, skip_special_tokens=True)
    same_text = [i for i in range(len(processor.tokenizer)) if processor.tokenizer.decode(i, skip_special_tokens=True) == text]
    share = expected[same_text].sum().item()
    error = (share * (1 - share) / 4000) ** 0.5
    assert abs(responses.count(text) / 4000 - share) < 5 * error


def test_training_mode_comes_back(lively, processor):
    lively.train()
    LocalGenerator(lively, processor).generate(QUESTIONS[:1], max_new_tokens=1)
    assert lively.training


@pytest.mark.parametrize(
    "settings",
    [
        *({"n": 0}, {"n": 1.5}, {"max_new_tokens": 0}, {"max_new_tokens": True}, {"n": 2, "temperature": 0.0}),
        *({"temperature": -1.0}, {"temperature": float("nan")}, {"temperature": float("inf")}, {"temperature": "1"}),
        *({"seed": -1}, {"seed": 1.5}, {"seed": None}, {"seed": "a"}, {"top_k": -1}, {"top_k": 0.5}),
        *({"stop": ("a", "")}, {"stop": (1,)}, {"logprobs": 1}),
        *(
            {"top_p": 0.0},
            {"top_p": 1.5},
            {"top_p": float("nan")},
            {"temperature": 0, "top_p": 0.5},
            {"temperature": 0, "top_k": 5},
        ),
    ],
    ids=str,
)
def test_invalid_arguments_are_refused(internvl, processor, settings):
    name, value = list(settings.items())[-1]
    with pytest.raises(ValueError, match=re.escape(f"{name}={value:g}" if isinstance(value, float) else f"{name}={value!r}")):
        LocalGenerator(internvl, processor).generate(QUESTIONS, **settings)


def test_an_unknown_tile_budget_and_no_records_are_refused(internvl, processor):
    with pytest.raises(ValueError, match="tile_budget='images'"):
        LocalGenerator(internvl, processor, tile_budget="images")
    with pytest.raises(ValueError, match="no records"):
        LocalGenerator(internvl, processor).encode([])


@pytest.mark.parametrize("text", ["", " \n", "<image>", "What is <video>?"])
def test_questions_without_a_text_or_with_a_placeholder_are_refused(text):
    with pytest.raises(ValueError, match="question"):
        Request.ask(text)


USER = {"role": "user", "content": "What is it?"}


@pytest.mark.parametrize(
    ("request_of", "name"),
    [
        (lambda: Request([]), "no messages"),
        (lambda: Request([USER, {"role": "assistant", "content": "It is"}]), "prefix"),
        (lambda: Request([{"role": "system", "content": "Be brief."}]), "user"),
        (lambda: Request([{"role": "user", "content": [{"type": "image"}]}]), "0 images"),
        (lambda: Request([USER], images="a.png"), "'a.png'"),
        (lambda: Request([USER], prefix=" \n"), "prefix="),
        (lambda: Request([USER], prefix="\ud800"), "prefix"),
        (lambda: Request([USER], prefix=5), "prefix"),
        (lambda: Request([{"role": "robot", "content": "?"}]), "'robot'"),
        (lambda: Request([{"role": "user", "content": None}]), "null"),
    ],
)
def test_requests_that_cannot_be_asked_are_refused(request_of, name):
    with pytest.raises(ValueError, match=name):
        request_of()


@pytest.mark.parametrize("question", QUESTIONS[1:4], ids=["an image", "text", "two images"])
def test_a_prefix_is_gone_on_from(lively, processor, question):
    """The greedy response, asked for again from each of its beginnings, ends in the same text; without special tokens."""
    generator = LocalGenerator(lively, processor)
    ((whole,),) = generator.generate([question], temperature=0, max_new_tokens=12)
    text, cut = whole.text, len(whole.text) // 2
    while cut < len(text) and (text[cut - 1].isspace() or "\ufffd" in text[:cut]):
        cut += 1
    begun = Request(question.messages, question.images, prefix="The answer is 5")
    ((response,),) = generator.generate([begun], temperature=0, max_new_tokens=6)
    prompt = generator.encode([_record(begun, 0)])[1]["input_ids"][0].tolist()
    assert processor.tokenizer.decode(prompt).endswith("assistant\nThe answer is 5")
    assert not response.text.startswith("The answer") and response.prompt_tokens == len(prompt)
    pieces = []
    assert generator.ask(begun, temperature=0, max_new_tokens=6, on_text=pieces.append).text == "".join(pieces) == response.text


def test_a_prefix_whose_space_the_template_cuts_off_is_refused(lively, processor):
    trimming = copy.deepcopy(processor)
    trimming.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {% for p in m['content'] %}{{ (p['text'] or '') | trim }}{% endfor %}\n"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    generator = LocalGenerator(lively, trimming)
    assert generator.generate([Request([USER], prefix="It is")], max_new_tokens=1)
    with pytest.raises(ValueError, match="'It is '"):
        generator.generate([Request([USER], prefix="It is ")], max_new_tokens=1)


def test_stop_texts_end_a_response(lively, processor):
    """A text of the free response, of any place in it, ends the next one before it, and so does one of several tokens."""
    generator = LocalGenerator(lively, processor)
    free = [several[0] for several in generator.generate(QUESTIONS, temperature=0, max_new_tokens=24)]
    for request, response in zip(QUESTIONS, free, strict=True):
        stop = response.text[len(response.text) // 2 :][:3]
        ((ended,),) = generator.generate([request], temperature=0, max_new_tokens=24, stop=(stop, "never there"))
        pieces = []
        shown = generator.ask(request, temperature=0, max_new_tokens=24, stop=stop, on_text=pieces.append)
        assert ended.text == response.text.split(stop)[0] == shown.text == "".join(pieces)
        assert ended.finish_reason == "stop" and ended.completion_tokens < response.completion_tokens
    stop = free[0].text[4:6]
    together = generator.generate(QUESTIONS, temperature=0, max_new_tokens=24, stop=[stop])
    assert [several[0].text for several in together] == [response.text.split(stop)[0] for response in free]


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 2.0, "n": 2, "top_k": 40}], ids=["greedy", "sampled"])
def test_logprobs_are_those_of_the_models_own_distribution(lively, processor, settings):
    generator = LocalGenerator(lively, processor)
    (responses,) = generator.generate(QUESTIONS[:1], max_new_tokens=5, logprobs=True, **settings)
    samples = generator.respond([_record(QUESTIONS[0], 0)], max_new_tokens=5, **settings)[0]
    inputs = generator.encode([_record(QUESTIONS[0], 0)])[1]
    for response, sample in zip(responses, samples, strict=True):
        ids = torch.cat([inputs["input_ids"], torch.tensor([sample.ids])], dim=1)
        with torch.no_grad():
            logits = lively(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0, -len(sample.ids) - 1 : -1]
        expected = logits.log_softmax(-1)[range(len(sample.ids)), list(sample.ids)]
        assert len(response.logprobs) == response.completion_tokens
        torch.testing.assert_close(torch.tensor(response.logprobs[: len(sample.ids)]), expected, rtol=1e-4, atol=1e-4)


def test_gumbel_noise_has_its_mean_and_variance():
    """Mean 0.5772 (Euler's constant), variance pi^2 / 6; other rows, steps and tokens are independent. 5 standard errors."""
    noise = torch.stack([gumbel_noise(torch.tensor([[1], [2]]), step, 50_000) for step in range(2)]).flatten(0, 1)
    error = (torch.pi**2 / 6 / noise.numel()) ** 0.5
    assert abs(noise.mean() - 0.577216) < 5 * error and abs(noise.var() - torch.pi**2 / 6) < 0.05
    correlation = torch.corrcoef(torch.cat([noise, noise[:1].roll(1, 1)])).fill_diagonal_(0)
    assert correlation.abs().max() < 5 / 50_000**0.5


def test_bfloat16_and_a_text_model(lively, processor):
    text_model = Qwen2ForCausalLM(lively.config.text_config)
    assert len(LocalGenerator(text_model, processor.tokenizer).generate([QUESTIONS[2]], n=2, max_new_tokens=3)[0]) == 2
    with pytest.raises(ValueError, match="request 0.*processor"):
        LocalGenerator(text_model, processor.tokenizer).generate(QUESTIONS[:1])
    half = LocalGenerator(lively.bfloat16(), processor)
    assert texts(half.generate(QUESTIONS[:2], n=2, max_new_tokens=4)) == texts(half.generate(QUESTIONS[:2], n=2, max_new_tokens=4))


def test_a_prompt_beyond_the_context_is_named(lively, processor):
    generator = LocalGenerator(lively, processor)
    limit = lively.config.text_config.max_position_embeddings
    with pytest.raises(ValueError, match=f"request 1.*{limit}"):
        generator.generate([QUESTIONS[2], Request.ask("5 " * limit)], max_new_tokens=1)


def test_logits_that_are_not_numbers_are_refused(lively, processor):
    with torch.no_grad():
        next(lively.parameters()).fill_(torch.nan)
        lively.lm_head.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="nan"):
        LocalGenerator(lively, processor).generate([QUESTIONS[2]], max_new_tokens=1)


def test_identity_follows_the_weights(lively, processor):
    first = LocalGenerator(lively, processor).identity()
    assert first == LocalGenerator(copy.deepcopy(lively), processor).identity()
    with torch.no_grad():
        lively.lm_head.weight[0, 0] += 1
    assert first != LocalGenerator(lively, processor).identity()
    assert first != LocalGenerator(copy.deepcopy(lively), processor, tile_budget="image").identity()


def test_a_video(lively, processor, tmp_path):
    """Eight frames of one tile with four image tokens."""
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height = 64, 32
        for seed in range(8):
            container.mux(stream.encode(av.VideoFrame.from_image(make_image(seed))))
        container.mux(stream.encode())
    generator = LocalGenerator(lively, processor)
    ((response,),) = generator.generate([Request.ask("What happens?", videos=[tmp_path / "a.mp4"])], max_new_tokens=2)
    assert response.prompt_tokens > 8 * 4
    with pytest.raises(ValueError, match=r"gone\.mp4"):
        generator.generate([Request.ask("What happens?", videos=["gone.mp4"])])


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 1.0, "seed": 3}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("question", QUESTIONS[:3], ids=["tiles", "one tile", "text"])
def test_the_stream_is_the_response(lively, processor, question, settings):
    pieces = []
    reply = LocalGenerator(lively, processor).ask(question, max_new_tokens=12, **settings, on_text=pieces.append)
    ((expected,),) = LocalGenerator(lively, processor).generate([question], max_new_tokens=12, **settings)
    assert "".join(pieces) == reply.text == expected.text and reply == expected and len(pieces) > 1
    assert reply.prompt_tokens == LocalGenerator(lively, processor).encode([_record(question, 0)])[1]["input_ids"].shape[1]
    assert reply.completion_tokens <= 12 and (reply.finish_reason == "length") == (reply.completion_tokens == 12)


@pytest.mark.parametrize("spaces", [False, True])
def test_a_character_of_several_tokens_and_spaces_that_go(processor, spaces):
    """Five bytes tokens of two characters; a tokenizer that removes spaces before punctuation; an end token's text is not shown."""
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.clean_up_tokenization_spaces = spaces
    ids = tokenizer("caf\u00e9 is n't \u732b . So", add_special_tokens=False)["input_ids"]
    end = tokenizer("Z", add_special_tokens=False)["input_ids"][0]
    pieces = []
    streamer = TextStream(tokenizer, [end], Decoding(), pieces.append)
    for token in ([1, 2, 3], *ids, end):
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True) and "\ufffd" not in "".join(pieces)


def test_images_that_cannot_be_opened_are_named(tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_text("no image")
    with pytest.raises(ValueError, match=r"missing\.png"):
        open_image(tmp_path / "missing.png")
    with pytest.raises(ValueError, match=r"broken\.png"):
        open_image(broken)


def test_no_questions_give_no_responses(internvl, processor):
    assert LocalGenerator(internvl, processor).generate([], n=4) == []
    with pytest.raises(ValueError, match="list of requests"):
        LocalGenerator(internvl, processor).generate(QUESTIONS[0])


@pytest.fixture
def with_bos(processor):
    """A processor whose template and tokenizer both begin a text with <|endoftext|>, as Llama's do with their BOS."""
    changed = copy.deepcopy(processor)
    bos = "<|endoftext|>"
    backend = changed.tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))])
    changed.tokenizer.bos_token = bos
    changed.chat_template = "{{ '" + bos + "' }}" + processor.chat_template
    return changed


@pytest.mark.parametrize("questions", [QUESTIONS[:1], QUESTIONS[2:3], QUESTIONS], ids=["an image", "text", "both"])
def test_bos_stands_once(internvl, with_bos, questions):
    """Prompts are those of training, token by token; padding is left of them."""
    assert with_bos.tokenizer("a")["input_ids"][0] == with_bos.tokenizer.bos_token_id
    inputs = LocalGenerator(internvl, with_bos).encode([_record(request, number) for number, request in enumerate(questions)])[1]
    records = [{"prompt": list(one.messages), "images": list(one.images)} for one in questions]
    prompts, _, _ = Encoder(with_bos)(records, sides=())
    mask = inputs["attention_mask"].bool()
    assert [row[own].tolist() for row, own in zip(inputs["input_ids"], mask, strict=True)] == [one.prompt_ids for one in prompts]
    assert all(one.prompt_ids.count(with_bos.tokenizer.bos_token_id) == 1 for one in prompts)
    assert trial.question(with_bos)["input_ids"][0].tolist().count(with_bos.tokenizer.bos_token_id) == 1


def test_a_prompt_of_one_token_has_several_responses(lively, processor):
    responses = LocalGenerator(lively, processor).respond([{"prompt": "a"}], n=3, max_new_tokens=2)
    assert [len(several) for several in responses] == [3]


@pytest.mark.parametrize(
    "setting", [{"min_p": 0.9}, {"suppress_tokens": list(range(3, 200))}, {"num_beams": 2}, {"num_return_sequences": 2}]
)
def test_only_the_end_tokens_of_the_generation_config_count(lively, processor, setting):
    """The model's own distribution, whatever decoding its checkpoint suggests; the config is the same afterwards."""
    generator = LocalGenerator(lively, processor)
    expected = generator.generate(QUESTIONS[:2], max_new_tokens=4)
    for name, value in setting.items():
        setattr(lively.generation_config, name, value)
    assert generator.generate(QUESTIONS[:2], max_new_tokens=4) == expected
    assert all(getattr(lively.generation_config, name) == value for name, value in setting.items())

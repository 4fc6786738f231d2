"""Text generation with a model in this process."""

import copy
import re

import pytest
import torch
from support import make_image
from tokenizers.processors import TemplateProcessing

from mpo.data.images import open_image
from mpo.encoding.encoder import Encoder
from mpo.generation.before import Question
from mpo.generation.local import LocalGenerator, _record, _Streamer
from mpo.models.export import trial

QUESTIONS = [
    Question("What is the sum?", (make_image(1, width=96),)),
    Question("Which is the largest of all the numbers in this image?", (make_image(2, width=32),)),
    Question("What is 2 plus 3?"),
    Question("Is the first image like the second?", (make_image(3, width=64), make_image(4, width=32))),
    Question("What is the sum?", (make_image(5, width=64),)),
]


@pytest.fixture
def lively(internvl):
    """Larger weights, so that the model's output depends on its input."""
    with torch.no_grad():
        for parameter in internvl.parameters():
            parameter.mul_(3)
    return internvl


def test_every_question_gets_n_responses_in_order(lively, processor):
    responses = LocalGenerator(lively, processor).generate(QUESTIONS, n=3, max_new_tokens=6)
    assert [len(texts) for texts in responses] == [3] * len(QUESTIONS)
    assert all(isinstance(text, str) for texts in responses for text in texts)


def test_seed_decides_the_responses_and_leaves_the_random_state(lively, processor):
    generator = LocalGenerator(lively, processor, responses_per_batch=4)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first, again, other = (generator.generate(QUESTIONS, n=2, max_new_tokens=8, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(torch.rand(1), expected)
    assert first == again
    assert first != other


@pytest.mark.parametrize("responses_per_batch", [1, 2, 64])
def test_greedy_responses_do_not_depend_on_the_batch(lively, processor, responses_per_batch):
    alone = [LocalGenerator(lively, processor).generate([question], temperature=0, max_new_tokens=8)[0] for question in QUESTIONS]
    generator = LocalGenerator(lively, processor, responses_per_batch=responses_per_batch)
    assert generator.generate(QUESTIONS, temperature=0, max_new_tokens=8) == alone


def test_shared_prompts_give_what_separate_prompts_give(lively, processor):
    """With top_k=1 sampling is greedy, so each of the n responses from one shared prompt is the greedy response.

    Images of several tiles are what `generate(num_return_sequences=n)` may mix up.
    """
    generator = LocalGenerator(lively, processor)
    greedy = generator.generate(QUESTIONS, temperature=0, max_new_tokens=8)
    shared = generator.generate(QUESTIONS, n=3, temperature=1.0, top_k=1, max_new_tokens=8)
    assert shared == [texts * 3 for texts in greedy]
    assert len({texts[0] for texts in greedy}) > 1  # the response depends on the question


def test_sampling_follows_the_models_distribution(lively, processor):
    """4,000 first tokens of one question against the softmax of its logits: no frequency is 5 standard errors off."""
    question = QUESTIONS[0]
    generator = LocalGenerator(lively, processor, responses_per_batch=4000)
    inputs = generator.encode([_record(question)])
    with torch.no_grad():
        expected = lively(**inputs).logits[0, -1].softmax(-1)
    responses = generator.generate([question], n=4000, max_new_tokens=1)[0]
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
        Question(text)


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 1.0, "seed": 3}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("question", QUESTIONS[:3], ids=["tiles", "one tile", "text"])
def test_the_stream_is_the_response(lively, processor, question, settings):
    pieces = []
    reply = LocalGenerator(lively, processor).ask(question, max_new_tokens=12, **settings, on_text=pieces.append)
    ((expected,),) = LocalGenerator(lively, processor).generate([question], max_new_tokens=12, **settings)
    assert "".join(pieces) == reply.text == expected and len(pieces) > 1
    assert reply.prompt_tokens == LocalGenerator(lively, processor).encode([_record(question)])["input_ids"].shape[1]
    assert reply.completion_tokens <= 12 and (reply.finish_reason == "length") == (reply.completion_tokens == 12)


@pytest.mark.parametrize("spaces", [False, True])
def test_a_character_of_several_tokens_and_spaces_that_go(processor, spaces):
    """Five bytes tokens of two characters; a tokenizer that removes spaces before punctuation; an end token's text is not shown."""
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.clean_up_tokenization_spaces = spaces
    ids = tokenizer("caf\u00e9 is n't \u732b . So", add_special_tokens=False)["input_ids"]
    end = tokenizer("Z", add_special_tokens=False)["input_ids"][0]
    pieces = []
    streamer = _Streamer(tokenizer, [end], pieces.append)
    for token in ([1, 2, 3], *ids, end):
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True) and "\ufffd" not in "".join(pieces)


def test_a_stream_is_of_one_response(internvl, processor):
    for records, n in (([_record(QUESTIONS[0])] * 2, 1), ([_record(QUESTIONS[0])], 2)):
        with pytest.raises(ValueError, match=f"n={n}"):
            LocalGenerator(internvl, processor).respond(records, n=n, on_text=print)


def test_images_that_cannot_be_opened_are_named(tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_text("no image")
    with pytest.raises(ValueError, match=r"missing\.png"):
        open_image(tmp_path / "missing.png")
    with pytest.raises(ValueError, match=r"broken\.png"):
        open_image(broken)


def test_no_questions_give_no_responses(internvl, processor):
    assert LocalGenerator(internvl, processor).generate([], n=4) == []


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
    inputs = LocalGenerator(internvl, with_bos).encode(list(map(_record, questions)))
    records = [{"prompt": [{"role": "user", "content": one.text}], "images": list(one.images)} for one in questions]
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

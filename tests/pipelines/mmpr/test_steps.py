"""Sampling with prompts, adaptively and from several models; going on from half of a response without the image."""

import pytest
from support import make_image

from mpo.generation.generator import GenerationError, Response
from mpo.io import read_json_lines
from mpo.pipelines.job import Job
from mpo.pipelines.mmpr.continuation import Continue, joined, start_of
from mpo.pipelines.mmpr.sample import PROMPTS, Sample
from mpo.pipelines.mmpr.verify import Verify
from mpo.pipelines.step import Dropped


class Told:
    """A generator whose responses are what a function says about a request, its sample and the seed."""

    def __init__(self, say, name="told"):
        self.say, self.name, self.asked = say, name, []

    def identity(self):
        return {"model": self.name}

    async def stream(self, requests, *, n=1, seed=0, concurrency=None, **settings):
        number = 0
        async for request, samples in requests:
            self.asked.append(request)
            for sample in samples:
                said = self.say(request, sample, seed)
                yield number, sample, said if isinstance(said, GenerationError) else Response(said, "stop", 10, 10)
            number += 1


def asked(step, **record):
    (request,) = step.requests({"id": "q", "messages": [{"role": "user", "content": "How many?"}], **record})
    turns = {turn["role"]: "".join(part.get("text") or "<image>" for part in turn["content"]) for turn in request.messages}
    return turns.get("system"), turns["user"]


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts(name):
    prompt, step = PROMPTS[name], Sample(Told(None), prompt=name)
    system, text = asked(step, images=[make_image(0)], choices=["one", "two"])
    assert text.startswith("<image>How many?\nA. one\nB. two") and system == prompt.system
    assert "A. " not in asked(step)[1] and "{" not in text.replace("\\boxed{RESULT}", "")
    assert {"line": "Final answer: " in text or "答案：" in text, "boxed": "\\boxed{" in f"{system}{text}", "any": True}[
        prompt.format
    ]
    inside = asked(step, messages=[{"role": "user", "content": "one or two?"}], choices=["one", "two"])[1]
    assert inside.startswith("one or two?") and "A. one" not in inside


def test_a_short_answer_is_not_asked_for_beside_reasoning():
    turn = {"role": "user", "content": "How many?\nAnswer the question using a single word or phrase."}
    assert "single word" not in asked(Sample(Told(None)), messages=[turn])[1]
    assert "single word" in asked(Sample(Told(None), prompt="plain"), messages=[turn])[1]
    turn["content"] = "Answer the question using a single word or phrase."
    assert "single word" in asked(Sample(Told(None)), messages=[turn])[1]


def test_a_template_of_the_users(tmp_path):
    (tmp_path / "own.jinja").write_text("Look: {{ question }}{% if choices %} Of:\n{{ choices }}{% endif %} ({{ source }})")
    step = Sample(Told(None), prompt=str(tmp_path / "own.jinja"))
    assert asked(step, source="vqa", choices=["one"])[1] == "Look: How many? Of:\nA. one (vqa)"
    assert "Look" in step.settings()["prompt"]  # not the path: another text is another job


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"prompt": "en_v3"}, "'en_v2'"),
        ({"prompt": "{{ choices }}"}, "question"),
        ({"prompt": "{{ question }} {{ pixels }}"}, "pixels"),
        ({"prompt": "{{ question"}, "render"),
        ({"until": (0, 1)}, r"until=\(0, 1\)"),
        ({"n": 4, "temperature": 0}, "temperature=0"),
    ],
)
def test_refused_settings(settings, name):
    with pytest.raises(ValueError, match=name):
        Sample(Told(None), **settings)


QUESTIONS = [
    {"id": f"q{at}", "messages": [{"role": "user", "content": f"{at}?"}], "ground_truths": [str(at)], "images": []}
    for at in range(3)
]


def numbers(request, sample, seed):
    """0 is always right, 1 right from seed + sample 4 on, 2 never."""
    at = int(request.messages[0]["content"][0]["text"][0])
    right = at == 0 or (at == 1 and seed + sample >= 4)
    return f"So it is as I see in {seed + sample}\nso\nFinal answer: {at if right else 9}"


def test_sampling_stops_where_there_is_right_and_wrong(tmp_path):
    first, second = Told(numbers, "first"), Told(numbers, "second")
    steps = [Sample(first, n=2), Sample(second, n=2)]
    for seed in (2, 4):
        steps += [Verify(), Sample(first, n=2, seed=seed, until=(1, 1)), Sample(second, n=2, seed=seed, until=(1, 1))]
    report = Job(steps, QUESTIONS, tmp_path / "job").run(progress=False)
    pools = [one["responses"] for one in read_json_lines(tmp_path / "job" / "output.jsonl")]
    assert [len(pool) for pool in pools] == [12, 12, 12] and len(first.asked) == 9
    assert [one["seed"] + one["sample"] for one in pools[0] if one["model"] == "second"] == [0, 1, 2, 3, 4, 5]
    assert report["steps"][2]["accuracy"] == 1 / 3
    again = Told(numbers, "first")
    more = [*steps, Verify(), Sample(again, n=2, seed=6, until=(1, 1))]
    Job(more, QUESTIONS, tmp_path / "more").run(progress=False)
    assert len(again.asked) == 2  # not the one that has both


def test_one_pool_has_one_prompt_and_one_turn():
    one = Sample(Told(numbers))(QUESTIONS[:1])
    with pytest.raises(ValueError, match="another prompt"):
        Sample(Told(numbers), prompt="zh").requests(one[0])
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    with pytest.raises(ValueError, match="several turns"):
        Sample(Told(numbers)).requests({"id": "q", "messages": turns})


# Dropout-NTP


@pytest.mark.parametrize(
    ("text", "ratio", "start"),
    [
        ("one two three four", 0.5, "one two"),
        ("one  two\n\nthree four", 0.75, "one  two\n\nthree"),
        ("one two three", 0.5, "one"),
        ("one two three", 0, ""),
        ("word", 0.5, ""),
        ("图中有三辆红色的车", 0.25, "图中"),
        ("有3辆 BMW 车。", 0.5, "有3辆"),
        ("มีรถสีแดง", 0.5, "มีรถ"),  # marks stay with their consonants
        ("👩‍👩‍👧 a b c", 0.25, "👩‍👩‍👧"),
    ],
)
def test_starts(text, ratio, start):
    found = start_of(text, ratio)
    assert found == start and text.startswith(found) and found == found.rstrip()


@pytest.mark.parametrize(
    ("text", "start", "continuation", "exact", "whole"),
    [
        ("a red car", "a red", " cat", True, "a red cat"),
        ("a red car", "a red", "  cat", True, "a red cat"),
        ("a red car", "a red", "cat", False, "a red cat"),
        ("a red car", "a red", "dish cat", True, "a reddish cat"),  # a model in this process has its own white space
        ("a red car", "a red", ", cat", False, "a red, cat"),
        ("a red\n\ncar", "a red", "cat", False, "a red\n\ncat"),
        ("a red car", "a red", "\n\ncat", False, "a red\n\ncat"),
        ("红色的车", "红色", "的猫", False, "红色的猫"),
        ("a red car", "", " cat", False, "cat"),
    ],
)
def test_seams(text, start, continuation, exact, whole):
    assert joined(text, start, continuation, exact=exact) == whole


def told(text="one two three four", **record):
    response = {"text": text, "finish_reason": "stop", "model": "told", "sample": 0, "seed": 0}
    question = {"question": "<image>\nWhat is <image>\nit?", "system": "Be kind."}
    return {"id": "q", "images": [make_image(0), make_image(1)], "asked": question, "responses": [response], **record}


@pytest.mark.parametrize("with_image", [False, True])
def test_the_same_start_goes_on_without_the_image(with_image):
    generator = Told(lambda request, sample, seed: " five six")
    (pair,) = Continue(generator, ratio=0.5, with_image=with_image, seed=5)([told()])
    (request,) = generator.asked
    assert (request.prefix, len(request.images)) == ("one two", 2 * with_image)
    assert [turn["role"] for turn in request.messages] == ["system", "user"]
    kinds = [part["type"] for part in request.messages[1]["content"]]
    assert kinds.count("image") == 2 * with_image and "<image>" not in str(request.messages)
    assert (pair["chosen"], pair["rejected"]) == ("one two three four", "one two five six")
    assert pair["rejected_meta"]["negative"] == f"sr0.5_{'with' if with_image else 'wo'}_image"
    assert pair["rejected_meta"]["seed"] == 5 and "answer_gt" not in pair


def test_ratio_0_has_no_prefix():
    generator = Told(lambda request, sample, seed: "five six")
    (pair,) = Continue(generator, ratio=0)([told()])
    assert generator.asked[0].prefix is None and pair["rejected"] == "five six"


@pytest.mark.parametrize(
    ("said", "record", "reason"),
    [
        (" three four", {}, "equals the original"),
        (" ", {}, "ends at once"),
        (None, {"text": "word"}, "too short"),
        (None, {"text": " "}, "too short"),
        (None, {"responses": [{"text": "one two", "finish_reason": "length"}]}, "truncated"),
    ],
)
def test_what_makes_no_pair(said, record, reason):
    step = Continue(Told(None))
    with pytest.raises(Dropped, match=reason):
        step.requests(told(**record))
        step.finish(told(**record), [[Response(said, "stop", 1, 1)]])


def test_what_cannot_be_gone_on_with():
    with pytest.raises(ValueError, match="no image"):
        Continue(Told(None)).requests(told(images=[]))
    with pytest.raises(ValueError, match="it has 2"):
        Continue(Told(None)).requests(told(responses=[{}, {}]))
    for settings in ({"ratio": 1}, {"ratio": -0.5}, {"n": 2}):
        with pytest.raises(ValueError, match="{}={}".format(*next(iter(settings.items())))):
            Continue(Told(None), **settings)

"""The findings of `validate`, and that there are no others."""

import json
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from support import TEXTS, make_image

from mpo.curation.examine import NOTES, PROBLEMS
from mpo.curation.validate import validate
from mpo.data import load_preferences
from mpo.data.encoded import with_encoded_images
from mpo.data.formats import ASPECTS
from mpo.models.small import small_processor

GOOD = {"image": "a.png", "question": "What is it?", "chosen": "A cat.", "rejected": "A dog."}
TEXT = {key: value for key, value in GOOD.items() if key != "image"}


@pytest.fixture(scope="module")
def processor():
    """Tiles of 32 pixels, 4 tokens each."""
    return small_processor(TEXTS, image_size=32, patch_size=8, max_patches=4)


@pytest.fixture
def check(tmp_path, monkeypatch):
    """Validate lines; return the report and the findings in the file."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("abc"):
        make_image(seed).save(tmp_path / f"{name}.png")

    def check(*lines, **settings):
        write(tmp_path / "pairs.jsonl", *lines)
        report = validate(tmp_path / "pairs.jsonl", output=tmp_path / "bad.jsonl", **settings)
        found = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
        assert Counter(one["finding"] for one in found) == report.counts
        assert all(one["problem"] == (one["finding"] in PROBLEMS) for one in found)
        return report, [(one["finding"], int(one["where"].rsplit(":", 1)[1])) for one in found]

    return check


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_nothing_is_wrong(check):
    report, found = check(GOOD, {**GOOD, "image": "b.png"}, "", TEXT)
    assert report.may_start and found == [] and (report.pairs, report.lines) == (3, 3)
    assert "nothing found\nTraining may start." in report.text()


def test_lines_that_are_no_pairs(check):
    """Each bad line has its kind of finding; the good records between them have none."""
    report, found = check(
        GOOD,
        '{"question": ',
        "[1]",
        {"question": "?", "chosen": "a"},
        {**GOOD, "chosen": ""},
        {**GOOD, "rejected": GOOD["chosen"]},
        {**GOOD, "image": "none.png"},
        {**GOOD, "image": "../a.png"},
        {**GOOD, "question": "<image><image>?"},
        {**GOOD, "question": "What is this?"},
        {"a": 1},
    )
    assert found == [
        ("no pair", 2),
        ("no pair", 3),
        ("no pair", 4),
        ("empty text", 5),
        ("equal completions", 6),
        ("image not there", 7),
        ("image not there", 8),
        ("placeholders and images", 9),
        ("no pair", 11),
    ]
    assert not report.may_start and report.pairs == 2 and report.lines == 11
    assert re.search(r"! no pair +4 ", report.text()) and "pairs.jsonl:2" in report.text()
    assert "Training may not start: 9 problems" in report.text()


def test_a_folder_in_an_images_place(check, tmp_path):
    (tmp_path / "folder").mkdir()
    assert check(GOOD, {**GOOD, "image": "folder"})[1] == [("image not there", 2)]


def test_ratings_that_give_no_pair_are_noted(check):
    def rated(count, rating):
        completions = [
            {"response": f"It is number {place}.", "annotations": dict.fromkeys(ASPECTS, rating(place))} for place in range(count)
        ]
        return {"prompt": "What is it?", "completions": completions}

    report, found = check(rated(3, lambda place: 1), rated(8, lambda place: place), rated(4, lambda place: place))
    assert found == [("gives no pair", 1), ("pairs left out", 2)]
    assert report.may_start and report.pairs == 12


def test_images_are_decoded_to_their_end(check, tmp_path):
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "short.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no image")
    Image.new("RGB", (3, 50)).save(tmp_path / "thin.png")
    _, found = check(*({**GOOD, "question": name, "image": f"{name}.png"} for name in ("short", "a", "text", "thin", "short")))
    assert found == [
        ("image not decoded", 1),
        ("image not decoded", 3),
        ("tiny image", 4),
        ("image not decoded", 5),
        ("duplicate", 5),
    ]


def test_completions_to_inspect(check):
    report, found = check(
        {**TEXT, "chosen": "I'm sorry, but I cannot see it."},
        {**TEXT, "rejected": r"It is \boxed{5"},
        {**TEXT, "chosen": "As an AI, I think of the"},
    )
    assert found == [("refusal", 1), ("unfinished", 2), ("refusal", 3), ("unfinished", 3)]
    assert report.may_start and all(kind in NOTES for kind in report.counts)


def test_duplicates(check):
    """Line 3 repeats line 1. Line 2 has another image; line 4 has the completions swapped."""
    report, found = check(GOOD, {**GOOD, "image": "b.png"}, GOOD, {**GOOD, "chosen": "A dog.", "rejected": "A cat."})
    assert found == [("duplicate", 3)] and report.may_start
    assert report.examples["duplicate"].reason.endswith("pairs.jsonl:1")


def test_the_same_image_in_another_file_is_a_duplicate(check, tmp_path):
    (tmp_path / "copy.png").write_bytes((tmp_path / "a.png").read_bytes())
    assert check(GOOD, {**GOOD, "image": "copy.png"})[1] == [("duplicate", 2)]


def test_leakage(check, tmp_path):
    """The evaluation file has a.png with its question, and the text question. Line 2 has a.png with another question."""
    evaluation = write(tmp_path / "eval.jsonl", {**GOOD, "chosen": "Another."}, {**TEXT, "question": "Why?"})
    report, found = check(
        GOOD,
        {**GOOD, "question": "What colour?"},
        {**GOOD, "image": "b.png"},
        {**TEXT, "question": "Why?", "chosen": "So."},
        evaluation=evaluation,
    )
    assert found == [("in eval too", 1), ("in eval too", 4), ("image in eval too", 2)]
    assert not report.may_start
    assert check({**GOOD, "image": "b.png"}, evaluation=evaluation)[0].may_start


def test_leakage_compares_the_user_turns(check, tmp_path):
    """The same question with other white space, and after a system message; line 3 has the same words in a completion."""
    evaluation = write(tmp_path / "eval.jsonl", {**TEXT, "question": "What  is it? "}, {**TEXT, "question": "Why?"})
    chat = {"chosen": "So.", "rejected": "No."}
    _, found = check(
        TEXT,
        {**chat, "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]},
        {**TEXT, "question": "Hm?", "chosen": "Why?"},
        evaluation=evaluation,
    )
    assert found == [("in eval too", 1), ("in eval too", 2)]


def test_pairs_with_another_system_message_are_no_duplicates(check):
    line = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
    assert check(line, {**line, "system": "Be brief."}, line)[1] == [("duplicate", 3)]


def test_what_is_wrong_with_the_evaluation(tmp_path):
    """Bad lines of the evaluation file are problems, and so is a file without pairs; they are listed under its name."""
    path, output = write(tmp_path / "pairs.jsonl", TEXT), tmp_path / "bad.jsonl"
    evaluation = write(tmp_path / "eval.jsonl", {**TEXT, "question": "Why?"}, '{"question": ', {**TEXT, "chosen": ""})
    report = validate(path, evaluation=evaluation, output=output)
    assert not report.may_start and report.pairs == report.lines == 1
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [one["where"] for one in found] == [f"{evaluation}:2", f"{evaluation}:3"] and all(one["problem"] for one in found)
    report = validate(path, evaluation=write(tmp_path / "empty.jsonl"), output=output)
    assert not report.may_start and f"{tmp_path}/empty.jsonl: the evaluation file has no pairs" in report.text()


def test_completions_that_differ_only_in_white_space(check):
    report, found = check({**TEXT, "chosen": "The  same.", "rejected": "The same.\n"}, TEXT)
    assert found == [("equal but for space", 1)] and report.may_start


def test_images_beside_files_of_a_pattern(tmp_path):
    """They are found as in training: in the folder of the pattern's fixed part."""
    (tmp_path / "shards" / "one").mkdir(parents=True)
    make_image(0).save(tmp_path / "shards" / "a.png")
    write(tmp_path / "shards" / "one" / "pairs.jsonl", GOOD)
    pattern = f"{tmp_path}/shards/*/pairs.jsonl"
    assert len(load_preferences(pattern)) == 1
    assert validate(pattern, output=tmp_path / "bad.jsonl").may_start


def test_a_mixture_of_mixtures(tmp_path, processor):
    """Every pair of every source is checked once: of a meta.json, a JSON and a YAML mixture, with the tiles of each.

    An image of 64 x 32 has at most 4 tiles of 32 x 32, here 2 and a thumbnail, 4 tokens each; with tiles: {max: 1} it has one. So
    a limit between the two is too small only for the source without its own tiles.
    """
    make_image(0).save(tmp_path / "a.png")
    for name in ("meta", "json", "yaml"):
        write(tmp_path / f"{name}.jsonl", GOOD)
    meta = {"of meta": {"root": "", "annotation": "meta.jsonl", "max_dynamic_patch": 1}}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    inner = {"sources": [{"path": "json.jsonl"}, {"path": "meta.json", "name": "meta"}]}
    (tmp_path / "inner.json").write_text(json.dumps(inner))
    mixture = tmp_path / "mixture.yaml"
    output = tmp_path / "bad.jsonl"

    def check(tiles):
        outer = {"sources": [{"path": "inner.json", "tiles": tiles}, {"path": "yaml.jsonl", "tiles": {"max": 1}}]}
        mixture.write_text(json.dumps(outer))
        assert len(load_preferences(mixture)) == 3
        report = validate(mixture, processor=processor, max_length=short + 4, context=8192, output=output)
        assert report.pairs == 3
        found = [json.loads(line) for line in output.read_text().splitlines()]
        return [one["where"] for one in found if one["finding"] != "duplicate"]

    short, long = (measure(tmp_path, processor, {"max": most}) for most in (1, 4))
    assert long - short == 8
    assert check({"max": 1}) == []
    assert check(None) == [f"{tmp_path}/json.jsonl:1"]


def measure(folder, processor, tiles):
    """Tokens of the prompt and the longer completion of the single pair."""
    from mpo.encoding.costs import RecordMeasure

    cost = RecordMeasure(processor, "end_of_turn", "prompt", "raise")(
        with_encoded_images(load_preferences(folder / "json.jsonl", tiles=tiles))[0]
    )
    return cost["prompt"] + max(cost["chosen"], cost["rejected"])


def test_lengths(check, processor):
    """200 times " not" is more than 150 tokens: a completion is truncated, a question cannot be."""
    limits = {"processor": processor, "context": 8192}
    assert check(GOOD, {**TEXT, "question": "?"}, **limits)[1] == []
    words = " ".join(["not"] * 200)
    long = {**TEXT, "question": "Hm?", "rejected": f"It is {words}."}
    assert check(GOOD, long, processor=processor, context=150)[1] == [("too long", 2)]
    assert check(GOOD, long, processor=processor, max_length=150, context=150)[1] == [("truncated by max_length", 2)]
    report, found = check(GOOD, {**TEXT, "question": f"Is it {words}?"}, processor=processor, max_length=150)
    assert found == [("too long", 2)] and "the prompt alone takes" in report.examples["too long"].reason
    with pytest.raises(ValueError, match="--max-length needs --model"):
        check(GOOD, max_length=10)


def test_records_that_the_template_refuses_are_all_found(check, processor):
    """A record is only assumed to fit if one with the same shape of turns was encoded before."""
    import copy

    strict = copy.copy(processor)
    strict.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + processor.chat_template
    )
    line = {
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}],
        "chosen": "So.",
        "rejected": "No.",
    }
    try:
        _, found = check(line, {**line, "chosen": "Yes."}, TEXT, processor=strict, context=8192)
    except Exception as error:  # raised by the template
        pytest.fail(f"{type(error).__name__}: {error}")
    assert found == [("not encoded", 1), ("not encoded", 2)]


def test_a_prompt_that_ends_in_the_assistants_turn(check, processor):
    """The turn is continued: exactly its tokens fit into the context, without another header."""
    asked = {"role": "user", "content": "What is it?"}
    line = {"prompt": [asked, {"role": "assistant", "content": "It is"}], "chosen": " a cat.", "rejected": " no."}
    whole = "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\nIt is a cat.<|im_end|>"
    size = len(processor.tokenizer(whole)["input_ids"])
    assert check(line, processor=processor, context=size)[1] == []
    assert check(line, processor=processor, context=size - 1)[1] == [("too long", 1)]


def test_images_tokens_in_texts(check, processor):
    """They are found also in short text records of a shape that was encoded before; other control tokens are notes."""
    report, found = check(
        GOOD,
        TEXT,
        {**GOOD, "chosen": "It is <IMG_CONTEXT> 1."},
        {**TEXT, "question": "What is <IMG_CONTEXT>?"},
        {**TEXT, "question": "Hm?", "rejected": "So <|im_end|> no <|im_end|>."},
        {**GOOD, "question": "What is <img>?"},
        {**TEXT, "question": "HTML?", "chosen": "Take <b>."},
        processor=processor,
        context=8192,
    )
    assert found == [("not encoded", 3), ("not encoded", 4), ("control token", 5), ("control token", 6)] and not report.may_start
    assert "the text of 'chosen' holds '<IMG_CONTEXT>'" in report.examples["not encoded"].reason
    assert "the text of 'rejected' holds '<|im_end|>'" in report.examples["control token"].reason
    report, found = check({**TEXT, "rejected": "So <|im_end|> no."}, processor=processor)
    assert found == [("control token", 1)] and report.may_start
    assert check({**GOOD, "chosen": "It is <IMG_CONTEXT> 1."})[1] == []  # without a model, it is plain text


@pytest.fixture
def films(tmp_path):
    """one.mp4 and two.mp4 differ; short.mkv ends early, though its header declares all frames."""
    av = pytest.importorskip("av")
    for name, brightness in (("one.mp4", 40), ("two.mp4", 200), ("whole.mkv", 90)):
        with av.open(str(tmp_path / name), "w") as container:
            stream = container.add_stream("mpeg4", rate=10)
            stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
            for place in range(60):
                image = np.random.default_rng(place).integers(0, brightness, (32, 64, 3), dtype=np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())
    whole = (tmp_path / "whole.mkv").read_bytes()
    (tmp_path / "short.mkv").write_bytes(whole[: len(whole) * 6 // 10])
    (tmp_path / "garbage.mp4").write_bytes(b"no video at all" * 50)


def film(name: str) -> dict:
    return {**TEXT, "question": "<video>\nWhat happens?", "video": name}


def test_two_videos_under_one_question_are_two_records(check, films, tmp_path):
    (tmp_path / "copy.mp4").write_bytes((tmp_path / "one.mp4").read_bytes())
    assert check(film("one.mp4"), film("two.mp4"), film("copy.mp4"))[1] == [("duplicate", 3)]
    evaluation = write(tmp_path / "eval.jsonl", {**film("one.mp4"), "chosen": "Another."})
    asked = {**film("one.mp4"), "question": "<video>\nWhy?"}
    report, found = check(film("two.mp4"), asked, film("copy.mp4"), evaluation=evaluation)
    assert found == [("in eval too", 3), ("image in eval too", 2)]
    assert check(film("two.mp4"), evaluation=evaluation)[0].may_start


@pytest.mark.parametrize("with_model", [False, True])
def test_videos_are_decoded_to_their_last_frame(check, films, processor, with_model):
    limits = {"processor": processor, "context": 8192} if with_model else {}
    report, found = check(film("one.mp4"), film("short.mkv"), film("garbage.mp4"), **limits)
    assert found == [("video not decoded", 2), ("video not decoded", 3)] and not report.may_start
    assert "short.mkv" in report.examples["video not decoded"].reason


def test_frames_of_a_video_count(check, films, processor):
    """60 frames, of which 8 to 32 are used, one tile of 4 tokens each: one frame is much shorter than eight."""
    limits = {"processor": processor, "context": 8192, "max_length": 60}
    assert check(film("one.mp4"), **limits, frames={"min": None, "max": 1})[1] == []
    report, found = check(film("one.mp4"), **limits, frames={"min": 20, "max": None})
    assert found == [("too long", 1)]
    with pytest.raises(ValueError, match="1 <= min <= max"):
        check(film("one.mp4"), **limits, frames={"min": 3, "max": 2})


def test_many_processes_find_what_one_finds(check, tmp_path):
    """300 lines, every seventh bad, every eleventh unfinished; in 16 shards and in one."""
    lines = []
    for index in range(300):
        line = {**GOOD, "question": f"What is {index % 297}?", "image": f"{'abc'[index % 3]}.png"}
        if index % 7 == 0:
            line["chosen"] = ""
        elif index % 11 == 0:
            line["chosen"] = "It is the"
        lines.append(line)
    one, found = check(*lines)
    many, same = check(*lines, workers=2)
    assert found == same and (one.pairs, one.lines) == (many.pairs, many.lines) == (257, 300)
    assert one.counts["empty text"] == 43 and one.counts["duplicate"] == 2


def test_a_source_without_pairs(check, tmp_path):
    report, _ = check("")
    assert not report.may_start and "there are no pairs" in report.text()
    with pytest.raises(ValueError, match="There is no file"):
        validate(tmp_path / "none.jsonl", output=tmp_path / "bad.jsonl")


def test_a_damaged_file_is_a_problem(check, tmp_path):
    path = tmp_path / "pairs.json"
    path.write_text('[{"question": "Why?", "chosen": "So.", "rejected": "No."}, {"question": ')
    report = validate(path, output=tmp_path / "bad.jsonl")
    assert report.counts == {"file damaged": 1} and report.pairs == 1 and not report.may_start

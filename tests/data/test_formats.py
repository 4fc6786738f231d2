"""A published line of every format becomes the right record; the format is detected from the line alone."""

import json

import pytest

from mpo.data.formats import FORMATS, detect
from mpo.data.paths import Folders, inside
from mpo.data.records import KINDS, to_records
from mpo.io import BadRecord

ASKED = "What is it?"


def shown(messages):
    """Render messages as text, with images as placeholders."""
    return [(message["role"], "".join(part["text"] or f"<{part['type']}>" for part in message["content"])) for message in messages]


def only(line, folder, format=None):
    (row,) = to_records(line, where="pairs.jsonl:3", find=Folders(folder), format=format, source="pairs")
    assert set(row) == set(KINDS["pair"].features)
    return row


def paths(row, folder):
    return [image["path"].removeprefix(f"{folder}/") for image in row["images"]]


# MMPR


def test_mmpr_with_a_ground_truth(images):
    """As MMPR v1.2's correctness pairs: one image with its placeholder."""
    line = {
        "image": "sub/c.png",
        "question": "<image>\nWhat is it?\nAnswer the question.",
        "chosen": "It is a cat.\n\nFinal answer: cat",
        "rejected": "It is a dog.\n\nFinal answer: dog",
        "answer_gt": "cat",
        "chosen_meta": {"score": 1.0},
        "rejected_meta": {"score": 0.0},
    }
    row = only(line, images)
    assert paths(row, images) == ["sub/c.png"]
    assert shown(row["prompt"]) == [("user", "<image>What is it?\nAnswer the question.")]
    assert shown(row["chosen"]) == [("assistant", line["chosen"])]
    assert (row["ground_truth"], row["id"], row["source"]) == ("cat", "pairs.jsonl:3", "pairs")
    assert json.loads(row["metadata"]) == {"chosen_meta": {"score": 1.0}, "rejected_meta": {"score": 0.0}}


def test_mmpr_with_several_images_or_none(images):
    line = {
        "image": ["a.png", "b.png"],
        "question": "Image-1: <image>\nImage-2: <image>\nSame?",
        "chosen": "No.",
        "rejected": "Yes.",
    }
    row = only(line, images)
    assert paths(row, images) == ["a.png", "b.png"]
    assert shown(row["prompt"]) == [("user", "Image-1: <image>Image-2: <image>Same?")]
    assert shown(only({**line, "question": "Same?"}, images)["prompt"]) == [("user", "<image><image>Same?")]
    for none in (None, "", []):
        row = only({**line, "image": none, "question": "Why?"}, images)
        assert (row["images"], shown(row["prompt"])) == ([], [("user", "Why?")])


def test_mmpr_with_a_video(images):
    line = {"video": "clip.mp4", "question": "<video>\nWhat happens?", "chosen": "It rains.", "rejected": "It snows."}
    row = only(line, images)
    assert row["videos"] == [f"{images}/clip.mp4"]
    assert shown(row["prompt"]) == [("user", "<video>What happens?")]
    assert shown(only({**line, "question": "What?"}, images)["prompt"]) == [("user", "<video>What?")]
    both = only({**line, "image": "a.png", "question": "What?"}, images)
    assert shown(both["prompt"]) == [("user", "<image><video>What?")]


# TRL

PLAIN = {"prompt": ASKED, "chosen": "A cat.", "rejected": "A dog."}
CHAT = {
    "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": ASKED}],
    "chosen": [{"role": "assistant", "content": "A cat."}],
    "rejected": [{"role": "assistant", "content": "A dog."}],
}


def test_trl_explicit(images):
    assert shown(only(PLAIN, images)["prompt"]) == [("user", ASKED)]
    row = only({**CHAT, "images": ["a.png"]}, images)
    assert shown(row["prompt"]) == [("system", "Be brief."), ("user", f"<image>{ASKED}")]
    parts = [{"type": "text", "text": "Is "}, {"type": "image"}, {"type": "text", "text": " a <image>?"}]
    row = only({**CHAT, "prompt": [{"role": "user", "content": parts}], "images": [{"bytes": None, "path": "a.png"}]}, images)
    assert shown(row["prompt"]) == [("user", "Is <image> a <image>?")]
    assert [part["type"] for part in row["prompt"][0]["content"]] == ["text", "image", "text"]


def test_trl_implicit(images):
    """Messages are split without settings; text only if the format is given, since any two texts may begin alike."""
    whole = {side: CHAT["prompt"] + CHAT[side] for side in ("chosen", "rejected")}
    row = only(whole, images)
    assert [shown(row[side]) for side in ("prompt", "chosen")] == [
        [("system", "Be brief."), ("user", ASKED)],
        [("assistant", "A cat.")],
    ]
    text = {"chosen": "The sky is blue.", "rejected": "The sky is green."}
    row = only(text, images, format="trl")
    assert [shown(row[side])[0][1] for side in ("prompt", "chosen", "rejected")] == ["The sky is", " blue.", " green."]
    with pytest.raises(BadRecord, match="any known format"):
        only(text, images)
    with pytest.raises(BadRecord, match="without 'prompt'"):
        only({"chosen": "A", "rejected": [1]}, images, format="trl")


def test_turns_before_the_last(images):
    """Placeholders may be in any user message; without placeholders, images are put in front of the first one."""
    turns = [
        {"role": "user", "content": "One."},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "<image> two"},
    ]
    line = {**CHAT, "prompt": turns, "images": ["a.png"]}
    assert shown(only(line, images)["prompt"])[2] == ("user", "<image> two")
    turns[2]["content"] = "Two."
    assert shown(only(line, images)["prompt"])[0] == ("user", "<image>One.")


def test_placeholders_in_text_parts(images):
    """They are split as in text: `Look: <image>`; but if image parts already place all images, text is left unchanged."""
    parts = [{"type": "text", "text": "A <image> B <image>\nC"}]
    line = {**CHAT, "prompt": [{"role": "user", "content": parts}], "images": ["a.png", "b.png"]}
    row = only(line, images)
    assert [part["text"] for part in row["prompt"][0]["content"]] == ["A ", None, " B ", None, "C"]
    parts.insert(0, {"type": "image"})
    parts[1]["text"] = "and <image>"
    assert [part["text"] for part in only(line, images)["prompt"][0]["content"]] == [None, "and ", None]
    row = only({**line, "images": ["a.png"]}, images)
    assert [part["text"] for part in row["prompt"][0]["content"]] == [None, "and <image>"]


def test_what_a_tool_shows(images):
    turns = [{"from": "human", "value": "Look."}, {"from": "gpt", "value": "I do."}, {"from": "observation", "value": "<image>"}]
    line = {"conversations": turns, "chosen": {"from": "gpt", "value": "Yes."}, "rejected": {"from": "gpt", "value": "No."}}
    row = only({**line, "images": ["a.png"]}, images)
    assert shown(row["prompt"]) == [("user", "Look."), ("assistant", "I do."), ("tool", "<image>")]
    assert row["prompt"][2]["content"] == [{"type": "image", "text": None}]


def test_a_placeholder_elsewhere_is_text_if_all_images_have_theirs(images):
    line = {**CHAT, "prompt": [{"role": "system", "content": "<image> is an image."}, {"role": "user", "content": "<image>?"}]}
    row = only({**line, "images": ["a.png"], "chosen": "An <image>."}, images)
    assert shown(row["prompt"]) == [("system", "<image> is an image."), ("user", "<image>?")]
    assert [part["type"] for message in row["prompt"] for part in message["content"]] == ["text", "image", "text"]
    assert row["chosen"][0]["content"] == [{"type": "text", "text": "An <image>."}]


@pytest.mark.parametrize("format", ["mmpr", "trl", "rlaif_v", "rlhf_v", "vlfeedback", "sharegpt", "swift"])
def test_a_system_field_is_the_systems_turn(format, images):
    from data.malformed import GOOD

    for row in to_records({**GOOD[format], "system": "Be brief."}, where="a:1", find=Folders(images)):
        assert shown(row["prompt"]) == [("system", "Be brief."), ("user", f"<image>{ASKED}")]
        assert "system" not in json.loads(row["metadata"] or "{}")


def test_the_same_system_message_twice_is_one(images):
    assert shown(only({**CHAT, "system": "Be brief."}, images)["prompt"]) == [("system", "Be brief."), ("user", ASKED)]


@pytest.mark.parametrize("before", [[], [{"role": "system", "content": "Be brief."}]])
def test_trl_prompt_of_text_beside_whole_conversations(before, images):
    """As in UltraFeedback, where `messages` repeats the chosen conversation. TRL itself extracts the same prompt."""
    from trl.data_utils import maybe_extract_prompt

    asked = [*before, {"role": "user", "content": ASKED}]
    line = {"prompt": f"{ASKED}\n", "prompt_id": "p", "score_chosen": 8.0}
    line |= {
        side: [*asked, {"role": "assistant", "content": text}] for side, text in (("chosen", "A cat."), ("rejected", "A dog."))
    }
    row = only({**line, "messages": line["chosen"]}, images)
    assert shown(row["prompt"]) == shown_by_trl(maybe_extract_prompt(line)["prompt"])
    assert [shown(row[side]) for side in ("chosen", "rejected")] == [[("assistant", "A cat.")], [("assistant", "A dog.")]]
    assert row["prompt_id"] == "p"
    with pytest.raises(BadRecord, match="'chosen' begins with .*(system|user)"):
        only({**line, "prompt": "Another question?"}, images)


def shown_by_trl(messages):
    return [(message["role"], message["content"]) for message in messages]


def test_a_record_read_again_is_the_same(images):
    """A record of `load_preferences` is in TRL's format, and loses nothing when it is read again."""
    line = {
        **PLAIN,
        "images": ["a.png"],
        "margin": 0.5,
        "ground_truth": "cat",
        "tiles": {"max": 6},
        "augment": True,
        "metadata": {"a": [1]},
    }
    row = only({**line, "source": "ours", "prompt_id": "p"}, images)
    assert (row["source"], row["prompt_id"], row["tiles"]) == ("ours", "p", {"min": None, "max": 6, "thumbnail": None})
    assert only(row, images) == row


def test_ground_truth_under_its_other_name(images):
    """The field `answer` of another file is the ground truth, unless the line has a `ground_truth`."""
    row = only({**PLAIN, "answer": "cat"}, images)
    assert (row["ground_truth"], row["metadata"]) == ("cat", None)
    row = only({**PLAIN, "answer": "A cat.", "ground_truth": "cat"}, images)
    assert (row["ground_truth"], row["metadata"]) == ("cat", '{"answer": "A cat."}')


# RLAIF-V and RLHF-V


def test_rlaif_v(images):
    """As its Parquet files: the image's bytes, and a path that only names it."""
    data = (images / "a.png").read_bytes()
    line = {
        "ds_name": "RLAIF-V",
        "image": {"bytes": data, "path": "../llava/a.png"},
        "question": ASKED,
        "chosen": "A cat.",
        "rejected": "A dog.",
        "origin_dataset": "VQAv2",
        "origin_split": '{"model": "omnilmm", "type": "question_answering"}',
        "idx": "12",
        "image_path": "../llava/a.png",
    }
    row = only(line, images)
    assert row["images"] == [{"bytes": data, "path": "a.png"}]
    assert shown(row["prompt"]) == [("user", f"<image>{ASKED}")]
    assert row["id"] == "12"
    assert json.loads(row["metadata"])["origin_dataset"] == "VQAv2"
    assert paths(only({**line, "image": None, "image_path": "a.png"}, images), images) == ["a.png"]


@pytest.mark.parametrize("released", ["jsonl", "parquet"])
def test_rlhf_v(images, released):
    """As its first release, JSONL with base64 in origin_split, and its later ones, Parquet with bytes."""
    line = {
        "jsonl": {
            "dataset_name": "RLHF-V",
            "image": "a.png",
            "origin_split": "eyJtb2RlbCI6ICJNdWZmaW4ifQ==",
            "origin_split_inner_idx": 3,
        },
        "parquet": {"ds_name": "RLHF-V", "image": {"bytes": (images / "a.png").read_bytes(), "path": None}, "idx": 3},
    }[released]
    text = json.dumps({"question": ASKED, "chosen": "A cat.", "rejected": "A dog."})
    row = only({**line, "text": text, "origin_dataset": "coco", "image_path": "a.png"}, images)
    assert (row["id"], len(row["images"])) == ("3", 1)
    assert [shown(row[side])[0][1] for side in ("prompt", "chosen", "rejected")] == [f"<image>{ASKED}", "A cat.", "A dog."]


@pytest.mark.parametrize("text", ["a caption", "{", '{"caption": "a cat"}', None, 5])
@pytest.mark.parametrize("asked", ["question", "prompt"])
def test_a_text_column_alone_is_not_rlhf_v(images, asked, text):
    line = {"image": "a.png", asked: ASKED, "chosen": "A cat.", "rejected": "A dog.", "text": text}
    row = only(line, images)
    assert shown(row["prompt"]) == [("user", f"<image>{ASKED}")]
    assert json.loads(row["metadata"] or "{}").get("text") == text
    with pytest.raises(BadRecord, match="rlhf_v's"):
        only({"image": "a.png", "text": "a caption"}, images)


# VLFeedback


def rated(response, *ratings):
    aspects = ("Helpfulness", "Ethical Considerations", "Visual Faithfulness")
    given = {aspect: {"Rating": str(rating), "Rationale": "Because."} for aspect, rating in zip(aspects, ratings, strict=True)}
    return {"annotations": given, "model": f"model-{response}", "response": response}


COMPLETIONS = [rated("A", 3, 5, 4), rated("B", 5, 5, 5), rated("C", 3, 5, 4), rated("D", 1, 5, 3)]


@pytest.mark.parametrize("layout", ["list of objects", "object of lists"])
def test_vlfeedback(images, layout):
    """Means 4, 5, 4 and 3: B before A, C and D, A and C before D, A and C tie. Four completions give five pairs."""
    completions = COMPLETIONS
    if layout == "object of lists":  # as datasets holds a sequence of objects
        completions = {name: [one[name] for one in COMPLETIONS] for name in COMPLETIONS[0]}
    line = {"id": "svit-1", "prompt": ASKED, "models": ["a"] * 4, "completions": completions, "img_path": "a.png"}
    rows = to_records(line, where="pairs.jsonl:3", find=Folders(images))
    found = [(shown(row["chosen"])[0][1], shown(row["rejected"])[0][1], row["margin"]) for row in rows]
    assert found == [("B", "D", 2.0), ("B", "A", 1.0), ("A", "D", 1.0), ("B", "C", 1.0), ("C", "D", 1.0)]
    assert len({row["prompt_id"] for row in rows}) == 1
    assert [row["id"] for row in rows] == ["svit-1/1-3", "svit-1/1-0", "svit-1/0-3", "svit-1/1-2", "svit-1/2-3"]
    assert json.loads(rows[0]["metadata"]) == {
        "chosen_model": "model-B",
        "rejected_model": "model-D",
        "chosen_rating": 5.0,
        "rejected_rating": 3.0,
    }


def test_vlfeedback_makes_no_pair_of_equals(images):
    """Equal ratings or equal texts give no pair and no bad record."""
    line = {"prompt": ASKED, "img_path": "a.png", "completions": [COMPLETIONS[0], COMPLETIONS[2], rated("A", 1, 1, 1)]}
    rows = to_records(line, where="pairs.jsonl:3", find=Folders(images))
    assert [(shown(row["chosen"])[0][1], shown(row["rejected"])[0][1]) for row in rows] == [("C", "A")]
    assert to_records({**line, "completions": line["completions"][:2]}, where="x:1", find=Folders(images)) == []
    many = [rated(str(number), number, 1, 1) for number in range(8)]
    rows = to_records({**line, "completions": many}, where="x:1", find=Folders(images))
    assert [round(row["margin"] * 3) for row in rows] == [7, 6, 6, 5, 5, 5]
    assert [row["id"] for row in rows] == [f"x:1#{number}" for number in range(1, 7)]
    assert rows.dropped == 28 - 6


# LLaMA-Factory and ms-swift


def test_sharegpt_ranking(images):
    line = {
        "conversations": [
            {"from": "human", "value": "<image>What is it?"},
            {"from": "gpt", "value": "An animal."},
            {"from": "human", "value": "Which?"},
        ],
        "chosen": {"from": "gpt", "value": "A cat."},
        "rejected": {"from": "gpt", "value": "A dog."},
        "images": ["a.png"],
        "system": "Be brief.",
    }
    row = only(line, images)
    assert shown(row["prompt"]) == [
        ("system", "Be brief."),
        ("user", "<image>What is it?"),
        ("assistant", "An animal."),
        ("user", "Which?"),
    ]
    assert (shown(row["chosen"]), shown(row["rejected"])) == ([("assistant", "A cat.")], [("assistant", "A dog.")])
    said = only({**line, "chosen": "A cat.", "rejected": "A dog."}, images)  # as some of its data sets have it
    assert said["chosen"] == row["chosen"]
    openai = {
        **{name: line[name] for name in ("images",)},
        "messages": [{"role": "user", "content": "<image>What is it?"}],
        "chosen": {"role": "assistant", "content": "A cat."},
        "rejected": {"role": "assistant", "content": "A dog."},
    }
    assert shown(only(openai, images)["prompt"]) == [("user", "<image>What is it?")]


def test_swift(images):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<image>What is it?"},
        {"role": "assistant", "content": "A cat."},
    ]
    line = {"messages": messages, "rejected_response": "A dog.", "images": [f"{images}/a.png"], "margin": 2}
    row = only(line, images)
    assert shown(row["prompt"]) == [("system", "Be brief."), ("user", "<image>What is it?")]
    assert (shown(row["chosen"]), shown(row["rejected"])) == ([("assistant", "A cat.")], [("assistant", "A dog.")])
    assert (paths(row, images), row["margin"]) == (["a.png"], 2.0)
    other = {
        **line,
        "rejected_messages": [*messages[:2], {"role": "assistant", "content": "A dog."}],
        "rejected_images": line["images"],
    }
    del other["rejected_response"]
    assert only(other, images) == row


# What all have in common


def test_detection_and_its_override(images):
    from data.malformed import GOOD

    assert {name: detect(line).NAME for name, line in GOOD.items()} == {name: name for name in FORMATS}
    both = {**PLAIN, "question": "Why?"}
    assert shown(only(both, images, format="mmpr")["prompt"]) == [("user", "Why?")]
    assert shown(only(both, images, format="trl")["prompt"]) == [("user", ASKED)]
    with pytest.raises(BadRecord, match="pairs.jsonl:3: the prompt is missing"):
        only(PLAIN, images, format="mmpr")


def test_the_prompts_id_is_of_prompt_and_images(images, tmp_path):
    """It is the same for two pairs of a prompt, wherever the images are; it differs for other words or other images."""
    line = {"image": "a.png", "question": ASKED, "chosen": "A cat.", "rejected": "A dog."}
    first = only(line, images)["prompt_id"]
    assert only({**line, "rejected": "A cow."}, images)["prompt_id"] == first
    assert only({**line, "question": f"<image>\n{ASKED}"}, images)["prompt_id"] == first
    moved = tmp_path / "moved"
    images.rename(moved)
    assert only(line, moved)["prompt_id"] == first
    others = [
        {**line, "image": "b.png"},
        {**line, "question": "What?"},
        {**line, "image": ["a.png", "b.png"]},
        {**line, "image": None},
    ]
    assert len({first, *(only(other, moved)["prompt_id"] for other in others)}) == 5
    assert first == "8ecb2a1a67443107504920f0"  # on any machine, in any process


def test_links_inside_are_followed(images):
    """A link leads to its file, and tells nothing about the files next to it."""
    (images / "sub" / "a.png").symlink_to(images / "b.png")
    find = Folders(images)
    assert find("sub/a.png") == f"{images}/b.png"
    assert find("sub/c.png") == f"{images}/sub/c.png"
    assert find("sub/a.png") == f"{images}/b.png"
    with pytest.raises(ValueError, match="there is no image 'sub/b.png'"):
        find("sub/b.png")


def test_a_relative_root_is_that_of_the_current_folder(tmp_path, monkeypatch):
    found = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").touch()
        monkeypatch.chdir(tmp_path / name)
        found.append(Folders("."))
        assert inside(".", "a.png") == found[-1]("a.png") == f"{tmp_path}/{name}/a.png"
    (tmp_path / "two" / "a.png").unlink()
    assert found[0]("a.png") == f"{tmp_path}/one/a.png"
    with pytest.raises(ValueError, match="no image"):
        found[1]("a.png")


def test_a_folder_is_listed_after_many_look_ups(images):
    """The results stay the same when a folder's files are known from its listing."""
    from mpo.data.paths import LIST_AFTER

    find = Folders(images)
    for _ in range(LIST_AFTER + 5):
        assert find("a.png") == f"{images}/a.png"
    assert find("link.png") == f"{images}/a.png"
    for path, reason in (("link_out.png", "lies outside"), ("sub", "is a folder"), ("d.png", "no image")):
        with pytest.raises(ValueError, match=reason):
            find(path)


@pytest.mark.parametrize("other", [{"prompt": "Which animal is shown?"}, {"prompt": [{"role": "user", "content": "Which?"}]}])
@pytest.mark.parametrize("of", [{}, {"ds_name": "a data set"}])
def test_two_prompts_are_not_guessed_at(images, other, of):
    """With a question and a prompt, only a given format tells which of them is meant."""
    line = {"question": "A title", "chosen": "A cat.", "rejected": "A dog.", "image": "a.png", **other, **of}
    with pytest.raises(BadRecord, match="both 'question' and 'prompt'.*set format="):
        to_records(line, where="a:1", find=Folders(images))
    assert shown(only(line, images, "mmpr")["prompt"])[0][-1].endswith("A title")
    empty = {**line, "prompt": None}
    assert shown(only(empty, images)["prompt"])[0][-1].endswith("A title")

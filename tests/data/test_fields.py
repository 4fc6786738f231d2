"""No field is filed away that may be part of a prompt, no key wins over another, and every kind of file has one outcome."""

import base64
import gzip
import itertools
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data.malformed import GOOD
from data.test_formats import PLAIN, shown
from datasets import Dataset

from mpo.curation.validate import validate
from mpo.data import load_preferences
from mpo.data.files import open_files
from mpo.data.formats import FORMATS
from mpo.data.load import mix
from mpo.data.mixture_file import read_mixture
from mpo.data.paths import Folders
from mpo.data.records import Reading, to_prompt, to_records
from mpo.io import BadRecord, parse_json, read_json_lines, read_json_object

ASKED = "What is it?"
TURNS = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]


def without_image(format):
    """The good line of a format without its image."""
    line = json.loads(json.dumps(GOOD[format]).replace("<image>", ""))
    return {name: value for name, value in line.items() if name not in ("image", "images", "img_path")}


def read(line, folder, format=None, metadata=()):
    return to_records(line, where="pairs.jsonl:3", find=Folders(folder), format=format, metadata=metadata)


def outcome(path, format=None):
    """The records of a file, or the first refusal, without converting them to Arrow."""
    lines = (line for shard in open_files(path) for line in shard.lines())
    return [row for rows in Reading(str(path.parent), format, skip=False).rows(lines) for row in rows]


# Fields that a format does not use

AN_IMAGE = {
    "image_path": "a.png",
    "image_id": "000123.jpg",
    "img": 391895,
    "image_file": "sub/c.PNG",
    "image_paths": ["a.png", "b.png"],
    "thing": "photos/1.webp",
    "page": "https://example.org/scan.jpeg?size=2",
    "blob": {"bytes": "iVBORw0KGgo=", "path": None},
    "pixels": {"path": "a", "bytes": None},
    "inline": "data:image/png;base64,iVBORw0KGgo=",
    "encoded": "iVBORw0KGgo" + "A" * 200,
    "extra": {"view": {"file": "a.png"}},
    "in_text": '{"view": "a.png"}',
    "film": "clip.mp4",
    "sound": "voice.wav",
    "old_film": "clip.3gp",
    "pages": ["report.pdf"],
    "scan": "scans/1.dcm ",
    "array": "depth.npy\t",
    "bmp": base64.b64encode(b"BM\x36\x10\0\0\0\0" + b"\1" * 99).decode(),
    "tiff": base64.urlsafe_b64encode(b"II*\0" + b"\xff\xfe" * 99).decode(),
    "jpeg": base64.urlsafe_b64encode(b"\xff\xd8\xff\xe0" + b"\xfb\xff" * 99).decode(),
    "byte_values": list(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"),
    "html": "<IMG width=3 src='a'>",
    "markdown": "![x](a)",
    "binary": b"\0" * 65,
    "PhotoFile": 5,
    "\uff49\uff4d\uff47": 5,
}
A_PROMPT = {
    "history": [["Hi.", "Hello."]],
    "turns": TURNS,
    "turn": {"from": "human", "value": "Hi."},
    "dialog": json.dumps(TURNS),
    "chat": str(TURNS),
    "input": "12",
    "context": "Paris",
    "original_question": "Why?",
    "passage": "It was late.",
    "hint": "Answer using a single word or phrase.",
    "extra": {"note": "Look at the upper left corner first."},
    "suffix": "请用一个词回答这个问题。",
    "steps": ["First, look at the chart.", "Then add both."],
    "options": ["cat", "dog"],
    "choices": {"A": "cat", "B": "dog"},
    "answer_choices": '["cat", "dog"]',
    "hints": ["Count."],
    "prompt_suffix": "Briefly.",
    "few_shot": [{"q": "1+1?", "a": "2"}],
    "dialogue": ["Hi", "Hello"],
    "sys": "Brief",
    "sys_msg": "Brief",
    "optionA": "cat",
    "choice_2": "cat",
    "B": "cat",
    "feedback_prompt": "Short",
}
METADATA = {
    "source": "vqa-v2",
    "idx": 17,
    "model": "InternVL2-8B",
    "rejected_meta": {"score": 0.0, "kind": "wrong answer"},
    "score": 0.25,
    "is_hard": True,
    "category": "visual question answering",
    "subset": ["charts", "maps"],
    "url": "https://en.wikipedia.org/wiki/Cat",
    "license": "CC BY 4.0",
    "created": "2024-11-15T10:20:30Z",
    "digest": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "origin_split": '{"model": "omnilmm", "type": "question_answering"}',
    "question_type": "yes/no",
    "input_tokens": 300,
    "nothing": None,
    "empty": "",
    "image_type": "none",
    "no_image": True,
    "image_count": 0,
    **dict.fromkeys(
        (
            "justification",
            "chosen_rationale",
            "critique",
            "rejected_feedback",
            "judgement",
            "verdict",
            "licence",
            "authors",
            "citation",
        ),
        "The first one counts the cats. The second one does not.",
    ),
    **dict.fromkeys(("title", "citation", "dataset_name", "version", "timestamp"), "A data set of cats, dogs, and all others."),
    "keywords": ["cats", "all kinds of small dogs in large parks"],
    "gt_answer": "There are two cats on the mat.",
    "solution": "Count the cats. There are two.",
    "reference_response": "There are two cats.",
    "steps_with_score": [{"step": "First, count the cats.", "score": 1}],
    "correct_choice": "B",
    "token_ids": [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
    "epoch": 3,
    "is_padding": True,
    "bad": "yes",
}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", AN_IMAGE)
def test_an_image_in_an_unused_field(format, name, images):
    """It is refused with its name, in a line without images."""
    if format in ("rlhf_v", "rlaif_v") and name == "image_path":
        pytest.skip("the format has this field")
    line = {**without_image(format), name: AN_IMAGE[name]}
    if format == "rlhf_v":
        line["image"] = None
    with pytest.raises(BadRecord, match=rf"pairs.jsonl:3: .*'{name}.*metadata") as refused:
        read(line, images, format)
    assert refused.value.kind == "unused field"
    assert all("a.png" not in str(row["images"]) for row in read(line, images, format, metadata=[name]))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", A_PROMPT)
def test_a_part_of_the_prompt_in_an_unused_field(format, name, images):
    line = {**GOOD[format], name: A_PROMPT[name]}
    with pytest.raises(BadRecord, match=rf"'{name}.*metadata"):
        read(line, images, format)
    for row in read(line, images, format, metadata=[name]):
        assert json.loads(row["metadata"])[name] == A_PROMPT[name]


@pytest.mark.parametrize("format", FORMATS)
def test_metadata_stays_metadata(format, images):
    """Numbers, flags, ids, labels, provenance: no record is refused for them, with images or without."""
    own = {name: value for name, value in METADATA.items() if name not in GOOD[format]}
    for line in (GOOD[format], {**without_image(format), **({"image": None} if format == "rlhf_v" else {})}):
        rows = read({**line, **own}, images, format)
        assert rows
        for row in rows:
            found = json.loads(row["metadata"])
            expected = {name: value for name, value in own.items() if value is not None and name != "source"}
            assert {name: found[name] for name in expected} == expected
        assert {name for name in rows.unused if name in own} == set(expected) | (
            {"source"} - set(GOOD["trl"]) if format != "trl" else set()
        )


def test_identifiers_that_are_bytes(images):
    for value in (bytes(range(16)), bytes(range(100, 164))):
        assert read({**GOOD["mmpr"], "sha": value}, images)[0]["metadata"]
    for value in (b"\x89PNG", bytes(65)):
        with pytest.raises(BadRecord, match="'sha'"):
            read({**GOOD["mmpr"], "sha": value}, images)


def test_names_of_images_that_the_record_uses(images):
    """Beside an image, its own name and addresses tell where it comes from; another file's name is an image that is not used."""
    line = GOOD["mmpr"]
    there = ("rgb/a.png", "depth/a.png", "a.jpg", "b.png")
    for path in there:
        (images / path).parent.mkdir(exist_ok=True)
        (images / path).write_bytes((images / "a.png").read_bytes())
    (images / "same.png").symlink_to(images / "a.png")
    for same in (
        {"image_path": "elsewhere/a.png"},
        {"image_path": str(images / "a.png")},
        {"view": "./rgb/../a.png"},
        {"view": "same.png"},
        {"file_name": "COCO_0001.jpg"},
        {"fileName": "1.png"},
        {"image_id": 391895},
        {"url": "https://x.org/7.jpg"},
    ):
        assert len(read({**line, **same}, images)) == 1, same
    for other in (
        *({name: path} for name in ("depth", "image_path") for path in there),
        {"image2": "c.png"},
        {"second_image": "elsewhere/a.jpg"},
        {"mask": "a_mask.png"},
        {"thumb": b"\x89PNG"},
        {"audio": "speech/a.wav"},
        {"audio": "https://x.org/a.mp3"},
        {"video_file": "a.mp4"},
        {"file_name": "a.mp4"},
    ):
        with pytest.raises(BadRecord, match=f"'{next(iter(other))}'"):
            read({**line, **other}, images)
    inline = {**line, "image": {"bytes": (images / "a.png").read_bytes(), "path": None}}
    for name, value in (("image_path", "train/7.jpg"), ("file_name", "7.jpg"), ("url", "https://x.org/7.jpg")):
        assert len(read({**inline, name: value}, images)) == 1
    for name, value in (("mask", "7.png"), ("depth", "a.png"), ("audio", "a.wav")):
        with pytest.raises(BadRecord, match=f"'{name}'"):
            read({**inline, name: value}, images)


def test_what_repeats_the_record_is_metadata(images):
    """As in UltraFeedback, where `messages` is the chosen conversation again."""
    trl = {"prompt": "Tell me what this is.", "chosen": "It is a small cat.", "rejected": "It is a big dog."}
    whole = [{"role": "user", "content": trl["prompt"]}, {"role": "assistant", "content": trl["chosen"]}]
    (row,) = read({**trl, "messages": whole, "instruction": trl["prompt"], "best": trl["chosen"]}, images)
    assert set(json.loads(row["metadata"])) == {"messages", "instruction", "best"}
    with pytest.raises(BadRecord, match="'messages'"):
        read({**trl, "messages": [*TURNS, *whole]}, images)


@pytest.mark.parametrize("format", FORMATS)
def test_a_system_prompt_is_the_systems_turn(format, images):
    for row in read({**GOOD[format], "system_prompt": "Be brief."}, images):
        assert shown(row["prompt"])[0] == ("system", "Be brief.")
        assert "system_prompt" not in json.loads(row["metadata"] or "{}")
    assert read({**GOOD[format], "system": "", "system_prompt": "Be brief."}, images)[0]["prompt"] == row["prompt"]
    with pytest.raises(BadRecord, match="both 'system' and 'system_prompt'"):
        read({**GOOD[format], "system": "Be long.", "system_prompt": "Be brief."}, images)


@pytest.mark.parametrize(
    "line",
    [
        {"conversations": [{"from": "human", "value": "Hi.", "image": "b.png"}], "chosen": "A", "rejected": "B"},
        {"prompt": [{"role": "user", "content": "Hi.", "images": ["b.png"]}], "chosen": "A", "rejected": "B"},
        {
            "prompt": [{"role": "user", "content": [{"type": "text", "text": "?", "image": "b.png"}]}],
            "chosen": "A",
            "rejected": "B",
        },
        {
            "prompt": [{"role": "user", "content": [{"type": "image", "image_url": {"url": "b.png"}}]}],
            "chosen": "A",
            "rejected": "B",
        },
        {**PLAIN, "chosen": [{"role": "assistant", "content": "A", "reasoning_content": "I think so."}]},
        {"image": "a.png", "text": {"question": "?", "chosen": "A", "rejected": "B", "context": "Paris"}},
        {**GOOD["vlfeedback"], "completions": [{**one, "image": "b.png"} for one in GOOD["vlfeedback"]["completions"]]},
    ],
)
def test_fields_inside_of_turns_and_parts(line, images):
    with pytest.raises(
        BadRecord, match=r"'\w+\.(image|images|image_url.url|reasoning_content|context|chosen_image)'|'chosen_image'"
    ) as refused:
        read(line, images)
    name = re.search(r"metadata=\['(.*?)'\]", str(refused.value))[1]
    other = name.replace("chosen_", "rejected_")
    if name != "prompt.image_url":  # a part refuses it by itself
        assert read(line, images, metadata=[name, other])


def test_labels_inside_of_turns_are_kept(images):
    """All of them, and the image of a first turn is not hidden by a label of the last."""
    turns = [{**TURNS[0], "loss": False}, {**TURNS[1], "weight": 0.5}, {**TURNS[0], "loss": True}]
    (row,) = read({"prompt": turns, "chosen": "A", "rejected": "B"}, images)
    assert json.loads(row["metadata"]) == {"prompt.loss": [False, True], "prompt.weight": [0.5]}
    for first in ({"view": "b.png"}, {"content": [{"type": "image", "text": "Look at this."}]}):
        with pytest.raises(BadRecord, match="'prompt.(view|text)'"):
            last = {**TURNS[0], "view": "a"}
            read({"image": "a.png", "prompt": [{**turns[0], **first}, last], "chosen": "A", "rejected": "B"}, images)


@pytest.mark.parametrize("format", FORMATS)
def test_a_records_own_settings(format, images):
    """In every format; `frames` that are no limits are not taken for them."""
    own = {"tiles": {"min": 1, "max": 2, "thumbnail": None}, "frames": {"min": 2, "max": 3}, "augment": True}
    for row in read({**GOOD[format], **own}, images):
        assert {name: row[name] for name in own} == own and not json.loads(row["metadata"] or "{}").keys() & own.keys()
    for name, wrong in (("tiles", 5), ("augment", "yes"), ("frames", {"most": 2})):
        with pytest.raises(BadRecord, match=f"'{name}'|frames"):
            read({**GOOD[format], name: wrong}, images)
    assert json.loads(read({**GOOD[format], "frames": 5}, images)[0]["metadata"])["frames"] == 5


@pytest.mark.parametrize("empty", [None, "", []])
@pytest.mark.parametrize("format", FORMATS)
def test_fields_of_other_formats_that_hold_nothing(format, empty, images):
    """They do not change which format a pair has, and are no second prompt."""
    others = {
        name: empty for name in ("question", "prompt", "conversations", "messages", "completions", "rejected_messages", "ds_name")
    }
    others |= {"rejected_response": empty, "objects": {"ref": [], "bbox": []}, "tools": empty, "audios": empty, "image_path": empty}
    expected = read(GOOD[format], images)
    for one in (others, *({name: value} for name, value in others.items())):
        found = read({**one, **GOOD[format]}, images)
        strip = [{**row, "metadata": None} for row in found], [{**row, "metadata": None} for row in expected]
        assert strip[0] == strip[1], one


def test_a_field_and_the_same_in_metadata(images):
    """Neither wins: both are refused unless they agree."""
    trl = {"prompt": "?", "chosen": "A", "rejected": "B", "metadata": {"idx": 1}}
    assert json.loads(read({**trl, "idx": 1}, images)[0]["metadata"]) == {"idx": 1}
    with pytest.raises(BadRecord, match="'idx' has two values, 1 and 2"):
        read({**trl, "idx": 2}, images)


def test_prompts_to_generate_for(images):
    for name in ("image_path", "history", "context"):
        with pytest.raises(BadRecord, match=f"'{name}'"):
            to_prompt({"question": ASKED, name: {**AN_IMAGE, **A_PROMPT}[name]}, where="a:1", image_root=images)
    assert to_prompt({"question": ASKED, "context": "Paris"}, where="a:1", image_root=images, metadata=["context"])
    line = {**GOOD["mmpr"], "answer": "It is a cat on a mat.", "id": 3}
    assert to_prompt(line, where="a:1", image_root=images)["id"] == "3"


def test_the_user_says_what_is_metadata(images, tmp_path):
    """As an argument, for a source of a mixture, and not as a text, whose letters would be names."""
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({**GOOD["trl"], "images": [], "note": "Checked by two people, who agreed."}))
    with pytest.raises(BadRecord, match="'note'"):
        load_preferences(path)
    assert "Checked" in load_preferences(path, metadata=["note"])[0]["metadata"]
    assert "Checked" in next(iter(load_preferences(path, metadata=["note"], streaming=True)))["metadata"]
    assert len(mix([{"path": str(path), "metadata": ["note"]}]).train) == 1
    for wrong in ("note", [5], {"note": 1}):
        with pytest.raises(ValueError, match="metadata"):
            load_preferences(path, metadata=wrong)


def test_validate_lists_the_fields_that_are_not_used(tmp_path):
    """Each once, with the number of its lines; and what is refused, by its name too."""
    lines = [{**PLAIN, "idx": place, **({"note": "Look at this."} if place == 2 else {"kind": "x"})} for place in range(3)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = validate(tmp_path / "pairs.jsonl", output=tmp_path / "bad.jsonl")
    assert report.unused == {"idx": 2, "kind": 2} and report.counts["unused field"] == 1
    assert report.refused == {"note": 1}
    assert "idx (2), kind (2)" in report.text() and "refused: note (1)" in report.text()
    report = validate(tmp_path / "pairs.jsonl", output=tmp_path / "bad.jsonl", metadata=["note"])
    assert report.unused == {"idx": 3, "kind": 2, "note": 1} and report.may_start


def test_images_of_a_tar_that_its_line_does_not_name(images):
    from data.test_files import tar

    data = (images / "a.png").read_bytes()
    tar(images / "pairs.tar", [("1.json", json.dumps({**PLAIN, "images": ["1.png"]}).encode()), ("1.png", data), ("1.b.png", data)])
    with pytest.raises(BadRecord, match="pairs.tar:1: .*'1.b.png'"):
        outcome(images / "pairs.tar")


# Settings


def test_names_of_a_nested_mixture(tmp_path):
    """A name that is given for a mixture is a prefix of its sources' names; without one these stay as they are."""
    (tmp_path / "a.jsonl").write_text(json.dumps(PLAIN))
    (tmp_path / "inner.yaml").write_text("sources: [{path: a.jsonl, name: one}]")
    for own, name in (("name: all", "all/one"), ("cap: 1", "one"), ("source: s", "s/one")):
        (tmp_path / "outer.yaml").write_text(f"sources: [{{path: inner.yaml, {own}}}]")
        assert load_preferences(tmp_path / "outer.yaml")["source"] == [name]
    assert load_preferences(tmp_path / "inner.yaml", source="mine")["source"] == ["mine/one"]


def test_tiles_of_more_than_the_maximum(tmp_path, images):
    (tmp_path / "a.jsonl").write_text(json.dumps(PLAIN))
    wrong = {"min": 5, "max": 2}
    with pytest.raises(BadRecord, match="min 5, max 2"):
        read({**PLAIN, "tiles": wrong}, images)
    with pytest.raises(ValueError, match="min 5, max 2"):
        load_preferences(tmp_path / "a.jsonl", tiles=wrong)
    with pytest.raises(ValueError, match="'a'.*min 5, max 2"):
        mix([{"path": str(tmp_path / "a.jsonl"), "tiles": wrong}])


# Duplicate keys

TWICE = {
    "mmpr": '{"question": "Q", "chosen": "good", "rejected": "bad", "chosen": "worse"}',
    "rlaif_v": '{"ds_name": "a", "question": "Q", "chosen": "good", "rejected": "bad", "chosen": "worse"}',
    "rlhf_v": json.dumps({"image": "a.png", "text": '{"question": "Q", "chosen": "A", "rejected": "B", "chosen": "worse"}'}),
    "vlfeedback": json.dumps(GOOD["vlfeedback"]).replace('"response": "A cat."', '"response": "A cat.", "response": "A cow."'),
    "sharegpt": json.dumps(GOOD["sharegpt"]).replace('"from": "human"', '"from": "human", "from": "gpt"'),
    "swift": json.dumps(GOOD["swift"]).replace('"rejected_response"', '"rejected_response": "x", "rejected_response"'),
    "trl": json.dumps(GOOD["trl"]).replace('"margin"', '"margin": 2, "margin"'),
    "rlaif_v origin": json.dumps({**GOOD["rlaif_v"], "image": "a.png", "origin_split": '{"a": 1, "a": 2}'}),
    "trl note": json.dumps({**GOOD["trl"], "note": [{"in": '{"a": {"b": 1, "b": 2}}'}]}),
    "trl metadata": json.dumps({**GOOD["trl"], "metadata": '{"a": 1, "a": 2}'}),
}


@pytest.mark.parametrize("case", TWICE)
@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "json", "tar"])
def test_duplicate_keys_of_lines(case, ending, images):
    path, text = images / f"pairs.{ending}", TWICE[case]
    if ending == "tar":
        from data.test_files import tar

        line = {name: value for name, value in json.loads(text).items() if name in ("image", "images", "img_path")}
        pictures = [("1.png", (images / "a.png").read_bytes())] if line else []
        tar(path, [("1.json", text.replace("a.png", "1.png").encode()), *pictures])
    else:
        data = (f"[\n{text}\n]" if ending == "json" else f"\n{text}\n").encode()
        path.write_bytes(gzip.compress(data) if ending.endswith("gz") else data)
    with pytest.raises(BadRecord, match=rf"pairs.{ending}:{'1' if ending == 'tar' else '2'}: .*is given twice"):
        outcome(path, case.split()[0])


def test_names_that_are_almost_those_of_used_fields(images, tmp_path):
    """Of another case, or with blanks: neither they nor the field itself win. In a meta.json, a key that is misspelt."""
    hidden = {
        "cho\u200bsen": "chosen",
        "\ufeffimage": "image",
        "\uff43\uff48\uff4f\uff53\uff45\uff4e": "chosen",
        "que\xadstion": "question",
    }
    for name, meant in {"Chosen": "chosen", " chosen": "chosen", "QUESTION": "question", "Image": "image", **hidden}.items():
        with pytest.raises(BadRecord, match=re.escape(f"{name!r} is not used. Did you mean {meant!r}")):
            read({**GOOD["mmpr"], name: 5}, images)
        assert len(read({**GOOD["mmpr"], name: 5}, images, metadata=[name])) == 1
    (tmp_path / "a.jsonl").write_text('{"question": "?", "chosen": "A", "rejected": "B"}')
    (tmp_path / "meta.json").write_text('{"one": {"root": "", "annotation": "a.jsonl", "repeat_tme": 5}}')
    with pytest.raises(ValueError, match="'repeat_tme'.*'repeat_time'"):
        load_preferences(tmp_path / "meta.json")


def test_duplicate_columns_and_keys_in_text(images):
    table = pa.Table.from_arrays([pa.array([text]) for text in "QABW"], names=["question", "chosen", "rejected", "chosen"])
    pq.write_table(table, images / "pairs.parquet")
    with pytest.raises(ValueError, match="pairs.parquet.*'chosen' twice"):
        outcome(images / "pairs.parquet")
    with pytest.raises(BadRecord, match="'a' is given twice"):
        read({**PLAIN, "more": '{"a": "1.png", "a": 2}'}, images)


def test_duplicate_keys_of_other_files(tmp_path):
    """MMPR's meta.json, in which a whole source would vanish; mixtures in JSON and YAML; JSON files of any use."""
    (tmp_path / "a.jsonl").write_text('{"question": "?", "chosen": "A", "rejected": "B"}\n')
    entry = '{"root": "", "annotation": "a.jsonl"}'
    meta = f'{{\n"one": {entry},\n"one": {entry}}}'
    for name in ("meta.json", "other_meta.json"):
        (tmp_path / name).write_text(meta)
        with pytest.raises(ValueError, match=f"{name}.*'one' is given twice"):
            load_preferences(tmp_path / name)
    texts = {
        "mix.json": '{"sources": [{"path": "a.jsonl", "cap": 1, "cap": 2}]}',
        "top.json": '{"sources": [{"path": "a.jsonl"}], "seed": 1, "seed": 2}',
        "mix.yaml": "sources:\n  - {path: a.jsonl, cap: 1, cap: 2}\n",
        "top.yaml": "sources:\n  - path: a.jsonl\nseed: 1\nseed: 2\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        for reading in (read_mixture, load_preferences):
            with pytest.raises(ValueError, match=rf"{name}.*'(cap|seed)' is given twice"):
                reading(tmp_path / name)
    (tmp_path / "merged.yaml").write_text("sources:\n  - &one {path: a.jsonl, cap: 1}\n  - {<<: *one, name: b}\n")
    assert len(read_mixture(tmp_path / "merged.yaml")["sources"]) == 2
    (tmp_path / "lines.jsonl").write_text('{}\n{"a": [{"b": 1, "b": 2}]}\n')
    with pytest.raises(BadRecord, match="lines.jsonl:2: .*'b' is given twice"):
        read_json_lines(tmp_path / "lines.jsonl")
    (tmp_path / "object.json").write_text('{\n"a": 1,\n"a": 1}')
    with pytest.raises(BadRecord, match="object.json: .*'a' is given twice.*line 3"):
        read_json_object(tmp_path / "object.json")
    with pytest.raises(BadRecord, match="'a' is given twice"):
        parse_json('{"a": 1, "a": 1}', "a text")


# ms-swift

USER, FIRST, TOOL, LAST = (
    {"role": role, "content": content} for role, content in (("user", "Q"), ("assistant", "a"), ("tool", "t"), ("assistant", "b"))
)


@pytest.mark.parametrize(
    ("messages", "prompt", "chosen"),
    [
        ([USER, LAST], ["Q"], ["b"]),
        ([USER, FIRST, LAST], ["Q"], ["a", "b"]),
        ([USER, FIRST, TOOL, LAST], ["Q"], ["a", "t", "b"]),
        ([USER, FIRST, USER, LAST], ["Q", "a", "Q"], ["b"]),
    ],
)
def test_swift_replaces_all_after_the_last_user(messages, prompt, chosen, images):
    rejected = [{"role": "assistant", "content": "r"}]
    start = len(prompt)
    for line in ({"rejected_response": "r"}, {"rejected_messages": messages[:start] + rejected}):
        (row,) = read({"messages": messages, **line}, images)
        assert [[text for _, text in shown(row[name])] for name in ("prompt", "chosen", "rejected")] == [prompt, chosen, ["r"]]


def test_swift_conversations_that_part_earlier(images):
    """A pair has one prompt, up to the last turn of the user."""
    other = [USER, LAST, USER, LAST]
    with pytest.raises(BadRecord, match="'rejected_messages' differ"):
        read({"messages": [USER, FIRST, USER, FIRST], "rejected_messages": other}, images)
    (row,) = read({"messages": [USER, FIRST, LAST], "rejected_messages": [USER, LAST, FIRST]}, images)
    assert [text for _, text in shown(row["rejected"])] == ["b", "a"]


# Messages as text

AS_TEXT = {
    "JSON": json.dumps(TURNS[1:]),
    "one": json.dumps(TURNS[1]),
    "Python": str(TURNS[1:]),
    "ShareGPT": json.dumps([{"from": "gpt", "value": "Hello."}]),
    "parts": json.dumps([{"type": "text", "text": "Hello."}]),
    "JSON in JSON": json.dumps(json.dumps(TURNS[1:])),
    "spaced": "\n [ " + json.dumps(TURNS[1], indent=1) + "]",
}


@pytest.mark.parametrize("text", AS_TEXT.values(), ids=AS_TEXT)
@pytest.mark.parametrize("format", FORMATS)
def test_messages_as_text_are_not_trained(format, text, images):
    from data.malformed import TEXTS, changed

    for path in TEXTS[format]:
        with pytest.raises(BadRecord, match="text of messages"):
            read(changed(GOOD[format], path, text), images, format)
    for inside in ({"role": "user", "content": text}, {"role": "user", "content": [{"type": "text", "text": text}]}):
        with pytest.raises(BadRecord, match="text of messages"):
            read({"prompt": [inside], "chosen": "A", "rejected": "B"}, images)


def test_json_that_is_an_answer(images):
    for text in (
        '{"answer": 5}',
        '[{"box": [1, 2]}]',
        '{"from": "Paris", "to": "Rome"}',
        '{"type": "cat"}',
        "[1, 2]",
        '{"role": "king"}',
    ):
        (row,) = read({"prompt": "?", "chosen": text, "rejected": "B"}, images)
        assert shown(row["chosen"])[0][1] == text


# One outcome for every kind of file, in every format

CN = "是猫。"
BROKEN = {  # what is written, and the reason of the refusal; None: the same record as from a plain file
    "a byte order mark": (lambda text: b"\xef\xbb\xbf" + text.encode(), None),
    "a mark in the middle": (lambda text: text.encode() + b"\n\xef\xbb\xbf" + text.encode(), None),
    "CRLF": (lambda text: text.replace("\n", "\r\n").encode() + b"\r\n\r\n", None),
    "CR": (lambda text: f"{text}\r{text}".encode(), "CR|carriage"),
    "UTF-16": (lambda text: text.encode("utf-16"), "UTF-16"),
    "UTF-16 without a mark": (lambda text: text.encode("utf-16-be"), "UTF-16"),
    "UTF-32": (lambda text: text.encode("utf-32"), "UTF-32|UTF-16"),
    "GBK": (lambda text: text.encode("gbk"), "not UTF-8"),
    "zero bytes": (lambda text: text.encode() + b"\n\0\0\0\0", "not JSON.*zero byte"),
    "a zero byte in a text": (lambda text: text.replace(CN, f"{CN}\0").encode(), "not JSON"),
    "JSON in JSON": (lambda text: json.dumps(text).encode(), "text instead of an object|a JSON str"),
}


def chinese(format):
    return json.loads(json.dumps(GOOD[format], ensure_ascii=False).replace("A cat.", CN))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "json"])
def test_outcomes_of_files(format, ending, images):
    """Every kind of file, in every format, gives the same record or a refusal that names the file and the line."""
    plain, path = images / "plain.jsonl", images / f"pairs.{ending}"
    line = json.dumps(chinese(format), ensure_ascii=False)
    plain.write_text(line, "utf-8")
    (expected,) = outcome(plain, format)
    for case, (write, reason) in BROKEN.items():
        if ending == "json" and case == "CR":  # white space
            write, reason = (lambda text: text.replace("{", "{\r", 1).encode()), None
        if ending == "json" and case in ("a mark in the middle", "zero bytes"):
            reason = "after the end of the array"
        data = write(f"[{line}]" if ending == "json" else line)
        path.write_bytes(gzip.compress(data) if ending.endswith("gz") else data)
        if reason is None:
            same = [{**row, "id": 0, "source": 0} for row in outcome(path, format)]
            assert same == [{**expected, "id": 0, "source": 0}] * len(same) != [], case
            continue
        with pytest.raises(BadRecord, match=rf"pairs.{ending}(:\d+)?: .*({reason})"):
            outcome(path, format)


VALUES = {"a number": 5, "zero": 0, "a list": ["A cat."], "null": None, "a boolean": False, "an object": {"a": 1}}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
def test_outcomes_of_values(format, ending, images):
    """A text that is no text is refused with the place and the name of its field, from JSON and from tables."""
    from data.malformed import TEXTS, changed

    path = images / f"pairs.{ending}"
    for (field, called), value in itertools.product(TEXTS[format].items(), VALUES.values()):
        line = changed(GOOD[format], field, value)
        if ending == "parquet":
            try:
                pq.write_table(pa.Table.from_pylist([line]), path)
            except (pa.ArrowException, TypeError):
                continue  # no table can hold it
        else:
            path.write_text(json.dumps(line) if ending == "jsonl" else json.dumps([line]))
        with pytest.raises(BadRecord, match=rf"pairs.{ending}:1: .*({called}|any known format|given)"):
            outcome(path, format)


@pytest.mark.parametrize("format", FORMATS)
def test_null_in_every_other_field(format, images):
    """Null is the same as absent, wherever the field is not needed; the types of Arrow add such nulls."""
    line = {
        **GOOD[format],
        "system": None,
        "system_prompt": None,
        "videos": None,
        "metadata": None,
        "anything": None,
        "tools": None,
    }
    assert read(line, images, format)[0]["metadata"] == read(GOOD[format], images, format)[0]["metadata"]


def test_tables_hold_the_same_fields(images):
    """An image column of Parquet that no format knows is refused as in JSON."""
    data = (images / "a.png").read_bytes()
    rows = [{"question": ASKED, "chosen": "A cat.", "rejected": "A dog.", "photo": {"bytes": data, "path": None}}]
    Dataset.from_list(rows).to_parquet(images / "pairs.parquet")
    with pytest.raises(BadRecord, match="pairs.parquet:1: .*'photo'"):
        load_preferences(images / "pairs.parquet")

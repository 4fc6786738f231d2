"""`mpo data`: output, files and exit status."""

import json
import re
import subprocess
import sys

import pytest
from support import TEXTS, make_image

from mpo.commands import main
from mpo.data import load_conversations, load_preferences
from mpo.models.small import small_internvl, small_processor

ACTIONS = ("validate", "stats", "show", "convert", "mix", "split", "dedupe")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """pairs.jsonl: 12 pairs; pairs 10 and 11 duplicate pairs 0 and 1."""
    monkeypatch.chdir(tmp_path)
    lines = []
    for index in range(10):
        make_image(index).save(tmp_path / f"{index}.png")
        completions = {"chosen": f"It is {index}.", "rejected": "It is another one."}
        lines.append({"id": f"pair-{index}", "image": f"{index}.png", "question": f"What is number {index}?", **completions})
    lines += [{**lines[0], "id": "again-0"}, {**lines[1], "id": "again-1"}]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny checkpoint whose context is 64 tokens."""
    path = tmp_path_factory.mktemp("model")
    processor = small_processor(TEXTS, image_size=32, patch_size=8, max_patches=4)
    sizes = {"hidden_size": 32, "layers": 1, "vision_hidden_size": 32, "vision_layers": 1}
    small_internvl(processor, **sizes, max_position_embeddings=64).save_pretrained(path)
    processor.save_pretrained(path)
    return str(path)


@pytest.fixture
def run(capsys):
    def run(*arguments) -> tuple[int, str]:
        status = main(["data", *map(str, arguments)])
        said = capsys.readouterr()
        return status, said.out + said.err

    return run


def test_validate(folder, run, model):
    status, said = run("validate", "pairs.jsonl", "--num-proc", 2)
    assert status == 0 and "12 pairs in 12 lines" in said
    found = [json.loads(line) for line in (folder / "bad_records.jsonl").read_text().splitlines()]
    assert [(one["finding"], one["where"]) for one in found] == [("duplicate", "pairs.jsonl:11"), ("duplicate", "pairs.jsonl:12")]

    (folder / "0.png").unlink()
    status, said = run("validate", "pairs.jsonl", "--output", "found.jsonl")
    assert status == 1 and re.search(r"\n  ! image .* 2  pairs.jsonl:1: ", said)
    assert "2 problems (!)" in said and "3 findings: found.jsonl" in said  # the third one is a duplicate


def test_validate_with_a_model(folder, run, model):
    (folder / "long.jsonl").write_text(json.dumps({"question": "Why?", "chosen": "So. " * 100, "rejected": "No."}))
    status, said = run("validate", "long.jsonl", "--model", model)
    assert status == 1 and "too long" in said and re.search(r"context .*\b64\b", said)
    assert run("validate", "long.jsonl", "--model", model, "--max-length", 60)[0] == 0
    assert run("validate", "pairs.jsonl", "--model", model)[0] == 0


def test_validate_against_evaluation(folder, run):
    (folder / "eval.jsonl").write_text((folder / "pairs.jsonl").read_text().split("\n")[3])
    status, said = run("validate", "pairs.jsonl", "--eval-path", "eval.jsonl")
    assert status == 1 and "eval" in said and "pairs.jsonl:4" in said


def test_stats(folder, run, model):
    status, said = run("stats", "pairs.jsonl", "--html", "out/stats.html")
    assert status == 0 and "12 pairs of 10 prompts" in said
    assert (folder / "out" / "stats.html").read_text().startswith("<!doctype html>")
    asked = (["--model", model], ["--model", model, "--max-tiles", 1])
    tiles = [re.search(r"\ntiles +(\d+) ", run("stats", "pairs.jsonl", *words)[1]).group(1) for words in asked]
    assert tiles == ["3", "1"]  # two of the image and a thumbnail


def test_show(folder, run, model):
    status, said = run("show", "pairs.jsonl", "--limit", 2)
    assert status == 0 and said.count("record 'pair-") == 2 and "record 'pair-0'" in said
    one, other = (run("show", "pairs.jsonl", "--shuffle", "--seed", seed)[1] for seed in (1, 1))
    assert one == other and "record 'pair-0'" not in one.split("\n")[0]
    assert "<IMG_CONTEXT> x" in run("show", "pairs.jsonl", "--id", "pair-3", "--model", model)[1]
    assert run("show", "pairs.jsonl", "--html", "look.html")[0] == 0 and "<img" in (folder / "look.html").read_text()
    status, said = run("show", "pairs.jsonl", "--id", "nobody")
    assert status == 2 and "'nobody'" in said and "'pair-0'" in said


def test_convert(folder, run):
    status, said = run("convert", "pairs.jsonl", "pairs.parquet")
    assert status == 0 and "12 pairs, the same as in pairs.jsonl" in said
    status, said = run("convert", "pairs.parquet", "back.jsonl", "--output-format", "mmpr")
    assert status == 0 and "Read again: 12 pairs" in said and "'source' of 12 records" in said
    assert [json.loads(line)["question"] for line in (folder / "back.jsonl").read_text().splitlines()][0].endswith(
        "What is number 0?"
    )
    status, said = run("convert", "pairs.jsonl", "pairs.parquet")
    assert status == 2 and "pairs.parquet" in said


def test_mix(folder, run):
    sources = "  - {path: pairs.jsonl, repeat_time: 0.5, tiles: {max: 6}}\n  - {path: pairs.jsonl, name: more, cap: 3}\n"
    (folder / "mixture.yaml").write_text(f"sources:\n{sources}seed: 1\n")
    status, said = run("mix", "mixture.yaml")
    assert status == 0 and said.split("\n")[-2].split() == ["in", "all", "24", "9", "100.0%"]
    status, said = run("mix", "mixture.yaml", "mixed.parquet", "--shuffle")
    mixed = load_preferences(folder / "mixed.parquet")
    assert status == 0 and len(mixed) == 9
    assert [row["tiles"]["max"] for row in mixed if row["source"] == "pairs"] == [6] * 6


def test_a_mixture_with_eval_pairs(folder, run):
    (folder / "mixture.yaml").write_text("sources:\n  - {path: pairs.jsonl}\neval_size: 3\n")
    status, said = run("mix", "mixture.yaml", "mixed.jsonl")
    assert status == 2 and "eval_size=3" in said
    assert run("mix", "mixture.yaml", "mixed.jsonl", "eval.jsonl")[0] == 0
    assert len(load_preferences(folder / "mixed.jsonl")) == 9 and len(load_preferences(folder / "eval.jsonl")) == 3
    assert run("validate", "mixed.jsonl", "--eval-path", "eval.jsonl")[0] == 0


def test_all_sources_of_a_mixture_and_of_a_meta_json(folder, run):
    """Two sources, one of them in its own folder with its own images."""
    (folder / "other").mkdir()
    make_image(20).save(folder / "other" / "x.png")
    good = {"image": "x.png", "question": "Why?", "chosen": "So.", "rejected": "No."}
    (folder / "other" / "more.jsonl").write_text("\n".join(map(json.dumps, (good, {**good, "question": "When?"}))))
    (folder / "mixture.yaml").write_text("sources:\n  - {path: pairs.jsonl}\n  - {path: other/more.jsonl, repeat_time: 2}\n")
    entry = {"root": "other", "annotation": "other/more.jsonl", "data_augment": False, "repeat_time": 2, "length": 2}
    meta = {"pairs": {**entry, "root": "", "annotation": "pairs.jsonl", "length": 12, "repeat_time": 1}, "more": entry}
    (folder / "meta.json").write_text(json.dumps(meta))
    for name in ("mixture.yaml", "meta.json"):
        status, said = run("validate", name)
        assert status == 0 and "14 pairs in 14 lines" in said
        assert "16 pairs of 12 prompts" in run("stats", name)[1]
        assert run("mix", name)[1].split("\n")[2].split() == ["more", "2", "4", "25.0%"]
    for action in ("validate", "stats"):
        status, said = run(action, "mixture.yaml", "--image-root", "other")
        assert status == 2 and "image_root=other" in said
    (folder / "other" / "x.png").unlink()
    status, said = run("validate", "meta.json", "--num-proc", 2)
    assert status == 1 and re.search(r"image .* 2 +\S*other/more.jsonl:1: ", said)


def test_split(folder, run):
    status, said = run("split", "pairs.jsonl", "train.jsonl", "eval.jsonl", "--eval-size", 3, "--seed", 1)
    assert status == 0 and "eval.jsonl: 3 pairs" in said
    sides = [
        {line["id"] for line in map(json.loads, (folder / name).read_text().splitlines())} for name in ("train.jsonl", "eval.jsonl")
    ]
    assert len(sides[0]) == 9 and len(sides[1]) == 3
    for pair in ({"pair-0", "again-0"}, {"pair-1", "again-1"}):
        assert any(pair <= side for side in sides)
    assert run("validate", "train.jsonl", "--eval-path", "eval.jsonl")[0] == 0
    assert run("split", "pairs.jsonl", "train.jsonl", "other.jsonl")[0] == 2


def test_dedupe(folder, run):
    before = (folder / "pairs.jsonl").read_bytes()
    status, said = run("dedupe", "pairs.jsonl", "once.jsonl")
    assert status == 0 and "2 of 12 pairs" in said and "2 exact" in said and "0 near" in said
    removed = [json.loads(line) for line in (folder / "once.jsonl.removed.jsonl").read_text().splitlines()]
    assert [(line["id"], line["same_as"]) for line in removed] == [("again-0", "pair-0"), ("again-1", "pair-1")]
    assert len(load_preferences(folder / "once.jsonl")) == 10
    assert (folder / "pairs.jsonl").read_bytes() == before
    assert run("dedupe", "pairs.jsonl", "once.jsonl")[0] == 2


def test_conversations_are_deduplicated_and_split(folder, run):
    """The second line repeats the first one; the third has another last turn, and with it stays in one part: one question."""
    asked = {"role": "user", "content": "How many apples lie in the basket on the left?"}
    said = [["Seven."], ["Seven."], ["Seven.", "Why?", "I have counted them, one after another."], ["Nothing is in it."]]
    lines = [
        {
            "id": f"c{place}",
            "messages": [
                {**asked, "content": f"{asked['content']}{'?' * (place == 3)}"},
                *({"role": ("assistant", "user")[turn % 2], "content": text} for turn, text in enumerate(turns)),
            ],
        }
        for place, turns in enumerate(said)
    ]
    (folder / "c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    status, said = run("dedupe", "c.jsonl", "once.jsonl")
    assert status == 0 and "1 of 4 conversations" in said and "c1 duplicates c0" in said
    assert run("split", "once.jsonl", "train.jsonl", "eval.jsonl", "--eval-size", 1)[0] == 0
    assert [len(load_conversations(folder / name)) for name in ("train.jsonl", "eval.jsonl")] == [2, 1]


def test_dedupe_writes_control_characters_out(folder, run):
    """A terminal would interpret these ids as commands to clear the screen."""
    pair = {"question": "Why?", "chosen": "So.", "rejected": "No."}
    lines = [{"id": f"{number}\x1b[2J", **pair} for number in range(2)]
    (folder / "odd.jsonl").write_text("\n".join(map(json.dumps, lines)))
    said = run("dedupe", "odd.jsonl", "once.jsonl")[1]
    assert "\x1b" not in said and "1\\x1b[2J duplicates 0\\x1b[2J" in said


def test_a_missing_image_is_reported_without_a_traceback(folder, run):
    """It existed when the pairs were converted."""
    load_preferences("pairs.jsonl")
    (folder / "3.png").unlink()
    for words in (["convert", "pairs.jsonl", "a.jsonl", "--images", "copy"], ["convert", "pairs.jsonl", "a.parquet"]):
        status, said = run(*words)
        assert status == 2 and re.search(r"mpo: error: \S*3\.png: No such file or directory", said), said
    assert not list(folder.glob("a.*"))


def test_errors_and_findings_write_control_characters_out(folder, run):
    (folder / "odd\x1b[2J.jsonl").write_text("{}")
    for words, expected in ((["stats", "odd\x1b[2J.jsonl"], 2), (["validate", "odd\x1b[2J.jsonl"], 1)):
        status, said = run(*words)
        assert status == expected and "\x1b" not in said and "odd\\x1b[2J.jsonl:1" in said, said


def test_convert_from_rlaif_v_to_mmpr(folder, run):
    """At the top level its fields would make the line an RLAIF-V record, whose id is 'idx'."""
    origin = {"ds_name": "RLAIF-V", "origin_dataset": "VQAv2", "origin_split": "{}", "idx": "7", "image_path": "0.png"}
    line = {**origin, "image": {"path": "0.png", "bytes": None}, "question": "Why?", "chosen": "So.", "rejected": "No."}
    (folder / "rlaif.jsonl").write_text(json.dumps(line))
    status, said = run("convert", "rlaif.jsonl", "mmpr.jsonl", "--output-format", "mmpr")
    assert status == 0 and "1 pairs, the same as in rlaif.jsonl" in said
    assert json.loads((folder / "mmpr.jsonl").read_text())["metadata"]["origin_dataset"] == "VQAv2"


def test_mistakes_are_said_in_one_line(folder, run):
    for words, message in (
        (["stats", "none.jsonl"], "none.jsonl"),
        (["stats", "pairs.jsonl", "--format", "csv"], "got 'csv'"),
        (["stats", "pairs.jsonl", "--max-tiles", 2], "--max-tiles needs --model"),
        (["validate", "pairs.jsonl", "--max-length", 2], "--max-length needs --model"),
        (["split", "pairs.jsonl", "a", "b", "--eval-size", 100], "eval_size=100"),
        (["mix", "none.yaml"], "none.yaml"),
    ):
        status, said = run(*words)
        assert status == 2 and said.startswith("mpo: error: ") and message in said, said


@pytest.mark.parametrize("words", [[], *([action] for action in ACTIONS)])
def test_help_teaches(capsys, words):
    with pytest.raises(SystemExit) as stop:
        main(["data", *words, "--help"])
    said = capsys.readouterr().out
    assert (
        stop.value.code == 0 and "usage: mpo data" in said and f"examples\n  mpo data {' '.join(words)}" in said and len(said) > 800
    )


def test_help_needs_no_torch():
    program = "import sys; sys.modules['torch'] = None; from mpo.commands import main; main(['data', 'validate', '--help'])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("action", ["validate", "stats", "show"])
def test_a_model_that_is_not_there(folder, run, action):
    status, said = run(action, "pairs.jsonl", "--model", "/nope")
    assert status == 2 and "mpo: error: --model /nope " in said
    (folder / "bare").mkdir()
    (folder / "bare" / "config.json").write_text('{"model_type": "internvl"}')
    status, said = run(action, "pairs.jsonl", "--model", "bare")
    assert status == 2 and "mpo: error: --model bare " in said


def test_a_processors_folder_is_enough_to_count_tokens(folder, run):
    small_processor(TEXTS, image_size=32, patch_size=8, max_patches=4).save_pretrained("processor")
    status, said = run("validate", "pairs.jsonl", "--model", "processor", "--num-proc", 1)
    assert status == 0 and "12 pairs" in said


@pytest.mark.parametrize("words", [["stats", "--html"], ["show", "--html"], ["validate", "--output"]], ids=" ".join)
def test_an_output_is_never_the_input(folder, run, words):
    """Nor by another name: a link to it, a path through its folder."""
    before = (folder / "pairs.jsonl").read_bytes()
    (folder / "link.jsonl").symlink_to(folder / "pairs.jsonl")
    for name in ("pairs.jsonl", "link.jsonl", f"../{folder.name}/pairs.jsonl"):
        status, said = run(words[0], "pairs.jsonl", words[1], name)
        assert status == 2 and f"{words[1]}={name}" in said
    assert (folder / "pairs.jsonl").read_bytes() == before

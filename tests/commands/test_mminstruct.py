"""`mpo mminstruct` against the stub server: all of it from a configuration, and step by step."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter

import pytest
import stub_server
from PIL import Image
from stub_server import StubServer
from support import make_image
from told import tell

from mpo.commands import main
from mpo.data import load_conversations, load_questions
from mpo.io import read_json_lines

CONFIG = """
images: [{{path: photos, domain: folder, licence: CC0, origin: made here}}]
languages: [en, zh]
caption: {{model: {{model: "{url}", prices: [1, 2]}}}}
generate: {{model: {{model: "{url}", prices: [1, 2]}}, rounds: 1}}
blind: {{n: 1}}
judge: {{model: {{model: "{url}"}}}}
manual_price: 0.3
"""


def picture(seed):
    """Soft areas of colour, as in a photograph; noise would not survive JPEG."""
    return make_image(seed, 6, 5).resize((96, 80), Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Four images in folders named after two domains, and what must not be collected."""
    monkeypatch.chdir(tmp_path)
    for number in range(4):
        path = tmp_path / "photos" / ("landmark", "artwork")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path)
    picture(1).resize((84, 70)).save(tmp_path / "photos" / "artwork" / "copy.jpg", quality=85)
    (tmp_path / "photos" / "artwork" / "same.png").write_bytes((tmp_path / "photos" / "artwork" / "1.png").read_bytes())
    make_image(8, 96, 20).save(tmp_path / "photos" / "artwork" / "thin.png")
    (tmp_path / "photos" / "artwork" / "broken.jpg").write_bytes(b"\xff\xd8\xff broken")
    return tmp_path


@pytest.fixture
def make(folder, capsys):
    def make(url, text=CONFIG, *words):
        (folder / "c.yaml").write_text(text.format(url=url))
        status = main(["mminstruct", "make", "c.yaml", "--output", "out", *words])
        said = capsys.readouterr()
        return status, said.out, said.err

    return make


def test_all_of_it_and_again(make, folder):
    with StubServer(text=tell) as stub:
        status, out, err = make(stub.url)
        assert status == 0, err
        assert "out/meta.json" in out
        asked = stub.asked
        before = {path: path.read_bytes() for path in (folder / "out").iterdir() if path.is_file() and path.name[0] != "."}
        assert make(stub.url)[0] == 0 and stub.asked == asked
        assert all(path.read_bytes() == data for path, data in before.items())
        assert "rounds is 1 there and 2 now" in make(stub.url, CONFIG.replace("rounds: 1", "rounds: 2"))[2]
        assert any("response_format" in body for body in stub.bodies)  # the stub is vLLM, which keeps to a schema
    out = folder / "out"
    report = json.loads((out / "report.json").read_text())
    collected = report["collected"]
    assert (collected["images"], collected["kept"], collected["dropped"]) == (8, 4, 4)
    assert sorted(one["kind"] for one in read_json_lines(out / "jobs" / "collect" / "dropped.jsonl")) == [
        *("broken", "duplicate", "duplicate", "small")
    ]
    # 4 images in 2 languages, each with 2 judgements and one instruction of each other type
    assert report["instructions"] == 40 and report["types"] == {"judgement": 16, "choice": 8, "long": 8, "short": 8}
    assert report["judgements"] == {"Yes": 4, "No": 4, "是": 4, "否": 4} and report["letters"] == dict.fromkeys("ABCD", 2)
    assert report["per instruction"]["of the manual price"] == pytest.approx(report["spent"]["cost"] / 40 / 0.3)
    assert report["per instruction"]["without the price of"] == "judge"  # what it was told costs more than the report can know
    page = (out / "report.html").read_text()
    assert page.count("<img") == 8 and "0.167" in page and "made here" not in page
    records = read_json_lines(out / "instructions.jsonl")
    assert {(one["licence"], one["origin"]) for one in records} == {("CC0", "made here")}
    assert all(one["prompt"].endswith(one["suffix"]) for one in records)


def test_what_the_forms_are_read_by(make, folder):
    with StubServer(text=tell) as stub:
        assert make(stub.url, CONFIG + "turns: 3\n")[0] == 0
    out = folder / "out"
    meta = json.loads((out / "meta.json").read_text())
    root = json.loads((out / "report.json").read_text())["image_root"]
    assert {*meta} == {"mminstruct_artwork", "mminstruct_landmark"}
    loaded = load_conversations(out / "meta.json")
    assert len(loaded) == sum(one["length"] for one in meta.values()) == 16  # 4 images x 2 languages, 5 in turns of 3
    assert loaded[0]["images"][0].size == (96, 80)
    for name in ("trl.jsonl", "llava.json", "sharegpt.json"):
        other = load_conversations(out / name, image_root=root)
        texts = [[one["messages"] for one in data] for data in (loaded, other)]
        assert sorted(map(str, texts[0])) == sorted(map(str, texts[1])), name
    info = json.loads((out / "dataset_info.json").read_text())["mminstruct"]
    assert (out / info["file_name"]).is_file() and info["columns"]["images"] == "images"
    questions = list(load_questions(out / "questions.jsonl", image_root=root))
    assert Counter(one.kind for one in questions) == {"yes_no": 16, "choice": 8, None: 16}
    assert sum(bool(one.ground_truths) for one in questions) == 32  # a long answer is none


@pytest.mark.parametrize("kind", ["vllm", "transformers"])
def test_dialogues(make, folder, kind):
    """As JSON and as tags; one conversation in each form, and a question for mpo mmpr that stands by itself."""
    text = CONFIG + "types: [judgement, short, dialogue]\nturns: 2\n"
    with StubServer(text=tell, kind=kind) as stub:
        assert make(stub.url, text)[0] == 0
        asked = stub.asked
        assert make(stub.url, text)[0] == 0 and stub.asked == asked
        assert any("Said before: Which object" in str(body["messages"]) for body in stub.bodies)
        assert any("response_format" in body for body in stub.bodies) == (kind == "vllm")
    out = folder / "out"
    report = json.loads((out / "report.json").read_text())
    # 4 images in 2 languages: two judgements, of which the yes goes, a short one, and a dialogue that ends in yes
    assert report["dialogues"] == {"of 3": 8} and report["types"] == {"judgement": 16, "short": 24}
    assert "balance" in str(report["drops"]) and "<td>8</td>" in (out / "report.html").read_text()
    for name in ("meta.json", "trl.jsonl", "llava.json", "sharegpt.json"):
        loaded = load_conversations(out / name, image_root=None if name == "meta.json" else report["image_root"])
        talks = [[str(message["content"]) for message in one["messages"]] for one in loaded]
        own = [one for one in talks if "What colour is it?" in str(one) or "它是什么颜色" in str(one)]
        assert len(own) == 8 and all(len(one) == 6 and ("Which object" in one[0] or "哪种物品" in one[0]) for one in own), name
    assert len(list(load_questions(out / "questions.jsonl", image_root=report["image_root"]))) == 24  # first rounds alone
    asked = [one["question"] for one in read_json_lines(out / "questions.jsonl")]
    assert len(asked) == 24 and not any("it?" in one or "它" in one for one in asked)
    assert not any("earlier" in one for one in read_json_lines(out / "instructions.jsonl"))


def test_a_language_that_is_added_asks_nothing_again(make, folder):
    with StubServer(text=tell) as stub:
        assert make(stub.url, CONFIG.replace("[en, zh]", "[en]"))[0] == 0
        asked, first = stub.asked, {one["id"] for one in read_json_lines(folder / "out" / "instructions.jsonl")}
        assert len(first) == 20
        assert make(stub.url)[0] == 0
        assert all(
            "cannot see" in str(body) or any("\u4e00" <= letter <= "\u9fff" for letter in str(body)) for body in stub.bodies[asked:]
        )
        assert first < {one["id"] for one in read_json_lines(folder / "out" / "instructions.jsonl")}
        asked = stub.asked
        assert make(stub.url, CONFIG.replace("[en, zh]", "[zh, en]"))[0] == 0 and stub.asked == asked


def test_jobs_of_an_older_version_go_on(make, folder):
    """It had one job for all languages of a source."""
    english, jobs = CONFIG.replace("[en, zh]", "[en]"), folder / "out" / "jobs"
    with StubServer(text=tell) as stub:
        assert make(stub.url, english)[0] == 0
        asked = stub.asked
        for kind in ("caption", "generate"):
            (jobs / f"{kind}-photos-en").rename(jobs / f"{kind}-photos")
        assert make(stub.url, english)[0] == 0 and stub.asked == asked
        for kind in ("caption", "generate"):
            (jobs / f"{kind}-photos-en").rename(jobs / f"{kind}-photos")
        status, _, err = make(stub.url, CONFIG.replace("[en, zh]", "[zh]"))
        assert status == 2 and "older version" in err and stub.asked == asked


def test_a_full_disk_is_named_and_nothing_is_lost(folder):
    """A file system of 1 MiB, full at several moments: the command says so, and with room it goes on."""
    space = ["unshare", "--map-root-user", "--mount"] if shutil.which("unshare") else ["false"]
    if subprocess.run([*space, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode:
        pytest.skip("this system lets nobody mount a file system of their own")
    (folder / "disk").mkdir()
    script = """
        mount -t tmpfs -o size=1m none disk
        for room in 16 40 100; do
            head -c 2m /dev/zero > disk/full 2> /dev/null; truncate -s "-${room}K" disk/full
            $MPO make c.yaml --output disk/out 2>> said; echo $? >> statuses
            cat disk/out/jobs/*/ledger.jsonl | wc -l >> kept
            rm disk/full
        done
        $MPO make c.yaml --output disk/out && cp -r disk/out out
    """
    with StubServer(text=tell) as stub:
        (folder / "c.yaml").write_text(CONFIG.format(url=stub.url).replace("[en, zh]", "[en]"))
        environment = {**os.environ, "MPO": f"{sys.executable} -m mpo mminstruct"}
        done = subprocess.run([*space, "sh", "-c", script], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        asked = [json.dumps(body["messages"]) for body in stub.bodies if body["max_tokens"] > 1]
    statuses, said = (folder / "statuses").read_text().split(), (folder / "said").read_text()
    kept = [*map(int, (folder / "kept").read_text().split())]
    assert {*statuses} == {"1"} and kept[-1] > 0 and kept == sorted(kept)  # full while models are asked
    assert len(re.findall(r"disk/out/\S+: No space left on device", said)) == 3 and "Traceback" not in said
    lost = len(asked) - len({*asked})  # those whose response came while the disk was full
    ledgers = sum(len(read_json_lines(path)) for path in (folder / "out" / "jobs").glob("*/ledger.jsonl"))
    assert len({*asked}) <= ledgers and lost <= 3 * 8
    assert json.loads((folder / "out" / "report.json").read_text())["instructions"] == 20


def test_step_by_step(folder, capsys):
    def run(*words):
        status = main(["mminstruct", *words])
        said = capsys.readouterr()
        assert status == 0, said.err
        return said.out

    with StubServer(text=tell, kind="transformers") as stub:
        assert "8 images: 4 kept" in run(
            "collect", "photos", "--output", "images", "--image-domain", "prompt", "--classifier", stub.url
        )
        run("caption", stub.url, "images", "--output", "told", "--language", "en", "--domains", str(kitchen(folder)))
        run("seed", "told", "--output", "seeded", "--type", "short", "--type", "choice", "--rounds", "2")
        said = run("generate", stub.url, "seeded", "--output", "made", "--judge", stub.url, "--blind", stub.url)
        assert not any("response_format" in body for body in stub.bodies)
    # the second round says the same again, which is dropped
    assert "8 instructions" in said and Counter(one["kind"] for one in read_json_lines(folder / "made" / "dropped.jsonl")) == {
        "repeat": 8
    }
    assert len(load_conversations(folder / "made" / "mminstruct" / "meta.json")) == 8


def kitchen(folder):
    path = folder / "kitchen.yaml"
    seeds = {
        kind: {"en": ["What is on the <dish>?"], "zh": ["<dish>上有什么？"]} for kind in ("judgement", "choice", "long", "short")
    }
    path.write_text(json.dumps({"about": {"en": "kitchens", "zh": "厨房"}, "placeholders": ["dish"], "seeds": seeds}))
    return path


def test_a_domain_of_the_users(make, folder):
    text = CONFIG.replace("domain: folder", "domain: kitchen") + f"domains: [{kitchen(folder)}]\n"
    with StubServer(text=tell) as stub:
        assert make(stub.url, text)[0] == 0
        assert any("What is on the <dish>?" in str(body["messages"]) for body in stub.bodies)
    assert [*json.loads((folder / "out" / "report.json").read_text())["domains"]] == ["kitchen"]


BLIND_EYE = "I'm sorry, but I cannot see any image."


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ({"caption": BLIND_EYE}, "the caption refuses"),
        ({"caption": "A cat."}, "too short"),
        ({"items": "Here are some questions about it."}, "no tags"),
        ({"items": "<Q1>Is it red?<A1>Yes</A1>"}, "needs Q, A"),
    ],
)
def test_servers_that_say_nothing_useful(make, folder, said, name):
    """It is named, and what was said and paid for is kept."""

    def text(body, number):
        sees = not isinstance(body["messages"][-1]["content"], str)
        return said.get("caption" if sees and body["max_tokens"] > 1 else "items") or tell(body, number)

    with StubServer(text=text, kind="transformers") as stub:
        status, out, err = make(stub.url)
        assert status == 2 and name in err and out == ""
        asked = stub.asked
        assert make(stub.url)[0] == 2 and stub.asked == asked
    job = folder / "out" / "jobs" / ("caption-photos-en" if "caption" in said else "generate-photos-en")
    lost = read_json_lines(job / "dropped.jsonl")
    assert lost and all(next(iter(said.values())) in json.dumps(one) for one in lost)
    if "caption" in said:
        assert len(lost) == 4 and len(read_json_lines(job / "ledger.jsonl")) == 8  # each was asked for twice


def test_a_server_that_ignores_images(make, monkeypatch):
    with StubServer(text=tell, kind="transformers") as stub:
        monkeypatch.setattr(stub_server, "IMAGE_TOKENS", 0)
        status, _, err = make(stub.url)
        assert status == 2 and "does not see" in err and stub.asked == 2
    poison = lambda body: 400 if "image_url" in str(body["messages"]) else None  # noqa: E731
    with StubServer(text=tell, poison=poison) as stub:
        status, _, err = make(stub.url)
        assert status == 2 and "refuses an image" in err


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (CONFIG.replace("domain: folder", "domain: landmarc"), "'landmark'"),
        (CONFIG.replace("path: photos", "path: empty"), "has no images"),
        (CONFIG.replace("path: photos", "path: nowhere"), "nowhere"),
        (CONFIG.replace("domain: folder", "domain: prompt"), "collect.model"),
        (CONFIG.replace("domain: folder", "retrieve: 3"), "collect.clip"),
        (CONFIG.replace("domain: folder, ", ""), "no domain"),
        (CONFIG.replace("rounds", "runds"), "'rounds'"),
        (CONFIG.replace("[en, zh]", "[de]"), "languages"),
        (CONFIG + "types: [essay]\n", "types"),
        (CONFIG + "expand: [{{set: figurqa, path: photos}}]\n", "'figureqa'"),
        (CONFIG + "domains: [none.yaml]\n", "none.yaml"),
        ("languages: [en]\n", "neither images nor expand"),
        ("images: [{{path: photos}}]\n", "caption"),
    ],
)
def test_refusals(make, folder, text, name):
    (folder / "empty").mkdir()
    (folder / "empty" / "notes.txt").write_text("no image")
    with StubServer(text=tell) as stub:
        status, out, err = make(stub.url, text)
        assert status == 2 and name in err and out == "" and stub.asked == 0

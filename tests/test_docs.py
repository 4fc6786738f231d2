"""The pages of docs/: inline commands, settings, names and messages are those of the code. test_docs_run.py runs the blocks."""

import ast
import functools
import importlib.util
import itertools
import os
import pydoc
import re
import shlex
import shutil
from pathlib import Path

import pytest
from composition import composed

from mpo import MPOConfig
from mpo.commands import command_line
from mpo.commands.train import GROUPS
from mpo.recipes import OPTIONS
from mpo.training.job import TrainJob

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
needs_zensical = pytest.mark.skipif(importlib.util.find_spec("zensical") is None, reason="needs zensical")
pytestmark = pytest.mark.skipif(not PAGES, reason="the documents are not here")


def commands(page):
    """Lines and inline code that begin with `mpo`, up to a comment; those with `...` are shown in part."""
    text = re.sub(r"```python\n.*?```", "", page.read_text(), flags=re.DOTALL)
    text = re.sub(r"\\\n\s*", "", text)  # lines that go on
    found = re.findall(r"`(mpo \w[^`]*)`", text)
    found += re.findall(r"^    (?:\$ )?(?:srun .*?)?(mpo \w+(?: .*)?)$", text, flags=re.MULTILINE)
    lines = [re.split(r"\s{2,}#|&&| > | \| ", line)[0].strip() for line in found]
    return [shlex.split(line)[1:] for line in lines if "..." not in line]


def trains(words):
    """Whether a command is one of Hydra's, with something set."""
    return words[0] in {"train", "sft"} and len(words) > 1 and words[1] != "--help"


@functools.cache
def check_job(task, *words):
    plain = composed(words, task)
    plain |= {"run_dir": "runs/documented", "dry_run": True}
    plain["data"] |= {"path": plain["data"].get("path") or "pairs.jsonl"}
    assert plain["task"] == task, words
    TrainJob.from_config(plain)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_parses(page, capsys):
    for words in commands(page):
        if trains(words):
            check_job(words[0], *(word for word in words[1:] if not word.startswith("-")))
        elif len(words) > 1 and "--help" not in words and words[0] not in {"train", "sft", "data", "cache", "mmpr"}:
            command_line().parse_args(words)
        elif len(words) > 2:
            command_line().parse_args(words)
    capsys.readouterr()


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem == "coming-from"], ids=lambda page: page.stem)
def test_every_option_of_the_tables_composes(page):
    """What stands in the right column of the tables: groups and keys of a recipe, fields of MPOConfig."""
    words = [word for row in re.findall(r"^\| .* \| (.*) \|$", page.read_text(), flags=re.MULTILINE) for word in options(row)]
    fields = {*MPOConfig.__dataclass_fields__}
    chosen = [word for word in words if word.partition("=")[0] in GROUPS]
    keys = [word for word in words if word not in chosen and word.partition("=")[0] not in fields]
    groups = {}
    for word in dict.fromkeys(chosen):
        groups.setdefault(word.partition("=")[0], []).append(word)
    for together in itertools.zip_longest(*groups.values()):  # one of each group at a time
        composed([word for word in together if word])
    plain = composed(["data=mmpr", "peft=lora", *keys])
    assert set(plain["train_parts"].values()) == {"freeze", None}  # one by one: together they leave nothing to train
    TrainJob.from_config({**plain, "data": {"path": "pairs.jsonl"}, "train_parts": None, "resume": "auto"})
    assert len(chosen) > 10 < len(keys)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.stem)
def test_models_of_the_hub_are_those_that_recipes_start_from(page):
    """InternVL3-1B has been through MPO: as the start of a comparison with a run from InternVL3-1B-Instruct it would mislead."""
    starts = {option["model"].get("name_or_path") for option in OPTIONS["model"].values()}
    code = [*re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL), *map(" ".join, commands(page))]
    assert {name for text in code for name in re.findall(r"OpenGVLab/[\w.-]+", text)} <= starts


def options(row):
    """The inline code of a row that is nothing but `key=value`, and the fields of MPOConfig in Python."""
    codes = [code.split() for code in re.findall(r"`([^`]*)`", row)]
    return [word for code in codes if all(re.fullmatch(r"[a-z_.]+=[^\"()]+", word) for word in code) for word in code]


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem != "coming-from"], ids=lambda page: page.stem)
def test_every_name_in_the_text_is_one(page):
    """Inline `mpo.package.name`; the page on other trainers has keys of theirs that look so."""
    for name in set(re.findall(r"\bmpo(?:\.[A-Za-z_]\w*)+", " ".join(re.findall(r"`([^`\n]+)`", page.read_text())))):
        assert pydoc.locate(name) is not None, name


def texts(tree):
    """The texts of a module that are no docstrings; what is put into an f-string is `…`."""
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.value


def test_every_message_is_in_the_code():
    """A quoted message is in one text of the code, its `…` where that puts something in."""
    files = [*(ROOT / "mpo").rglob("*.py"), *(ROOT / "losses").rglob("*.py")]
    known = "\n".join(" ".join(text.split()) for path in files for text in texts(ast.parse(path.read_text())))
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = re.findall(r"^\| `([^`]+)` \|", page, flags=re.MULTILINE)
    assert len(messages) > 20
    patterns = [".*…".join(re.escape(part) for part in message.split("…")) for message in messages]
    missing = [pattern for pattern in patterns if not re.search(pattern, known)]
    assert not missing


SECTIONS = ("trainer", "model", "data", "peft", "launch", "train_parts", "samples")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_setting_named_in_the_text_is_one(page):
    """Inline `section.key` and `section.key=value` of a recipe of pairs or of conversations; whether a value fits is not asked."""
    found = re.findall(rf"`((?:{'|'.join(SECTIONS)})\.[a-z_0-9.]+)(?:=[^`\s]+)?`", page.read_text())
    for key in sorted(set(found)):
        said = [""] * 2
        for place, task in enumerate(("train", "sft")):
            try:
                check_job(task, "model.name_or_path=model", f"{key}=null")
            except ValueError as error:
                said[place] = str(error)
        assert not all("Unknown key" in one for one in said), said


def build_docs():
    spec = importlib.util.spec_from_file_location("build_docs", ROOT / ".ci" / "docs.py")
    docs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(docs)
    return docs


@needs_zensical
def test_the_links_of_a_page_are_checked(tmp_path):
    """A dead link, a dead anchor and a script of another host are found; what is right is not."""
    docs = build_docs()
    (tmp_path / "a.html").write_text(
        '<h1 id="x"></h1><a href="#x"></a><a href="b.html#y"></a><a href="https://arxiv.org"></a><img src="data:image/png;base64,">'
    )
    (tmp_path / "b.html").write_text('<h1 id="y"></h1><a href="a.html"></a>')
    assert docs.problems(tmp_path) == []
    (tmp_path / "b.html").write_text('<a href="c.html"></a><a href="a.html#z"></a><script src="https://cdn.example/x.js"></script>')
    found = {problem.split(": ")[1].split()[0] for problem in docs.problems(tmp_path)}
    assert found == {"b.html#y", "c.html", "a.html#z", "loads"}


@pytest.mark.slow
@needs_zensical
@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium: apt-get install chromium")
def test_the_site_opens_from_a_folder(tmp_path):
    """Without a server: the navigation names every page, images are shown, search finds, and nothing is asked of another host."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright (extra dev)")
    assert build_docs().main(tmp_path) == 0
    pages = {path.as_uri() for path in (tmp_path / "site").rglob("*.html") if path.name != "404.html"}
    with api.sync_playwright() as started:
        page, wrong = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]).new_page(), []
        page.set_default_timeout(0)  # the machine may be busy
        page.on("request", lambda request: wrong.append(request.url) if request.url.startswith("http") else None)
        page.on("requestfailed", lambda request: wrong.append(request.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto((tmp_path / "site" / "when-mpo-helps.html").as_uri())  # its images are those of benchmarks/
        assert page.eval_on_selector_all("article img", "images => images.filter(image => image.naturalWidth).length") == 3
        links = page.eval_on_selector_all("nav.md-nav--primary a", "links => links.map(link => link.href.split('#')[0])")
        assert set(links) == pages
        page.keyboard.press("Control+k")
        field = page.locator("input[aria-label=Search]")
        field.fill("reward shift")
        page.locator("a mark", has_text="reward").first.wait_for()
        assert field.input_value() == "reward shift"
    assert not wrong

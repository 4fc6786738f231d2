"""Every block of the README and of docs/ runs: its commands and its Python, a page in order in one folder.

documented.py says what is in the folder, and what is put in the place of what cannot run here. A command that is new in a
page runs as it is, and fails the test until it can: nothing is left out but the commands of `EXCEPTIONS`.
"""

import contextlib
import getpass
import os
import re
import shlex
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
from documented import BACKGROUND, BEFORE, EXCEPTIONS, NO_COMMANDS, SUBSTITUTIONS, prepare, solved
from programs import programs
from review_server import Process
from stub_server import StubServer
from told import tell
from torch.distributed.elastic.utils.distributed import get_free_port

from mpo.data import load_preferences, load_questions

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "examples").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$|(?<=\n\n)((?: {4}[^\n]*\n|\n(?= {4}))+)", re.MULTILINE | re.DOTALL)

pytestmark = pytest.mark.skipif(not (ROOT / "docs").exists(), reason="the documents are not here")


def blocks(page):
    """The blocks of a page in order: the language of each, `sh` where it has commands, and its text."""
    for language, fenced, indented in BLOCK.findall(page.read_text()):
        text = fenced or re.sub("^ {4}", "", indented, flags=re.MULTILINE)
        shell = text.startswith("$ ") if language == "text" else not language and not text.startswith(tuple(NO_COMMANDS))
        yield "sh" if shell or language in {"bash", "console", "shell"} else language, text


def commands(text):
    """The commands of a block, each with the output that is shown below: of a transcript the lines with `$`, else all."""
    text = re.sub(r"\\\n\s*", "", text)
    if not text.startswith("$ "):
        return [(line, "") for line in text.splitlines() if line.strip()]
    parts = re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]
    return [(line, output) for line, _, output in (part.partition("\n") for part in parts)]


def configurations():
    """The configurations that the pages show, each below the command that reads it: file -> text."""
    found, named = {}, ""
    for page in PAGES:
        for language, text in blocks(page):
            if language == "yaml":
                assert named and named not in found, text
                found[named] = text
            named = (re.findall(r"\w+\.yaml", text) or [named])[-1]
    return found


def runnable(command):
    """What runs in the place of a command, None for an exception; and the patterns of the tables that it fits."""
    command = re.sub(r"\s+#\s.*$", "", command)
    if left_out := [pattern for pattern in EXCEPTIONS if re.match(pattern, command)]:
        return None, left_out
    used = []
    for pattern, replacement, _ in SUBSTITUTIONS:
        command, count = re.subn(pattern, replacement, command)
        used += [pattern] * count
    return command, used


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_block_is_overlooked(page):
    outside = BLOCK.sub("", page.read_text())
    assert not re.findall(r"```|~~~|<pre|^(?: {4}|\t)(?:\$ )?(?:mpo|make|pip|python) .*", outside, flags=re.MULTILINE)


def test_the_tables_have_nothing_more():
    found = [(language, text) for page in PAGES for language, text in blocks(page)]
    shown = [command for language, text in found if language == "sh" for command, _ in commands(text)]
    used = {pattern for command in shown for pattern in runnable(command)[1]}
    assert used == {*EXCEPTIONS, *(pattern for pattern, *_ in SUBSTITUTIONS)} and len(shown) > 80
    assert all(any(text.startswith(begin) for _, text in found) for begin in NO_COMMANDS)
    assert {*BEFORE} <= {page.stem for page in PAGES}


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documented")
    prepare(folder)
    return folder


class Shell:
    """Runs what a page says in a folder, with the servers that it starts."""

    def __init__(self, folder, environment):
        self.folder, self.environment, self.telling = folder, environment, False
        self.stack, self.beside, self.ports = contextlib.ExitStack(), [], {}
        self.free, self.log = str(get_free_port()), self.stack.enter_context(open(folder / "beside.log", "w"))

    def here(self, text):
        """A text with the ports of this test: of a server that the page starts, or else of a stub."""
        for port in re.findall(r"localhost:(\d+)", text):
            if port not in self.ports:
                stub = StubServer(text=lambda body, number: (tell if self.telling else solved)(body, number))
                self.ports[port] = self.stack.enter_context(stub).url.rpartition(":")[2].partition("/")[0]
        for port in re.findall(r"--port (\d+)", text):
            self.ports[port] = str(get_free_port())
        text = re.sub(r"(localhost:|--port )(\d+)", lambda found: found[1] + self.ports[found[2]], text)
        return text.replace("FREE_PORT", self.free)

    def run(self, command, shown=""):
        """Run a command: to its end, beside the next ones, or, where it serves a page, until a decision is made there."""
        command, words = self.here(command), {"cwd": self.folder, "env": self.environment}
        self.telling = "mminstruct" in command
        if file := re.search(r"\bcat (\S+)$", command):
            (self.folder / file[1]).write_text(self.here(shown))
        if re.match(r"mpo review (?!.*--export)", command):
            with Process(reviewers=[getpass.getuser()], command=["bash", "-c", command], **words) as served:
                assert served.decide(0, "accept", by=getpass.getuser())[0] == 200
            assert served.process.returncode == 130  # Ctrl-C
            return
        if re.match(BACKGROUND, command):
            self.beside.append((command, subprocess.Popen(["bash", "-c", command], stdout=self.log, stderr=self.log, **words)))
            self.wait_for(command)
            return
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, **words)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
        if file:
            assert done.stdout == self.here(shown)
        for other, process in [*self.beside]:
            if not re.search(r"--port (\d+)", other):
                self.beside.remove((other, process))
                assert process.wait() == 0, other

    def wait_for(self, command):
        """Until a server answers."""
        port = re.search(r"--port (\d+)", command)
        while port and self.beside[-1][1].poll() is None:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://localhost:{port[1]}/health", timeout=5)
                return
            time.sleep(0.2)
        assert not port, f"{command} has ended"

    def close(self):
        for _, process in self.beside:
            process.terminate()
            process.wait()
        self.stack.close()


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_runs(page, prepared, tmp_path, interpreter):
    folder = tmp_path / "here"
    shutil.copytree(prepared, folder, symlinks=True)
    own = {"HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    shell = Shell(folder, os.environ | own | programs(tmp_path / "bin", interpreter))
    for name, text in configurations().items():
        (folder / name).write_text(shell.here(text))
    try:
        for command in BEFORE.get(page.stem, ()):
            shell.run(runnable(command)[0])
        for language, text in blocks(page):
            if language == "sh":
                for command, shown in commands(text):
                    if (line := runnable(command)[0]) is not None:
                        shell.run(line, shown)
            elif language == "python":
                shell.run(f"{interpreter} -c {shlex.quote(text)}")
            elif language == "json":
                assert check(text, folder)
            else:
                assert language == "yaml" or text.startswith(tuple(NO_COMMANDS)), text
    finally:
        shell.close()


def check(text, folder):
    """The records of a block of JSON lines, as mpo reads them."""
    (folder / "shown.jsonl").write_text(text)
    load = load_preferences if "chosen" in text else load_questions
    return list(load(str(folder / "shown.jsonl")))

"""All commands: their flags, help, JSON and exit statuses, found by walking the parsers."""

import functools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mpo.commands import command_line, main
from mpo.commands.flags import FLAGS
from mpo.training.reference.cache import ReferenceCache
from mpo.training.reference.fingerprint import Fingerprint
from mpo.training.store import LOG_PROBS, Entries, write_shard

ROOT = Path(__file__).parents[2]


def parsers(parser, name="mpo"):
    """Every parser by its name, commands with actions included."""
    yield name, parser
    for action in parser._actions:
        if action.nargs == "A...":  # of the sub-parsers
            for child, own in action.choices.items():
                yield from parsers(own, f"{name} {child}")


ALL = dict(parsers(command_line()))
COMMANDS = [name for name, parser in ALL.items() if parser.get_default("run")]
ACTIONS = {
    "cache": {"inspect", "prune", "verify"},
    "data": {"convert", "dedupe", "filter", "mix", "show", "split", "stats", "validate"},
    "inspect": {"fuser"},
    "mminstruct": {"caption", "collect", "expand", "generate", "make", "seed"},
    "mmpr": {"continue", "make", "pair", "sample", "verify"},
}


def test_every_file_is_a_command():
    single = {"convert", "demo", "doctor", "evaluate", "export", "generate", "join", "review", "sft", "train"}
    assert set(ALL) == {
        *("mpo", *(f"mpo {name}" for name in single | set(ACTIONS))),
        *(f"mpo {folder} {name}" for folder, names in ACTIONS.items() for name in names),
    }
    assert set(ALL) - set(COMMANDS) == {"mpo", "mpo sft", "mpo train", *(f"mpo {folder}" for folder in ACTIONS)}


@pytest.mark.parametrize("words", ["--hlep", "data --hlep", "data validate --hlep", "generate --hlep model"])
def test_an_unknown_flag_is_named_before_what_is_missing(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "--hlep. Did you mean '--help'?" in error and "required" not in error


def test_the_same_meaning_has_the_same_flag_type_and_help():
    """Flags of the same name agree in all but their default; flags of the same help text have one name; positionals likewise."""
    by_name, by_help = {}, {}
    for name in COMMANDS:
        for action in ALL[name]._actions:
            written = action.option_strings[0] if action.option_strings else action.metavar
            if written == "-h":
                continue
            help = action.help.partition(" (default: ")[0]
            described = (type(action).__name__, action.type, action.metavar, help)
            if action.option_strings:
                assert by_name.setdefault(written, described) == described, f"{name} {written}"
                assert written in FLAGS and written.startswith("--")
            assert by_help.setdefault(help, written) == written, f"{name} {written}: {help}"
    assert set(by_name) == set(FLAGS)  # none is described for nothing
    assert not [flag for flag in FLAGS if FLAGS[flag]["help"].endswith(".")]


def test_every_command_has_json_and_help_with_examples():
    for name, parser in ALL.items():
        if name in COMMANDS:
            assert "--json" in parser._option_string_actions, name
        if name not in ("mpo sft", "mpo train"):
            assert f"\n  {name} " in parser.epilog and parser.description[0].isupper(), name
        first = parser.description.split("\n")[0]
        verbs = "Ask|Check|Choose|Collect|Continue|Convert|Describe|Export|Inspect|Join|Make|Measure|Pair|Print|Read|Remove|Run"
        assert re.match(f"({verbs}|Sample|Show|Split|Train|Validate|Verify|Write)[ ,]", first), first


@pytest.mark.parametrize("file", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/comparison.md", None], ids=str)
def test_every_example_parses(file):
    """Those of help texts and of documents; a comment follows after two spaces."""
    if file and not (ROOT / file).exists():
        pytest.skip("the documents are not here")
    lines = (
        (ROOT / file).read_text().splitlines()
        if file
        else [line for one in ALL.values() for line in (one.epilog or "").splitlines()]
    )
    found = [re.split(r"\s{2,}|&&| > | #", line.strip())[0] for line in lines]
    found = [re.sub(r"^.*\| (?=mpo )|^[A-Z_]+=\S+ ", "", line) for line in found]
    examples = [shlex.split(line)[1:] for line in found if re.match(r"mpo (?!train|sft)\w+ \S", line)]
    for words in examples:
        command_line().parse_args(words)
    assert len(examples) > 30 or file


def test_help_loads_nothing_heavy():
    """Of every command, in one process."""
    program = (
        "import sys\nfrom mpo.commands import main\n"
        "for words in sys.argv[1:]:\n    try:\n        status = main([*words.split()[1:], '--help'])\n"
        "    except SystemExit as stop:\n        status = stop.code\n    assert status == 0\n"
        "print({'torch', 'transformers', 'datasets', 'numpy', 'PIL', 'trl', 'peft'} & set(sys.modules), file=sys.stderr)\n"
    )
    shown = subprocess.run([sys.executable, "-c", program, *ALL], capture_output=True, text=True, check=True)
    assert shown.stderr == "set()\n"
    assert all(f"usage: {name} " in shown.stdout.replace("Usage: mpo ", "usage: mpo ") for name in ALL)


# JSON


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Three pairs, of which the last repeats the first; a mixture; a cache of two completions."""
    monkeypatch.chdir(tmp_path)
    lines = [{"id": name, "question": f"Why {name[0]}?", "chosen": "So.", "rejected": "No."} for name in ("a", "b", "a again")]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "mixture.yaml").write_text("sources:\n  - {path: pairs.jsonl}\n")
    cache = ReferenceCache(tmp_path / "cache", Fingerprint({"model weights": "w"}, {}, {"model": "InternVL"}))
    keys = np.frombuffer(b"".join(number.to_bytes(16, "big") for number in range(2)), "S16")
    write_shard(
        cache.folder,
        Entries.of(keys, LOG_PROBS, logps=[-1.0, -2.0], tokens=4),
        Fingerprint({"model weights": "w"}, {}, {"model": "InternVL"}),
    )
    return tmp_path


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["data", "validate", "pairs.jsonl"], {"pairs": 3, "may_start": True, "notes": {"duplicate": 1}}),
        (["data", "stats", "pairs.jsonl"], {"pairs": 3, "prompts": 2, "images": 0}),
        (["data", "show", "pairs.jsonl", "--limit", "1"], {"html": None}),
        (["data", "convert", "pairs.jsonl", "out.parquet"], {"path": "out.parquet", "pairs": 3, "checked": True}),
        (["data", "mix", "mixture.yaml"], {"sources": [{"name": "pairs", "pairs": 3, "taken": 3, "eval": 0}], "written": []}),
        (["data", "split", "pairs.jsonl", "a.jsonl", "b.jsonl", "--eval-size", "1"], {}),
        (["data", "dedupe", "pairs.jsonl", "out.jsonl"], {"exact": 1, "near": 0, "removed": "out.jsonl.removed.jsonl"}),
        (["cache", "inspect", "cache"], {}),
        (["cache", "verify", "cache"], {}),
        (["cache", "prune", "cache", "--dry-run"], {"dry_run": True}),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_json_is_one_document_and_all_of_stdout(folder, capfd, words, expected):
    assert main([*words, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert {name: found[name] for name in expected} == expected


def test_json_and_text_say_the_same(folder, capsys):
    main(["data", "show", "pairs.jsonl", "--json", "--id", "b"])
    (record,) = json.loads(capsys.readouterr().out)["records"]
    assert record["id"] == "b" and record["texts"]["chosen"] == "So."
    main(["cache", "inspect", "cache", "--json"])
    (found,) = json.loads(capsys.readouterr().out)["folders"]
    assert (found["completions"], found["shards"], found["about"]["model"]) == (2, 1, "InternVL")


def test_what_libraries_and_children_print_is_not_in_the_json(folder):
    """Python's stdout and the file descriptor, as of a child process."""
    program = (
        "import os, sys\nfrom mpo.commands import main\n"
        "from mpo.commands.data import show\nfrom mpo.commands.outcome import Report\n"
        "def noisy(args):\n    print('from Python')\n    os.system('echo from a child')\n    return Report('', {'records': []})\n"
        "show.run = noisy\nsys.exit(main(['data', 'show', 'pairs.jsonl', '--json']))"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(shown.stdout) == {"records": []}
    assert "from Python" in shown.stderr and "from a child" in shown.stderr


# Exit statuses


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["data", "stats", "pairs.jsonl", "--num-proc", "0"], "--num-proc: .*'0'"),
        (["data", "show", "pairs.jsonl", "--limit", "-1"], "--limit: .*'-1'"),
        (["data", "show", "pairs.jsonl", "--seed", "1.5"], "--seed: .*'1.5'"),
        (["data", "dedupe", "pairs.jsonl", "x", "--threshold", "nan"], "--threshold: .*'nan'"),
        (["data", "dedupe", "pairs.jsonl", "x", "--threshold", "1.1"], "--threshold: .*'1.1'"),
        (["export", "a", "b", "--shard-gb", "0"], "--shard-gb: .*'0'"),
        (["generate", "a", "b", "--top-p", "0"], "--top-p: .*'0'"),
        (["generate", "a", "b", "--temperature", "inf"], "--temperature: .*'inf'"),
        (["generate", "a", "b", "--temprature", "1"], "--temprature.*'--temperature'"),
        (["data", "show", "pairs.jsonl", "--lim", "1"], "--lim.*'--limit'"),
        (["data", "validate", "pairs.jsonl", "--output", ""], "--output: .*empty"),
        (["data"], "ACTION"),
        (["dat"], "'dat'"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_wrong_usage_is_status_2(words, name, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.out == "" and re.search(name, said.err)


BAD_FILES = {
    "cut.jsonl": b'{"question": "Why?", "chosen": "So.", "rejected": "No."}\n{"question": "Wh',
    "latin.jsonl": '{"question": "\u00e9?", "chosen": "So.", "rejected": "No."}\n'.encode("latin-1"),
    "damaged.parquet": b"PAR1 and no more",
    "text.txt": b"Why?",
    "latin.yaml": "sources: \u00e9".encode("latin-1"),
    "cut/config.json": b'{"model_type": ',
    "latin/config.json": '{"model_type": "\u00e9"}'.encode("latin-1"),
    "list/config.json": b"[]",
    "adapter/adapter_config.json": b"[]",
}
INPUTS = ["none.jsonl", "org/none", "empty", "cut.jsonl", "latin.jsonl", "damaged.parquet", "text.txt", "latin.yaml"]
MODELS = ["org/none", "./none", "empty", "cut", "latin", "list", "pairs.jsonl", "adapter"]


@pytest.fixture
def bad(folder):
    (folder / "empty").mkdir()
    for name, data in BAD_FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def refused(capfd, *words) -> str:
    """The one message of a command that is refused with status 2 and nothing on stdout."""
    assert main(list(words)) == 2, words
    said = capfd.readouterr()
    lines = [line for line in said.err.splitlines() if line.startswith("mpo: error: ")]
    assert said.out == "" and len(lines) == 1 and "Traceback" not in said.err, said
    return lines[0]


@pytest.mark.parametrize("path", INPUTS)
def test_a_data_set_that_cannot_be_read_is_one_message(bad, capfd, path):
    for words in (["stats", path], ["show", path, "--json"], ["convert", path, "out.jsonl"], ["dedupe", path, "out.jsonl"]):
        assert path in refused(capfd, "data", *words)
    if path != "cut.jsonl" and path != "latin.jsonl":  # whose lines are findings
        assert path in refused(capfd, "data", "validate", path)
    assert not list(bad.glob("out*"))


@pytest.mark.parametrize("model", MODELS)
def test_a_model_that_cannot_be_read_is_one_message(bad, capfd, model):
    """Above all a name of the Hub without network, by every command that takes a model."""
    name = model.removeprefix("./")
    for words in (["data", "show", "pairs.jsonl", "--model", model], ["generate", model, "Why?"]):
        assert name in refused(capfd, *words), words
    for words in (["export", model, "out"], ["convert", model, "out"]):
        assert name in refused(capfd, *words), words
    for more in ([], ["dry_run=true"]) if name in ("org/none", "latin") else ():
        words = [f"model.name_or_path={model}", "data.path=pairs.jsonl", "run_dir=run", "trainer.use_cpu=true", *more]
        said = refused_by_train(capfd, *words)
        assert name in said and ("hf download org/none" in said or model != "org/none")
    assert not (bad / "out").exists()


def refused_by_train(capfd, *words) -> str:
    assert main(["train", *words]) == 2
    err = capfd.readouterr().err
    assert "Traceback" not in err and "mpo: error: " in err
    return err.split("mpo: error: ")[1]


@pytest.mark.parametrize(
    "words", [["--config-dir", "none"], ["nonsense"], ["run_dir=pairs.jsonl", "model.name_or_path=x", "data.path=x"]]
)
def test_what_hydra_refuses_is_one_message(bad, capfd, words):
    assert words[-1] in refused_by_train(capfd, *words) or "pairs.jsonl" in words[0]


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["data", "validate", "pairs.jsonl", "--output", "empty"], "--output=empty"),
        (["data", "validate", "pairs.jsonl", "--output", "text.txt"], "--output=text.txt"),
        (["data", "validate", "mixture.yaml", "--output", "pairs.jsonl"], "--output=pairs.jsonl"),
        (["data", "validate", "pairs.jsonl", "--output", "text.txt/a/b"], "text.txt is not a folder"),
        (["data", "stats", "mixture.yaml", "--html", "pairs.jsonl"], "--html=pairs.jsonl"),
        (["data", "convert", "pairs.jsonl", "pairs.jsonl"], "TARGET=pairs.jsonl"),
        (["data", "convert", "pairs.jsonl", "text.txt/x.jsonl"], "TARGET=text.txt/x.jsonl"),
        (["data", "mix", "mixture.yaml", "pairs.jsonl"], "TARGET=pairs.jsonl"),
        (["data", "split", "pairs.jsonl", "a.jsonl", "./a.jsonl"], "TARGET and EVAL"),
        (["data", "dedupe", "pairs.jsonl", "a.jsonl", "--removed", "a.jsonl"], "TARGET and --removed"),
        (["export", "cut", "text.txt/x"], "TARGET=text.txt/x"),
        (["convert", "cut", "text.txt/x"], "TARGET=text.txt/x"),
        (["demo", "--output", "text.txt"], "--output=text.txt"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_outputs_are_refused_before_any_work(bad, capfd, words, name):
    before = {path: path.read_bytes() for path in bad.rglob("*") if path.is_file()}
    assert name in refused(capfd, *words)
    assert {path: path.read_bytes() for path in bad.rglob("*") if path.is_file()} == before


def test_an_own_output_is_replaced(folder, capsys):
    for _ in range(2):
        assert main(["data", "validate", "pairs.jsonl", "--num-proc", "1"]) == 0
        assert main(["data", "show", "pairs.jsonl", "--html", "show.html"]) == 0


def test_a_full_disk_is_status_1(folder, capsys):
    assert main(["data", "show", "pairs.jsonl", "--html", "/dev/full"]) == 1
    assert "mpo: error: " in capsys.readouterr().err


def test_ctrl_c_ends_cleanly(folder, capsys, monkeypatch):
    def stopped(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("mpo.commands.data.show.run", stopped)
    assert main(["data", "show", "pairs.jsonl"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_terminal_that_lacks_a_character_gets_it_escaped(folder):
    """Also of a file name that is not UTF-8."""
    program = (
        "import sys\nfrom mpo.commands import main\nfrom mpo.commands.data import show\nfrom mpo.commands.outcome import Report\n"
        "show.run = lambda args: Report('caf\\u00e9 \\udcff')\nsys.exit(main(['data', 'show', 'pairs.jsonl']))"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert shown.stdout == "caf\\xe9 \\udcff\n"


def test_a_closed_pipe_ends_cleanly(folder):
    """The reader is gone before the first line, as with ``| head``."""
    program = (
        "import sys\nfrom mpo.commands import main\nfrom mpo.commands.data import show\nfrom mpo.commands.outcome import Report\n"
        "show.run = lambda args: Report('text')\nsys.exit(main(['data', 'show', 'pairs.jsonl']))"
    )
    reading, writing = os.pipe()
    os.close(reading)
    shown = subprocess.run([sys.executable, "-c", program], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert shown.returncode == 1 and shown.stderr == ""


def test_ctrl_c_ends_forked_processes_without_tracebacks(folder):
    """Ctrl-C reaches the whole process group, data workers included; a daemon that sleeps stands for one."""
    program = (
        "import multiprocessing, sys, time\nfrom mpo.commands import main\nfrom mpo.commands.data import show\n"
        "def run(args):\n"
        "    multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,), daemon=True).start()\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
        "show.run, sys.argv[1:] = run, ['data', 'show', 'pairs.jsonl']\n"
        "sys.exit(main())\n"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    heeds = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # which a shell's background jobs ignore
    running = subprocess.Popen([sys.executable, "-c", program], start_new_session=True, preexec_fn=heeds, **pipes)
    assert running.stdout.readline() == "ready\n"
    os.killpg(running.pid, signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert (running.returncode, errors) == (130, "\nmpo: interrupted\n")


def test_a_command_imports_no_other_command():
    """Their imports (Hydra's, torch's) are what makes a command slow to start; an unknown name needs all, for the list of names."""
    program = (
        "import sys\nfrom mpo.commands import command_line\ncommand_line(['review', 'a.jsonl']).parse_args(['review', 'a.jsonl'])\n"
        "found = {name for name in sys.modules if name.startswith('mpo.commands.')}\n"
        "print(*sorted(found), *({'hydra', 'torch', 'datasets'} & {*sys.modules}))"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert shown.stdout.split() == ["mpo.commands.flags", "mpo.commands.outcome", "mpo.commands.review"]
    assert {name for name in ALL if name.count(" ") == 1} == {f"mpo {name}" for name in choices(command_line(["unknown"]))}
    assert [*choices(command_line(["data", "stats", "a.jsonl"]))] == ["data"]


@pytest.mark.parametrize(("words", "name"), [(["reveiw"], "review"), (["data", "valdate"], "validate")])
def test_a_mistyped_command_is_named(capsys, words, name):
    with pytest.raises(SystemExit) as exit:
        main(words)
    assert exit.value.code == 2 and f"Did you mean '{name}'?" in capsys.readouterr().err


def choices(parser):
    return next(action.choices for action in parser._actions if action.nargs == "A...")

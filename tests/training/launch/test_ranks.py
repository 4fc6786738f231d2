"""`mpo train launch.nproc_per_node=2`: the same weights as one process, and what happens when a rank is killed.

Launcher and ranks are processes of Python where a rank is killed. Elsewhere the launcher runs in the test's process, and the ranks
in forks of one that has imported everything (`zygote`).
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from small_runs import difference, in_fork
from support import make_image
from torch.distributed.elastic.utils.distributed import get_free_port
from torch.distributed.run import main as torchrun

from mpo.commands import main
from mpo.models.small import small_internvl
from mpo.training.checkpoint import latest_checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def command(tmp_path_factory, processor):
    folder = tmp_path_factory.mktemp("job")
    small_internvl(processor, hidden_size=32, vision_hidden_size=32).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    lines = []
    for index in range(8):
        make_image(index).save(folder / f"{index}.png")
        completions = {"chosen": f"It is {index}.", "rejected": "It is not that, I think."}
        lines.append(json.dumps({"image": f"{index}.png", "question": "What is it?", **completions}))
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    settings = ["use_cpu=true", "dataloader_num_workers=0", "global_batch_size=4", "learning_rate=1e-3", "save_steps=2"]
    paths = [f"model.name_or_path={folder / 'model'}", f"data.path={folder / 'pairs.jsonl'}"]
    return ["train", *paths, *(f"trainer.{setting}" for setting in settings)]


@pytest.fixture(autouse=True)
def handlers():
    """torchrun takes SIGTERM and SIGINT for itself."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_killed_rank_ends_the_job_and_the_same_command_resumes(command, tmp_path, capfd, interpreter, monkeypatch):
    """Rank 1 is killed in training: the job ends promptly with the reason; the same command resumes from the last checkpoint.

    One process that resumes from there ends with the same weights as the two ranks.
    """
    here = tmp_path / "run"
    command = [*command, f"run_dir={here}", "launch.nproc_per_node=2"]
    program = [sys.executable, "-m", "mpo", *command, "trainer.max_steps=2000"]
    job = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    killed = None
    while killed is None and job.poll() is None:
        time.sleep(0.05)
        if (here / "checkpoint-2" / "trainer_state.json").exists():
            ranks = [child for child in psutil.Process(job.pid).children(recursive=True) if child.environ().get("RANK") == "1"]
            killed = ranks[0].kill() or time.monotonic()
    _, errors = job.communicate(timeout=100)
    assert time.monotonic() - killed < 60  # not the half hour that a collective waits for a lost rank
    assert job.returncode == 1
    assert "rank 1 of 2 was killed by SIGKILL" in errors
    newest = Path(latest_checkpoint(here))
    assert str(newest) in errors
    step = int(newest.name.split("-")[-1])
    partial = here / f"checkpoint-{step + 1}"  # as left by a rank that is killed while it writes
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"cut")
    (partial / "trainer_state.json").write_text('{"global_st')
    alone = tmp_path / "alone"
    shutil.copytree(here, alone)
    weights = [load_file(newest / "model.safetensors")]
    monkeypatch.setenv("PYTHON_EXEC", interpreter)
    for folder, ranks in ((here, 2), (alone, 1)):
        capfd.readouterr()
        words = [f"run_dir={folder}", f"launch.nproc_per_node={ranks}", f"trainer.max_steps={step + 2}"]
        assert main([*command[:-2], *words]) == 0
        said = capfd.readouterr().out
        assert f"resuming from {folder / newest.name}" in said and said.count("mpo train: done") == 1
        assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == step + 2
        weights.append(load_file(folder / "model.safetensors"))
    assert difference(*weights[1:]) < 1e-6 < difference(*weights[:2])
    assert not list(tmp_path.glob("*/resolved.yaml.*"))


def test_a_rank_says_whose_record_is_wrong(command, tmp_path, capfd, interpreter, monkeypatch):
    """A user's mistake that only the ranks find is one message with exit status 2, without tracebacks."""
    monkeypatch.setenv("PYTHON_EXEC", interpreter)
    wrong = tmp_path / "pairs.jsonl"
    wrong.write_text(json.dumps({"image": "missing.png", "question": "?", "chosen": "a", "rejected": "b"}))
    assert main([*command, f"run_dir={tmp_path / 'run'}", "launch.nproc_per_node=2", f"data.path={wrong}"]) == 2
    errors = capfd.readouterr().err
    assert "mpo: error: rank " in errors
    assert "missing.png" in errors
    assert "Traceback" not in errors


def test_started_by_torchrun(command, tmp_path, monkeypatch, capfd, interpreter):
    """Ranks started by another launcher need an explicit run_dir."""
    monkeypatch.setenv("PYTHON_EXEC", interpreter)
    monkeypatch.chdir(tmp_path)

    def a_rank():
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(get_free_port()))
        AcceleratorState._reset_state(reset_partial_state=True)
        assert main(command) == 2

    assert in_fork(a_rank) == 0
    assert "run_dir=" in capfd.readouterr().err
    torchrun(["--standalone", "--nproc-per-node=2", "--module", "mpo", *command, f"run_dir={tmp_path / 'run'}"])
    assert (tmp_path / "run" / "model.safetensors").exists()

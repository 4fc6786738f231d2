"""`mpo train launch.nproc_per_node=2`: the same weights as one process, and what happens when a rank is killed."""

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file
from small_runs import difference
from support import make_image

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
    return [
        *(sys.executable, "-m", "mpo", "train", f"model.name_or_path={folder / 'model'}", f"data.path={folder / 'pairs.jsonl'}"),
        *(f"trainer.{setting}" for setting in settings),
    ]


def run(command, **options):
    return subprocess.run(command, capture_output=True, text=True, timeout=180, **options)


def test_two_ranks_train_as_one_process(command, tmp_path):
    for ranks in (1, 2):
        done = run([*command, f"run_dir={tmp_path / str(ranks)}", f"launch.nproc_per_node={ranks}"])
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("mpo train: done") == 1
    one, two = (load_file(tmp_path / ranks / "model.safetensors") for ranks in "12")
    assert difference(one, two) < 1e-6
    assert not list(tmp_path.glob("*/resolved.yaml.*"))


def test_a_killed_rank_ends_the_job_and_the_same_command_resumes(command, tmp_path):
    """Rank 1 is killed in training: the job ends promptly with the reason; the same command resumes from the last checkpoint."""
    here = tmp_path / "run"
    command = [*command, f"run_dir={here}", "launch.nproc_per_node=2"]
    job = subprocess.Popen([*command, "trainer.max_steps=2000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
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
    newest = latest_checkpoint(here)
    assert str(newest) in errors
    step = int(newest.split("-")[-1])
    partial = here / f"checkpoint-{step + 1}"  # as left by a rank that is killed while it writes
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"cut")
    (partial / "trainer_state.json").write_text('{"global_st')
    done = run([*command, f"trainer.max_steps={step + 2}"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"resuming from {newest}" in done.stdout
    assert json.loads((here / "trainer_state.json").read_text())["global_step"] == step + 2


def test_a_rank_says_whose_record_is_wrong(command, tmp_path):
    """A user's mistake that only the ranks find is one message with exit status 2, without tracebacks."""
    wrong = tmp_path / "pairs.jsonl"
    wrong.write_text(json.dumps({"image": "missing.png", "question": "?", "chosen": "a", "rejected": "b"}))
    done = run([*command, f"run_dir={tmp_path / 'run'}", "launch.nproc_per_node=2", f"data.path={wrong}"])
    assert done.returncode == 2
    assert "mpo: error: rank " in done.stderr
    assert "missing.png" in done.stderr
    assert "Traceback" not in done.stderr


def test_started_by_torchrun(command, tmp_path):
    """Ranks started by another launcher need an explicit run_dir."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *command[1:]]
    done = run(torchrun, cwd=tmp_path)
    assert done.returncode != 0
    assert "run_dir=" in done.stderr
    done = run([*torchrun, f"run_dir={tmp_path / 'run'}"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert (Path(tmp_path) / "run" / "model.safetensors").exists()

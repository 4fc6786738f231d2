"""The demo end to end, small: every stage, the report, and resuming after an interruption.

`.ci/run` runs `mpo demo --quick` in its own size.
"""

import contextlib
import io
import json
import re
import shutil
from dataclasses import replace

import pytest

from mpo.commands import main
from mpo.demo import run
from mpo.demo.folder import DemoFolder, DemoSettings, quick_settings
from mpo.demo.report import summarize
from mpo.demo.run import STAGES, run_demo
from mpo.io import read_json_lines
from mpo.pipelines.mmpr.verify import judge
from mpo.schema import Question

TINY = DemoSettings(
    worked_sources=50,
    question_sources=200,
    worked_examples=96,
    questions=60,
    eval_questions=20,
    digits_per_image=2,
    hidden_size=64,
    layers=2,
    warm_epochs=26,
    warm_learning_rate=4e-3,
    responses_per_question=8,
    mpo_overrides=[
        "trainer.max_steps=4",
        "trainer.save_steps=1",
        "trainer.logging_steps=1",
        "trainer.global_batch_size=4",
        "trainer.per_device_train_batch_size=4",
    ],
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A tiny demo, from the command line: its folder, its progress, and what the command printed."""
    folder, printed = DemoFolder(tmp_path_factory.mktemp("tiny") / "demo"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr("mpo.demo.folder.quick_settings", lambda seed: replace(TINY, seed=seed))
        assert main(["demo", "--quick", "--output", str(folder.root)]) == 0
    return folder, folder.read_progress(), printed.getvalue()


def test_settings_survive_the_disk(tmp_path):
    quick_settings(3).write(tmp_path / "settings.json")
    assert DemoSettings.read(tmp_path / "settings.json") == quick_settings(3)


def test_help_tells_the_stages(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--quick" in text and "MPO" in text and "report.html" in text


def test_a_folder_with_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("")
    assert main(["demo", "--output", str(tmp_path), "--restart"]) == 2
    assert f"--output={tmp_path}" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.slow
class TestTinyDemo:
    def test_every_stage_is_timed_and_done(self, finished):
        _, progress, _ = finished
        assert list(progress) == [stage.name for stage in STAGES]
        assert all(stage["done"] and stage["seconds"] >= 0 for stage in progress.values())

    def test_everything_it_names_is_there(self, finished):
        folder, *_ = finished
        for stage in STAGES:
            assert (folder.root / stage.made).exists()
        for model in (folder.warm, folder.mpo, folder.sft):
            assert (model / "model.safetensors").is_file() and (model / "processor_config.json").is_file()

    def test_samples_belong_to_questions(self, finished):
        folder, *_ = finished
        questions, samples = read_json_lines(folder.lines("questions")), read_json_lines(folder.samples)
        assert [line["id"] for line in samples] == [line["id"] for line in questions]
        assert all(len(line["responses"]) == TINY.responses_per_question for line in samples)

    def test_pairs_are_mmpr_lines_about_question_images(self, finished):
        folder, progress, _ = finished
        pairs = read_json_lines(folder.pairs)
        assert len(pairs) == progress["pair"]["numbers"]["pairs_total"] > 0
        for pair in pairs:
            assert pair["image"].startswith("data/questions/") and (folder.root / pair["image"]).is_file()
            known = Question([], ground_truths=[pair["answer_gt"]])
            assert judge(pair["chosen"], known).verdict == "correct"
            assert judge(pair["rejected"], known).verdict == pair["rejected_meta"]["negative"]

    def test_the_report_stands_alone_and_shows_everything(self, finished):
        folder, progress, _ = finished
        page = folder.report.read_text()
        assert set(re.findall(r"(?:src|href)=.(.{5})", page)) == {"data:"} and "url(" not in page
        assert page.count("<figure") == 4
        shown = min(12, len({pair["image"] for pair in read_json_lines(folder.pairs)}))
        assert page.count("<article>") == shown
        for stage in ("before", "control", "after"):
            assert f"{100 * progress[stage]['numbers']['correct'] / TINY.eval_questions:.1f} %" in page
        for word in ("torch", "transformers", "trl", "seed", "McNemar"):
            assert word in page

    def test_the_log_has_every_term(self, finished):
        folder, *_ = finished
        log = folder.log()["log_history"]
        steps = [entry for entry in log if "loss" in entry]
        assert [entry["step"] for entry in steps] == [1, 2, 3, 4]
        for key in (
            "loss/sigmoid",
            "loss/bco_pair",
            "loss/sft",
            "rewards/chosen",
            "rewards/rejected",
            "rewards/margins",
            "reward_shift",
        ):
            assert all(key in entry for entry in steps)

    def test_running_again_does_nothing(self, finished):
        folder, progress, _ = finished
        before = {
            path: path.stat().st_mtime_ns for path in folder.root.rglob("*") if path.is_file() and path.name != "settings.json"
        }
        assert run_demo(folder.root, TINY) == progress
        assert all(path.stat().st_mtime_ns == changed for path, changed in before.items())

    def test_other_settings_need_a_restart(self, finished):
        folder, *_ = finished
        with pytest.raises(ValueError, match="--restart"):
            run_demo(folder.root, quick_settings(0))

    def test_the_command_says_start_control_and_mpo(self, finished):
        folder, progress, printed = finished
        assert re.search(r"warmed-up model +\d+\.\d %.*\n +SFT \(control\) +\d+\.\d %.*\n +MPO +\d+\.\d %", printed)
        assert summarize(progress) in printed and str(folder.report) in printed

    def test_the_command_run_again_gives_json(self, finished, monkeypatch, capfd):
        folder, progress, _ = finished
        monkeypatch.setattr("mpo.demo.folder.quick_settings", lambda seed: replace(TINY, seed=seed))
        assert main(["demo", "--quick", "--output", str(folder.root), "--json"]) == 0
        found = json.loads(capfd.readouterr().out)
        assert list(found["stages"]) == list(progress) and found["report"].endswith("report.html")

    def test_interrupted_twice_it_ends_with_the_same_result(self, finished, tmp_path, monkeypatch):
        """Interrupted after sampling and after the second checkpoint of MPO training: the same numbers and weights as without.

        It begins with the images and the warmed-up model of the other demo.
        """
        whole, progress, _ = finished
        folder = DemoFolder(tmp_path / "demo")
        for made in (whole.data, whole.warm):
            shutil.copytree(made, folder.root / made.name)
        shutil.copy(whole.root / "settings.json", folder.root)
        folder.write_progress({stage.name: progress[stage.name] for stage in STAGES[:2]})
        stages = {stage.name: stage for stage in STAGES}

        def interrupt(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(run, "STAGES", (*STAGES[:4], run.Stage("pair", "", interrupt, "")))
        with pytest.raises(KeyboardInterrupt):
            run_demo(folder.root, TINY)

        monkeypatch.setattr(run, "STAGES", STAGES)
        from mpo.training.mpo import MPOTrainer

        step = MPOTrainer.training_step

        def interrupt_at_step_2(trainer, *args, **kwargs):
            if trainer.state.global_step == 2:
                raise KeyboardInterrupt
            return step(trainer, *args, **kwargs)

        monkeypatch.setattr(MPOTrainer, "training_step", interrupt_at_step_2)
        with pytest.raises(KeyboardInterrupt):
            run_demo(folder.root, TINY)
        assert not folder.read_progress()["mpo"]["done"]
        assert (folder.mpo / "checkpoint-2").is_dir()

        monkeypatch.setattr(MPOTrainer, "training_step", step)
        resumed = run_demo(folder.root, TINY)
        assert {name: stage["numbers"] for name, stage in resumed.items() if name != "report"} == {
            name: stage["numbers"] for name, stage in progress.items() if name != "report"
        }
        assert list(stages) == list(resumed)
        for file in ("samples.jsonl", "pairs.jsonl", "responses_after.jsonl", "mpo/model.safetensors"):
            assert (folder.root / file).read_bytes() == (whole.root / file).read_bytes()

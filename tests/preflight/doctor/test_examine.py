"""Checks run in a separate process, which imports the fake package of these tests from a file."""

import pytest

from mpo.preflight.doctor import TRACEBACK, Finding, examine, without_ranks


@pytest.fixture
def fake_psutil(tmp_path, monkeypatch):
    """A psutil that the check of the machine imports; the check of the Hub does not."""

    def write(code):
        (tmp_path / "psutil.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return write


def both(tmp_path):
    machine, hub = examine(["Machine", "Hugging Face Hub"], tmp_path)
    assert (machine.title, hub.title) == ("Machine", "Hugging Face Hub")
    assert hub.findings[0].name == "access" and "HF_HUB_OFFLINE" in hub.findings[0].value  # whatever the other check found
    return machine.findings


def test_sections_come_in_order(tmp_path):
    assert both(tmp_path)[0].name == "memory"


def test_a_crash_of_the_interpreter_is_a_finding(tmp_path, fake_psutil):
    fake_psutil("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)")
    (found,) = both(tmp_path)
    assert found.status == "problem" and "SIGSEGV" in found.value


def test_an_exit_is_a_finding(tmp_path, fake_psutil):
    fake_psutil("import os\nos._exit(7)")
    (found,) = both(tmp_path)
    assert "status 7" in found.value


def test_a_check_that_hangs_is_a_finding(tmp_path, fake_psutil):
    fake_psutil("import time\ntime.sleep(600)")
    (machine,) = examine(["Machine"], tmp_path, seconds=3)
    assert machine.findings == (Finding("this check", "took longer than 3 s", "problem", TRACEBACK),)


def test_a_check_that_fails_is_a_finding_and_its_traceback_is_there_for_who_asks(tmp_path, fake_psutil, monkeypatch, capfd):
    fake_psutil("raise OSError('psutil is ill')")
    found = both(tmp_path)[-1]
    assert found.name == "this check" and found.status == "note" and found.value == "could not be checked: OSError: psutil is ill"
    assert capfd.readouterr() == ("", "")
    monkeypatch.setenv("MPO_TRACEBACK", "1")
    both(tmp_path)
    assert "Traceback" in capfd.readouterr().err


def test_what_packages_print_does_not_get_in_between(tmp_path, fake_psutil, capfd):
    fake_psutil("import os\nprint('hello', flush=True)\nos.write(1, b'{}')\nraise ImportError('x')")
    assert both(tmp_path)[0].value == "could not be checked: ImportError: x"
    assert capfd.readouterr() == ("", "")


def test_a_rank_of_a_job_is_examined_alone():
    job = {
        "RANK": "3",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "3",
        "MASTER_ADDR": "x",
        "OMPI_COMM_WORLD_SIZE": "8",
        "ACCELERATE_USE_FSDP": "1",
    }
    assert without_ranks({**job, "PATH": "/bin", "HF_HOME": "/x"}) == {"PATH": "/bin", "HF_HOME": "/x"}

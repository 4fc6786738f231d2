"""Private data is masked in the report."""

from pathlib import Path

import pytest

from mpo.preflight.doctor import masked


@pytest.fixture
def ann(tmp_path, monkeypatch):
    """A user with a home folder that is a link."""
    real = tmp_path / "disk" / "ann"
    real.mkdir(parents=True)
    home = tmp_path / "home"
    home.symlink_to(real)
    monkeypatch.setenv("HOME", str(home))
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "ann")
    return home


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("{home}/runs: 3 GiB", "~/runs: 3 GiB"),
        ("{real}/runs", "~/runs"),
        ("in {home}", "in ~"),
        ("{home}2/runs", "{home}2/runs"),  # another folder
        ("/scratch/ann/runs and /scratch/anna", "/scratch/~/runs and /scratch/anna"),
        ("/data/ann", "/data/~"),
        ("ann cannot", "ann cannot"),  # a word
        ("http://ann:secret@proxy.example:8080 failed", "http://***@proxy.example:8080 failed"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("token hf_abcdefghijklmnopqrstuvwxyzABCDEF is bad", "token *** is bad"),
    ],
)
def test_masks(text, shown, ann):
    text, shown = (words.format(home=ann, real=ann.resolve()) for words in (text, shown))
    assert masked(text) == shown


def test_values_of_secret_variables_are_masked_and_of_others_not(ann):
    environ = {"WANDB_API_KEY": "0123456789abcdef", "MY_PASSWORD": "hunter2222", "SHORT_TOKEN": "1", "HF_HOME": "/larger/disk"}
    text = "0123456789abcdef and hunter2222, 1 /larger/disk"
    assert masked(text, environ) == "*** and ***, 1 /larger/disk"


def test_a_user_without_home_or_name(monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    monkeypatch.setattr("getpass.getuser", lambda: (_ for _ in ()).throw(KeyError("uid not found")))
    assert masked("/data/x") == "/data/x"

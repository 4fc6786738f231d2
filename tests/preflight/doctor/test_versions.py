"""Installed versions against those of mpo-trainer's metadata and the tested ones."""

from importlib.metadata import requires

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from mpo.preflight.packages import TESTED, install_command, installed, judge, supported


def test_the_lower_bounds_are_the_package_metadata():
    lines = requires("mpo-trainer")
    for name, asked in supported().items():
        if asked.extra is None:
            assert f"{name}{asked.versions}" in lines
    assert supported()["bitsandbytes"].extra == "qlora"
    assert supported()["flash-attn"].extra == "flash"


def test_what_was_tested_is_supported():
    for name, tested in TESTED.items():
        assert supported()[name].versions.contains(tested), name


def test_what_is_installed_here_is_fine():
    for name in set(TESTED) | {"torchvision", "hydra-core", "pillow"}:
        found = judge(name, installed(name), supported()[name].versions)
        assert found.status == "ok", found


@pytest.mark.parametrize(
    ("there", "status", "said"),
    [
        ("5.16.9", "problem", "5.16.9 is not supported (>=5.17, tested up to 5.24)"),
        ("5.17.0", "ok", "5.17.0 (>=5.17, tested up to 5.24)"),
        ("5.24.3+local", "ok", "5.24.3+local (>=5.17, tested up to 5.24)"),  # a patch release of a tested one
        ("5.25.0.dev0", "note", "5.25.0.dev0 is newer than tested (>=5.17, tested up to 5.24)"),
        ("6.0.0", "note", "6.0.0 is newer than tested (>=5.17, tested up to 5.24)"),
    ],
)
def test_old_is_a_problem_and_new_a_note(there, status, said, monkeypatch):
    monkeypatch.setattr("mpo.preflight.packages.TESTED", {"transformers": "5.24"})
    found = judge("transformers", there, SpecifierSet(">=5.17"))
    assert (found.status, found.value) == (status, said)
    assert found.fix == ("pip install 'transformers>=5.17'" if status == "problem" else "")


def test_the_command_for_a_package_carries_its_bound_or_its_extra():
    assert install_command("trl") == f"pip install 'trl{supported()['trl'].versions}'"
    assert install_command("flash-attn") == "pip install 'mpo-trainer[flash]'"
    assert install_command("liger-kernel") == "pip install 'mpo-trainer[liger]'"


def test_a_package_that_is_not_there_has_no_version():
    assert installed("no-such-package-anywhere") is None
    assert Version(installed("torch")) >= Version("2.11")

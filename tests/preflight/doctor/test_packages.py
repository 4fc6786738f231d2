"""Packages that are installed, missing, too old, or broken."""

import importlib.metadata

import pytest

from mpo.preflight.packages import NAMES, PURPOSES, fix_import, import_failure, optional, private_names, required, supported


def by_name(findings):
    return {finding.name: finding for finding in findings}


@pytest.fixture
def versions(monkeypatch):
    """Replaces installed versions; None: not installed."""
    changed = {}

    def version(name):
        if changed.get(name, "") is None:
            raise importlib.metadata.PackageNotFoundError(name)
        if isinstance(changed.get(name), Exception):
            raise changed[name]
        return changed.get(name) or importlib.metadata.version(name)

    monkeypatch.setattr("mpo.preflight.packages.version", version)
    return changed


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """Replaces a package's module by a real file with this code."""

    def write(package, code):
        module = f"broken_{package.replace('-', '_')}"
        (tmp_path / f"{module}.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setitem(NAMES, package, f"{module}:thing")

    return write


def test_what_a_run_needs_is_here_and_imports():
    found = by_name(required())
    always = [name for name, asked in supported().items() if asked.extra is None]
    assert list(found) == ["mpo-trainer", "Python", *always] and {"torch", "trl", "pydantic"} <= set(always)
    assert [finding for finding in found.values() if finding.status == "problem"] == []
    for name in always:
        assert importlib.metadata.version(name) in found[name].value


def test_a_missing_package_is_a_problem_and_a_missing_option_is_not(versions):
    versions.update({"trl": None, "bitsandbytes": None, "liger-kernel": None, "flash-attn": None})
    trl = by_name(required())["trl"]
    assert (trl.status, trl.value, trl.fix) == ("problem", "not installed", "pip install 'trl>=1.16'")
    options = by_name(optional())
    assert options["bitsandbytes"].status == "ok" and "QLoRA" in options["bitsandbytes"].value
    assert options["bitsandbytes"].fix == "pip install 'mpo-trainer[qlora]'"
    assert options["liger-kernel"].fix == "pip install 'mpo-trainer[liger]'"
    assert options["flash-attn"].fix == "pip install --no-build-isolation 'mpo-trainer[flash]'"


def test_too_old_and_newer_than_tested(versions):
    versions.update({"transformers": "5.16.2", "peft": "0.99.0", "bitsandbytes": "0.40.0"})
    found = {**by_name(required()), **by_name(optional())}
    assert found["transformers"].status == "problem" and found["transformers"].fix == "pip install 'transformers>=5.17'"
    assert found["peft"].status == "note" and "0.99.0 is newer than tested" in found["peft"].value
    assert found["bitsandbytes"].status == "problem" and found["bitsandbytes"].fix == "pip install 'bitsandbytes>=0.46'"


def test_a_broken_torchvision_is_fixed_by_the_one_that_belongs_to_this_torch(versions, broken):
    """torchvision 0.(15 + x) belongs to torch 2.x: 0.26 to 2.11."""
    versions["torch"] = "2.11.0+cu128"
    broken("torchvision", "raise RuntimeError('operator torchvision::nms does not exist')")
    found = by_name(required())["torchvision"]
    assert found.status == "problem" and found.value.endswith(": RuntimeError: operator torchvision::nms does not exist")
    assert found.fix == "pip install --force-reinstall --no-deps 'torchvision==0.26.*'"


def test_a_package_that_torchvision_breaks_is_fixed_by_torchvision(versions, broken):
    """transformers wraps the error; the finding shows the original one."""
    versions["torch"] = "2.14.1"
    inner = "    raise RuntimeError('operator torchvision::nms does not exist')"
    broken("trl", f"try:\n{inner}\nexcept RuntimeError as error:\n    raise ModuleNotFoundError('Could not import X') from error")
    found = by_name(required())["trl"]
    assert "RuntimeError: operator torchvision::nms" in found.value and "torchvision==0.29.*" in found.fix


def test_what_breaks_others_is_fixed_and_not_the_others(broken):
    for package in ("peft", "trl", "bitsandbytes"):
        broken(package, "raise OSError('libthing.so: cannot open shared object file')")
    found = {**by_name(required()), **by_name(optional())}
    version = importlib.metadata.version("bitsandbytes")
    for package in ("trl", "peft", "bitsandbytes"):
        assert found[package].status == "problem" and "libthing.so" in found[package].value
        assert found[package].fix == f"pip install --force-reinstall --no-deps bitsandbytes=={version}"


def test_an_option_that_is_installed_must_import(versions, broken):
    versions["flash-attn"] = "2.8.3"
    broken("flash-attn", "raise ImportError('flash_attn_2_cuda.so: undefined symbol:\\n _ZNK3c106SymInt')")
    found = by_name(optional())["flash-attn"]
    assert found.status == "problem" and "undefined symbol: _ZNK3c106SymInt" in found.value and "\n" not in found.value
    assert "--force-reinstall --no-build-isolation" in found.fix


def test_what_a_broken_import_lacks_is_installed(versions, broken):
    versions["accelerate"] = None
    broken("peft", "raise ModuleNotFoundError(\"No module named 'accelerate'\", name='accelerate.utils')")
    assert by_name(required())["peft"].fix == f"pip install 'accelerate{supported()['accelerate'].versions}'"
    error = ModuleNotFoundError("No module named 'some_thing'", name="some_thing.part")
    assert fix_import(error, "peft") == "pip install some-thing"


def test_two_packages_that_do_not_fit_are_upgraded_together():
    error = ImportError("cannot import name 'X' from 'transformers'", name="transformers")
    assert fix_import(error, "trl") == "pip install --upgrade trl transformers"


def test_any_other_damage_is_fixed_by_the_same_version_again():
    version = importlib.metadata.version("datasets")
    assert fix_import(SyntaxError("bad"), "datasets") == f"pip install --force-reinstall --no-deps datasets=={version}"
    assert fix_import(OSError("libcudart.so"), "torch") == "pip install --force-reinstall torch torchvision"


def test_a_package_that_leaves_python_on_import_does_not_take_the_doctor_along(broken):
    broken("deepspeed", "import sys; sys.exit('no CUDA')")
    assert "no CUDA" in str(import_failure("deepspeed"))


def test_every_package_of_every_extra_is_reported(versions):
    """Those of an extra that all work share its line; each that is missing has its own, with what installs it."""
    extras = set(importlib.metadata.metadata("mpo-trainer").get_all("Provides-Extra")) - {"dev"}
    assert set(PURPOSES) == extras | {"flash3"} and set(NAMES) <= set(supported())
    versions["stamina"] = None
    found = by_name(optional())
    assert f"math-verify {importlib.metadata.version('math-verify')}" in found["verify"].value
    assert (found["stamina"].status, found["stamina"].fix) == ("ok", "pip install 'mpo-trainer[server]'")
    assert [finding for finding in found.values() if finding.status == "problem"] == []
    lines = " ".join(finding.name + finding.value for finding in found.values())
    assert [name for name, asked in supported().items() if asked.extra and name not in lines] == []


def test_metadata_that_cannot_be_read_is_a_finding(versions):
    versions["pillow"] = KeyError("Version")
    found = by_name(required())
    assert found["pillow"].status == "note" and "could not be checked: KeyError" in found["pillow"].value
    assert found["hydra-core"].status == "ok"


def test_the_private_names_are_there_and_a_missing_one_is_a_problem(monkeypatch):
    assert list(private_names()) == []
    monkeypatch.delattr("trl.trainer.dpo_trainer.get_peft_model")
    (found,) = private_names()
    assert (found.name, found.status, found.fix) == ("trl", "problem", "pip install 'trl==1.16.*'")
    assert "trl.trainer.dpo_trainer.get_peft_model" in found.value

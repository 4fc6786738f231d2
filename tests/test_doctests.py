"""Every example in a docstring runs."""

import doctest
import importlib
import pkgutil

import pytest

import mpo

# The editable install maps losses to a separate folder, which a walk from mpo's folder does not find.
PACKAGES = [mpo, importlib.import_module("mpo.losses")]
MODULES = sorted(
    {package.__name__ for package in PACKAGES}
    | {info.name for package in PACKAGES for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")}
)


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # an example may save a file
    module = importlib.import_module(name)
    failures, _ = doctest.testmod(module)
    assert failures == 0


def test_there_are_some():
    finder = doctest.DocTestFinder(exclude_empty=True)
    examples = [test for name in MODULES for test in finder.find(importlib.import_module(name)) if test.examples]
    assert len(examples) >= 8

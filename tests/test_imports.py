"""Packages import in one direction (CONTRIBUTING names it): whoever needs a part needs nothing that stands above it."""

import ast
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = (
    ("losses",),
    ("figure", "io", "schema", "visible"),
    ("data", "models"),
    ("encoding",),
    ("batching",),
    ("generation", "verification"),
    ("pipelines",),
    ("evaluation",),
    ("training", "curation"),
    ("preflight", "demo", "review"),
    ("commands",),
)
LEVEL = {package: level for level, packages in enumerate(ORDER) for package in packages}


def imports(path):
    """Every module of mpo that a file imports, anywhere in it, but for type checkers alone."""
    tree = ast.parse(path.read_text())
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            skipped |= {id(inner) for statement in node.body for inner in ast.walk(statement)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.split(".")[0] == "mpo")
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "mpo":
            yield from (f"{node.module}.{name.name}" for name in node.names)


def files():
    for folder, package in ((ROOT / "mpo", ""), (ROOT / "losses", "losses")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield path, package or parts[0]


def test_every_package_has_its_level():
    assert {package for _, package in files()} - {"__init__", "__main__"} <= set(LEVEL)


def test_packages_import_downwards():
    wrong = []
    for path, package in files():
        if package == "__init__":
            continue
        above = len(ORDER) if package == "__main__" else LEVEL[package]
        for name in imports(path):
            other = [*name.split("."), ""][1]
            if other in LEVEL and other != package and LEVEL[other] >= above:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_no_modules_import_each_other():
    """A circle inside a package: the strongly connected components of the modules have one member each."""
    modules = {}
    for path, _ in files():
        parts = (*(("mpo",) if path.is_relative_to(ROOT / "losses") else ()), *path.relative_to(ROOT).with_suffix("").parts)
        modules[".".join(parts).removesuffix(".__init__")] = path
    edges = {}
    for module, path in modules.items():
        found = {name if name in modules else name.rpartition(".")[0] for name in imports(path)}
        edges[module] = sorted(found & set(modules) - {module, "mpo"})
    waiting = dict(edges)
    while free := [module for module, needed in waiting.items() if not any(other in waiting for other in needed)]:
        for module in free:
            del waiting[module]
    assert not waiting, f"these import each other, or from ones that do: {sorted(waiting)}"


@pytest.mark.parametrize("package", ["losses"])
def test_losses_import_torch_alone(package):
    code = (
        f"import sys, mpo.{package}; print(*{{name.split('.')[0] for name in sys.modules}} & {{'transformers', 'trl', 'datasets'}})"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


def test_what_scripts_and_tests_import_is_there():
    """Nothing runs most of the benchmarks: a name that has moved would be missed only by the next who measures."""
    missing = []
    for folder in ("benchmarks", "examples", "tests", ".ci"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for name in imports(path):
                try:
                    pkgutil.resolve_name(name)
                except (ImportError, AttributeError) as error:
                    missing.append(f"{path.relative_to(ROOT)} imports {name}: {error}")
    assert not missing

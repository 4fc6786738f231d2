"""Build the documentation: docs/ and reference pages from docstrings -> build/docs -> build/site, and check every link.

    python .ci/docs.py

The reference is read from the source, so nothing is imported: public names with their signatures and docstrings. A page that the
navigation of mkdocs.yml does not name is added to it under its own title. A link to a file of the repository outside docs/ becomes
its name. The build fails for a link or anchor that leads nowhere, and for a page that would load something from another host.
"""

import ast
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

ROOT = Path(__file__).parents[1]
PAGES, SITE = ROOT / "build" / "docs", ROOT / "build" / "site"
PACKAGES = (
    "mpo",
    "mpo.losses",
    *(f"mpo.{name}" for name in "data training generation verification pipelines evaluation models".split()),
)
LISTED = {
    "mpo.training": "MPOConfig MPOTrainer PackedSFTConfig PackedSFTTrainer",
    "mpo.evaluation": "evaluate measure_accuracy wilson_interval clustered_interval compare_paired PairedComparison "
    "difference_interval holm smallest_difference majority_at best_at MeanLogProb ImplicitReward ProcessReward load_scorer",
}
"""Names for the reference of packages without `__all__`; each is imported from the module that defines it."""
SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises):$", re.MULTILINE)


def file_of(module: str) -> Path:
    """The file of a module; `mpo.losses` is the folder losses/."""
    path = ROOT.joinpath(*module.replace("mpo.losses", "losses").split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def public() -> dict[str, dict[str, Path]]:
    """By package the names in `__all__`, and those that pages import, each with the file that defines it."""
    found: dict[str, dict[str, Path]] = {package: {} for package in PACKAGES}
    for package in PACKAGES:
        tree = ast.parse(file_of(package).read_text())
        listed = [node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"]
        own = sorted(file_of(package).parent.rglob("*.py"))
        for name in ast.literal_eval(listed[0]) if listed else LISTED.get(package, "").split():
            pattern = re.compile(rf"^(?:class|def) {name}\b", re.MULTILINE)
            if home := next((path for path in own if pattern.search(path.read_text())), None):
                found[package][name] = home
            elif package in LISTED:
                sys.exit(f"{package} has no {name}, which LISTED of .ci/docs.py names")
    pages = "\n".join(page.read_text() for page in PAGES.rglob("*.md"))
    for module, names in re.findall(r"^from (mpo\.[\w.]+) import (.+)$", pages, flags=re.MULTILINE):
        package = next((one for one in PACKAGES[1:] if module.startswith(f"{one}.")), None)
        for name in names.split(", ") if package else ():
            found[package].setdefault(name, file_of(module))
    return {package: names for package, names in found.items() if names}


def as_markdown(doc: str) -> str:
    """A docstring as Markdown: sections as lists, examples as code."""
    text = doc.replace("``", "`")
    text = re.sub(r"(?ms)^(>>>.*?)(?=^\s*$|\Z)", lambda found: f"```python\n{found[1].rstrip()}\n```\n", text)
    first, *sections = SECTION.split(text)
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        inside, _, after = re.sub(r"\n(?=\S)", "\0", body, count=1).partition("\0")
        entries = re.sub(r"(?m)^    (?=\S)", "- ", re.sub(r"\n {8,}(?=\S)", " ", inside)).strip("\n")
        entries = re.sub(r"(?m)^- ([\w, *]+): ", r"- `\1`: ", entries)
        first += f"\n**{title}**\n\n{entries}\n\n{after}"
    return first


def described(path: Path, name: str) -> str:
    """A class or function as Markdown: its signature and docstring."""
    node = next(node for node in ast.parse(path.read_text()).body if getattr(node, "name", None) == name)
    function = next((sub for sub in getattr(node, "body", []) if getattr(sub, "name", "") == "__init__"), None)
    function = node if isinstance(node, ast.FunctionDef) else function
    text = [f"## `{name}`\n"]
    if function is not None:
        arguments = [argument for argument in re.split(r", (?![^\[(]*[\])])", ast.unparse(function.args)) if argument != "self"]
        text.append(f"```python\n{name}(\n    " + ",\n    ".join(arguments) + "\n)\n```\n")
    text.append(as_markdown(ast.get_docstring(node) or ""))
    for method in node.body if isinstance(node, ast.ClassDef) else ():
        if isinstance(method, ast.FunctionDef) and not method.name.startswith("_") and (doc := ast.get_docstring(method)):
            text.append(f"\n**`{method.name}`**: {' '.join(doc.partition(chr(10) * 2)[0].split())}\n")
    return "\n".join(text)


def gather() -> None:
    """Write build/docs, and build/mkdocs.yml with the whole navigation."""
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.copytree(ROOT / "docs", PAGES)
    for page in PAGES.rglob("*.md"):
        depth = len(page.relative_to(PAGES).parts)  # links out of docs/ lead to files that the site does not have
        page.write_text(re.sub(rf"\[([^\]]+)\]\((?:\.\./){{{depth},}}[^)]+\)", r"\1", page.read_text()))
    reference: list[object] = []
    (PAGES / "reference").mkdir()
    for package, names in public().items():
        first = (ast.get_docstring(ast.parse(file_of(package).read_text())) or "").partition("\n")[0]
        page = "\n".join([f"# `{package}`\n\n{first}\n", *(described(path, name) for name, path in sorted(names.items()))])
        (PAGES / "reference" / f"{package}.md").write_text(page)
        reference.append({package: f"reference/{package}.md"})
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    named = set(re.findall(r"[\w/.-]+\.md", str(config["nav"])))
    for page in sorted(PAGES.rglob("*.md")):
        if (name := page.relative_to(PAGES).as_posix()) not in named and not name.startswith("reference/"):
            group = next(entry["Explanation"] for entry in config["nav"] if "Explanation" in entry)
            group.append({page.read_text().partition("\n")[0].lstrip("# "): name})
    next(entry["Reference"] for entry in config["nav"] if "Reference" in entry).extend(reference)
    config |= {"docs_dir": "docs", "site_dir": "site"}
    (ROOT / "build" / "mkdocs.yml").write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))


class Page(HTMLParser):
    """What a page links to and loads, and its anchors."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors = {""}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect the attributes of a tag."""
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif given.get("src") or (tag == "link" and given.get("rel") not in {"canonical", "prev", "next"} and given.get("href")):
            self.loads.append(given.get("src") or given["href"])


def problems(site: Path) -> list[str]:
    """Links that lead nowhere, and what would be loaded from another host."""
    pages = {path.resolve(): Page() for path in site.rglob("*.html") if path.name != "404.html"}
    for path, page in pages.items():
        page.feed(path.read_text())
    found = []
    for path, page in pages.items():
        for link in (*page.links, *page.loads):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                found += [f"{path.relative_to(site)}: loads {link}"] if link in page.loads and parts.scheme != "data" else []
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.exists() or (target in pages and unquote(parts.fragment) not in pages[target].anchors):
                found.append(f"{path.relative_to(site)}: {link} leads nowhere")
    return found


if __name__ == "__main__":
    gather()
    subprocess.run([sys.executable, "-m", "zensical", "build", "--strict", "-f", "build/mkdocs.yml"], cwd=ROOT, check=True)
    wrong = problems(SITE)
    print("\n".join(wrong) or f"{len(list(SITE.rglob('*.html')))} pages in {SITE.relative_to(ROOT)}, every link checked")
    sys.exit(bool(wrong))

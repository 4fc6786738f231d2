"""Build the documentation: docs/ and reference pages from docstrings -> build/docs -> build/site, and check every link.

    python .ci/docs.py [FOLDER in the place of build]

The reference is read from the source, so nothing is imported: public names with their signatures and docstrings. A link to a file
of the repository outside docs/ becomes its name, an image is copied. The build fails for a link that leads nowhere, a page
that the navigation of mkdocs.yml does not name, and a page that would load something from another host.
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
PACKAGES = (
    "mpo",
    "mpo.losses",
    *(f"mpo.{name}" for name in "data training generation verification pipelines evaluation models".split()),
)
LISTED = {
    "mpo.training": "MPOConfig MPOTrainer PackedSFTConfig PackedSFTTrainer",
    "mpo.evaluation": "evaluate wilson_interval clustered_interval compare_paired PairedComparison "
    "difference_interval holm smallest_difference majority_at best_at MeanLogProb ImplicitReward ProcessReward load_scorer",
}
"""Names for the reference of packages without `__all__`; each is imported from the module that defines it."""
SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises):$", re.MULTILINE)


def file_of(module: str) -> Path:
    """The file of a module; `mpo.losses` is the folder losses/."""
    path = ROOT.joinpath(*module.replace("mpo.losses", "losses").split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def public(pages: Path) -> dict[str, dict[str, Path]]:
    """By package the names in `__all__`, and those that the pages in a folder import, each with the file that defines it."""
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
    texts = "\n".join(page.read_text() for page in pages.rglob("*.md"))
    for module, names in re.findall(r"^from (mpo\.[\w.]+) import (.+)$", texts, flags=re.MULTILINE):
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


def within(name: Path, pages: Path) -> str:
    """The text of docs/NAME for the folder `pages`, which has nothing of the repository but docs/.

    A link out of docs/ becomes its words; an image from there is copied to images/.
    """

    def replaced(link: re.Match[str]) -> str:
        shown, words, target = link.groups()
        if not shown:
            return words
        path = (ROOT / "docs" / name.parent / target).resolve()
        copied = "-".join(path.relative_to(ROOT).parts)
        shutil.copy(path, pages / "images" / copied)
        return f"![{words}]({'../' * (len(name.parts) - 1)}images/{copied})"

    return re.sub(rf"(!?)\[([^\]]+)\]\(((?:\.\./){{{len(name.parts)},}}[^)]+)\)", replaced, (ROOT / "docs" / name).read_text())


def gather(build: Path) -> None:
    """Write docs/ and mkdocs.yml with the whole navigation into a folder."""
    pages = build / "docs"
    shutil.rmtree(pages, ignore_errors=True)
    shutil.copytree(ROOT / "docs", pages)
    for page in pages.rglob("*.md"):
        page.write_text(within(page.relative_to(pages), pages))
    reference: list[object] = []
    (pages / "reference").mkdir()
    for package, names in public(pages).items():
        first = (ast.get_docstring(ast.parse(file_of(package).read_text())) or "").partition("\n")[0]
        page = "\n".join([f"# `{package}`\n\n{first}\n", *(described(path, name) for name, path in sorted(names.items()))])
        (pages / "reference" / f"{package}.md").write_text(page)
        reference.append({package: f"reference/{package}.md"})
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    next(entry["Reference"] for entry in config["nav"] if "Reference" in entry).extend(reference)
    named = set(re.findall(r"[\w/.-]+\.md", str(config["nav"])))
    if missing := sorted({page.relative_to(pages).as_posix() for page in pages.rglob("*.md")} - named):
        sys.exit(f"The navigation of mkdocs.yml does not name {', '.join(missing)}.")
    config |= {"docs_dir": "docs", "site_dir": "site"}
    (build / "mkdocs.yml").write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))


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


def main(build: Path) -> int:
    """Build the site into a folder; 0 when nothing is wrong with it."""
    gather(build)
    command = [sys.executable, "-m", "zensical", "build", "--strict", "-f", str(build / "mkdocs.yml")]
    subprocess.run(command, cwd=ROOT, check=True)
    wrong = problems(build / "site")
    print("\n".join(wrong) or f"{len(list((build / 'site').rglob('*.html')))} pages in {build / 'site'}, every link checked")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT / "build"))

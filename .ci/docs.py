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
PACKAGES = {"mpo": "mpo", "mpo.losses": "losses"} | {
    f"mpo.{name}": f"mpo/{name}" for name in ("data", "training", "generation", "verification", "pipelines", "evaluation", "models")
}


def public(package: Path) -> dict[str, Path]:
    """The names in `__all__` of a package, or in its modules where it has none, each with the file that defines it."""
    tree = ast.parse((package / "__init__.py").read_text())
    listed = [node for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"]
    names = [name for name in (ast.literal_eval(listed[0].value) if listed else []) if not name.startswith("_")]
    found: dict[str, Path] = {}
    folders = [*sorted(package.rglob("*.py")), *sorted((ROOT / "mpo").rglob("*.py"))]
    for name in names:
        pattern = re.compile(rf"^(?:class|def) {name}\b", re.MULTILINE)
        if home := next((path for path in folders if pattern.search(path.read_text())), None):
            found[name] = home
    return found


def described(path: Path, name: str) -> str:
    """A class or function as Markdown: its signature and docstring."""
    node = next(node for node in ast.parse(path.read_text()).body if getattr(node, "name", None) == name)
    makes = next((sub for sub in getattr(node, "body", []) if getattr(sub, "name", "") == "__init__"), None)
    function = node if isinstance(node, ast.FunctionDef) else makes
    arguments = ast.unparse(function.args).removeprefix("self").lstrip(", ") if function is not None else ""
    kind = "class " if isinstance(node, ast.ClassDef) else ""
    text = [f"## `{name}`\n\n```text\n{kind}{name}({arguments})\n```\n"]
    if doc := ast.get_docstring(node):
        text.append(f"```text\n{doc}\n```\n")
    for method in getattr(node, "body", []) if isinstance(node, ast.ClassDef) else ():
        if isinstance(method, ast.FunctionDef) and not method.name.startswith("_") and (doc := ast.get_docstring(method)):
            text.append(f"**`{method.name}`** {' '.join(doc.partition(chr(10) * 2)[0].split())}\n")
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
    for module, folder in PACKAGES.items():
        if names := public(ROOT / folder):
            first = (ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text())) or "").partition("\n")[0]
            page = "\n".join([f"# `{module}`\n\n{first}\n", *(described(path, name) for name, path in sorted(names.items()))])
            (PAGES / "reference" / f"{module}.md").write_text(page)
            reference.append({module: f"reference/{module}.md"})
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

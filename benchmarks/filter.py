r"""Measure the heuristics of `mpo data filter` on real texts of installed packages and on texts that were broken on purpose.

    python benchmarks/filter.py results/filter.json                  # both halves
    python benchmarks/filter.py results/filter.json --half first     # while rules are written, with what was wrong

Real texts are what this environment has installed: documentation, docstrings, licences, code, tables, verse and texts in other
scripts, cut at line ends into 50 to 800 words. Broken ones are made of them by `BREAK`. Both are halved by a hash of the text: the
rules were written on the first half alone, the second half measures them. A real text that a rule drops is a false positive, a
broken one that none drops is missed.
"""

import argparse
import ast
import codecs
import csv
import gzip
import hashlib
import io
import json
import random
import re
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import numpy

from mpo.data.degenerate import LIMITS, find_degenerate

PURE, STDLIB = Path(numpy.__file__).parents[1], Path(sysconfig.get_path("stdlib"))
PER_KIND, PER_FILE, BROKEN = 150, 3, 20
WORDS = (50, 800)


def number(text: str) -> int:
    """A number that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:8], "big")


def half(text: str) -> str:
    """The half of the data that a text is in."""
    return ("first", "second")[number(text) % 2]


def chunks(text: str) -> Iterator[str]:
    """Cut a text at line ends into parts of 50 to 800 words, whose lengths follow from the text."""
    draw = random.Random(number(text))
    lines, want = [], int(50 * 16 ** draw.random())
    for line in text.splitlines(keepends=True):
        lines.append(line)
        if words("".join(lines)) >= want:
            yield "".join(lines).strip("\n")
            lines, want = [], int(50 * 16 ** draw.random())
    yield "".join(lines).strip("\n")


def words(text: str) -> int:
    """The length in words, a character of a script without spaces being half of one."""
    return len(text.split()) + len(re.findall(r"[\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7af]", text)) // 2


def files(*endings: str, root: Path = PURE) -> Iterator[Path]:
    """The files with one of some endings, in an order that follows from their names."""
    found = [path for path in root.rglob("*") if path.name.lower().endswith(endings) and "__pycache__" not in path.parts]
    yield from sorted(found, key=lambda path: number(str(path.relative_to(root))))


def read(path: Path) -> str:
    """The text of a file; empty if it is none."""
    try:
        return (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode()
    except (UnicodeDecodeError, OSError):
        return ""


def documentation() -> Iterator[str]:
    """Files of reST and Markdown files, and Python's own documentation."""
    from pydoc_data.topics import topics

    yield from (read(path) for path in files(".rst", ".md") if "licen" not in str(path).lower())
    yield from (topics[name] for name in sorted(topics))


def sources() -> Iterator[str]:
    """Python files, of the standard library and of packages in turn."""
    for pair in zip(files(".py", root=STDLIB), files(".py"), strict=False):
        yield from (read(path) for path in pair if "site-packages" not in str(path) or path.is_relative_to(PURE))


def docstrings() -> Iterator[str]:
    """Docstrings of modules, classes and functions."""
    for text in sources():
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        found = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
        yield from sorted((one for one in found if words(one) >= WORDS[0]), key=number)[:PER_FILE]


def licences() -> Iterator[str]:
    """Licence files."""
    for path in files(""):
        if re.search("licen|copying|notice|authors", path.name.lower()) and path.suffix in ("", ".txt", ".md", ".rst"):
            if path.is_file():
                yield read(path)


def tables() -> Iterator[str]:
    """Tables of data sets as they are, and as Markdown."""
    for path in files(".csv", ".csv.gz", ".tsv"):
        text = "".join(read(path).splitlines(keepends=True)[:400])
        rows = [row for row in csv.reader(io.StringIO(text)) if row]
        yield text
        if rows:
            lines = [f"| {' | '.join(row)} |" for row in rows]
            yield "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def verse() -> Iterator[str]:
    """The Zen of Python and what is set in short lines, such as credits and lists of words."""
    import this  # noqa: F401  prints it

    yield codecs.decode(sys.modules["this"].s, "rot13")
    for text in (read(path) for path in files(".txt", ".rst", ".md")):
        for block in re.split(r"\n\s*\n", text):
            lines = block.splitlines()
            if len(lines) >= 8 and max(map(len, lines)) <= 50 and sum(map(len, re.findall("[a-z]+", block))) > 0.6 * len(block):
                yield block


def scripts() -> Iterator[str]:
    """Texts in Chinese, Japanese, Korean, Cyrillic, Arabic and others."""
    yield from (read(path) for path in files("utf-8.txt", "utf8.txt", root=STDLIB / "test"))
    for path in files(".po", ".md", ".txt", ".py"):
        text = read(path)
        other = [line for line in text.splitlines() if len(re.findall(r"[^\W\d_a-zA-Z\u00c0-\u024f]", line)) > 5]
        if len(other) >= 8:
            yield "\n".join(other)


REAL: dict[str, Callable[[], Iterator[str]]] = {
    "documentation": documentation,
    "docstrings": docstrings,
    "licences": licences,
    "code": sources,
    "tables": tables,
    "verse": verse,
    "scripts": scripts,
}


def real() -> Iterator[tuple[str, str]]:
    """Kinds and texts, each text once."""
    seen: set[str] = set()
    for kind, texts in REAL.items():
        count = 0
        for text in texts():
            parts = [one for one in chunks(text) if WORDS[0] <= words(one) <= 1.5 * WORDS[1]]
            for part in sorted(parts, key=number)[:PER_FILE]:
                key = " ".join(part.split())[:200]
                if key not in seen and count < PER_KIND:
                    seen.add(key)
                    count += 1
                    yield kind, part
            if count == PER_KIND:
                break


CHINESE = [
    "图中可以看到一只白色的小猫坐在窗台上,阳光照在它的身上。",
    "根据题目给出的条件,三角形的底边长为六厘米,高为四厘米。",
    "首先我们观察图表中的数据,可以发现二零一五年的销售额最高。",
    "因此,这个函数在区间上是单调递增的,并且在端点处取得最大值。",
]
WORDS_OF = "red blue green small large old new round square left right upper lower open closed bright dark".split()


def sentences(text: str) -> list[str]:
    """Sentences of a text, of 4 to 30 words."""
    found = [" ".join(one.split()) for one in re.split(r"(?<=[.!?])\s+", text)]
    return [one for one in found if 4 <= len(one.split()) <= 30] or ["The image shows a man who is standing next to a car."]


def start(text: str, draw: random.Random) -> str:
    """A good beginning: some lines of a real text."""
    lines = text.splitlines()
    return "\n".join(lines[: draw.randint(1, max(1, len(lines) // 2))]) + " "


def phrase_loop(text: str, draw: random.Random) -> str:
    phrase = " ".join(draw.choice(sentences(text)).split()[: draw.randint(2, 15)])
    return start(text, draw) + " ".join([phrase] * draw.randint(8, 60))


def zeros(text: str, draw: random.Random) -> str:
    zero = draw.choice(["0", "0", "0", "00 ", "0.", "0, "])
    return start(text, draw) + draw.choice(["", "1.", "The value is 3."]) + zero * draw.randint(100, 1500)


def numbered_lines(text: str, draw: random.Random) -> str:
    line = draw.choice(sentences(text))
    return start(text, draw) + "\n" + "\n".join(f"{place}. {line}" for place in range(1, draw.randint(10, 40)))


def varied_lines(text: str, draw: random.Random) -> str:
    line = draw.choice(
        ["The {} box is next to the {} one.", "It is a {} line in the {} part.", "- **{}**: the {} side of the figure"]
    )
    lines = [line.format(draw.choice(WORDS_OF), draw.choice(WORDS_OF)) for _ in range(draw.randint(15, 50))]
    return start(text, draw) + "\n" + "\n".join(lines)


def character_run(text: str, draw: random.Random) -> str:
    return start(text, draw) + draw.choice("aA!哈=x\\。-的1?") * draw.randint(300, 2000)


def chinese_loop(text: str, draw: random.Random) -> str:
    good = "".join(draw.sample(CHINESE, 3))
    size, at = draw.randint(2, 18), draw.randint(0, 8)
    return good + good[at : at + size] * draw.randint(10, 80)


def second_half(text: str, draw: random.Random) -> str:
    """Good up to its middle, then its last two sentences in turn."""
    upper = text[: len(text) // 2]
    last = sentences(upper)[-2:]
    return upper + " " + " ".join(last * draw.randint(6, 25))


def shuffled_sentences(text: str, draw: random.Random) -> str:
    """A few sentences again and again, in any order."""
    few = (sentences(text) * 4)[: draw.randint(3, 4)]
    return start(text, draw) + " ".join(draw.choice(few) for _ in range(draw.randint(25, 60)))


def word_loop(text: str, draw: random.Random) -> str:
    return start(text, draw) + " ".join([draw.choice(re.findall(r"[A-Za-z]{2,}", text) or ["the"])] * draw.randint(40, 300))


def code_loop(text: str, draw: random.Random) -> str:
    name = draw.choice(WORDS_OF)
    lines = draw.choice([[f"    {name} = {name} + 1"], [f"    if {name} is None:", f"        return {name}"], ["    pass", ""]])
    return f"def {name}(values):\n    total = 0\n" + "\n".join(lines * draw.randint(25, 80))


BREAK = (
    phrase_loop,
    zeros,
    numbered_lines,
    varied_lines,
    character_run,
    chinese_loop,
    second_half,
    shuffled_sentences,
    word_loop,
    code_loop,
)


def broken(texts: list[str]) -> Iterator[tuple[str, str]]:
    """Kinds and texts, `BROKEN` of each kind."""
    for place, how in enumerate(BREAK):
        for text in texts[place * BROKEN : (place + 1) * BROKEN]:
            yield how.__name__, how(text, random.Random(number(text)))


def measure(labelled: list[tuple[str, str]]) -> tuple[dict[str, object], list[tuple[str, str, object]]]:
    """Count by kind how many texts a rule drops, and by which rule; and the texts with their first finding, if any."""
    found = [(kind, text, next(iter(find_degenerate(text)), None)) for kind, text in labelled]
    rows: dict[str, object] = {}
    for kind in dict.fromkeys(kind for kind, _ in labelled):
        own = [one for name, _, one in found if name == kind]
        rules = Counter(one.rule for one in own if one is not None)
        rows[kind] = {"texts": len(own), "dropped": sum(rules.values()), "rules": dict(sorted(rules.items()))}
    dropped = sum(one is not None for *_, one in found)
    total = {"texts": len(found), "dropped": dropped, "share": round(dropped / max(len(found), 1), 4), "by_kind": rows}
    return total, found


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--half", choices=("first", "second"), help="only this half; the first one shows what was wrong")
    args = parser.parse_args()
    good = list(real())
    base = sorted((text for kind, text in good if kind in ("documentation", "docstrings", "licences")), key=number)
    bad = list(broken(base))
    report: dict[str, object] = {"date": str(date.today()), "limits": LIMITS}
    for name in [args.half] if args.half else ["first", "second"]:
        parts: dict[str, object] = {}
        for what, texts in (("real", good), ("broken", bad)):
            own = [(kind, text) for kind, text in texts if half(text) == name]
            begun = time.perf_counter()
            parts[what], found = measure(own)
            if what == "real":
                parts["milliseconds_per_text"] = round((time.perf_counter() - begun) * 1000 / len(own), 2)
            for kind, text, one in found if args.half == "first" else ():
                if (one is None) == (what == "broken"):
                    print(f"--- {what} {kind} {one}\n{text[-400:] if one is None else text[one.start : one.end][:400]}")
        report[name] = parts
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()

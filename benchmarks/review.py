"""How fast `mpo review` is on 100,000 records of 300 MB, in a real Chromium: first record, facets, filters, next record.

    python benchmarks/review.py --output benchmarks/review.json

The server is a process of its own. Times are of the page: from a key to the record that is drawn, with its image; `cpu` is what the
server itself needed, which does not depend on how busy the machine is.
"""

import argparse
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page, sync_playwright

WORDS = "the a red blue square circle number of is counted left right axis value chart shows answer because total so".split()


def write(folder: Path, records: int, size: int) -> Path:
    """A file of MMPR pairs with `records` lines of about `size` bytes, and 64 images."""
    rng = random.Random(0)
    for number in range(64):
        Image.effect_noise((448, 448), 40 + number).convert("RGB").save(folder / f"{number}.jpg")
    texts = [" ".join(rng.choices(WORDS, k=size // 12)) for _ in range(512)]
    path = folder / "pairs.jsonl"
    with path.open("w") as file:
        for number in range(records):
            line = {"id": f"p{number}", "image": f"{number % 64}.jpg", "question": f"<image>\nHow many in {number}?"}
            line |= {"chosen": texts[number % 512] + f" {number}", "rejected": texts[(number + 7) % 512], "answer_gt": str(number)}
            line |= {
                "source": f"source {number % 20}",
                "accuracy": number % 100 / 100,
                "type": ("count", "chart", "text")[number % 3],
            }
            file.write(json.dumps(line) + "\n")
    return path


def measure(folder: Path, records: int, size: int, moves: int) -> dict[str, Any]:
    path = write(folder, records, size)
    started = time.perf_counter()
    command = [sys.executable, "-m", "mpo", "review", str(path), "--reviewer", "bench"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    link = next(found[0] for line in server.stderr if (found := re.search(r"http://\S+", line)))
    found: dict[str, Any] = {"records": records, "megabytes": round(path.stat().st_size / 1e6)}
    found["server_answers_s"], found["server_answers_cpu_s"] = time.perf_counter() - started, cpu(server.pid)
    try:
        with sync_playwright() as player:
            browser = player.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            browse(browser.new_page(), link, server.pid, moves, found)
            browser.close()
    finally:
        server.kill()
        server.wait()
    found["load"] = os.getloadavg()[0]  # processes that wanted a core, on average over the last minute
    found["start_to_first_record_s"] = found["server_answers_s"] + found["first_record_s"]
    return found


def browse(page: Page, link: str, pid: int, moves: int, found: dict[str, Any]) -> None:
    """Measure on the page of a server process; what the server itself needed is in seconds of CPU."""
    opened = time.perf_counter()
    page.goto(link)
    page.wait_for_selector("#record section")
    found["first_record_s"] = time.perf_counter() - opened
    found["first_record_cpu_s"] = cpu(pid)  # with the start
    page.wait_for_selector("#facets select", timeout=240_000)
    found["facets_s"], found["facets_cpu_s"] = time.perf_counter() - opened, cpu(pid)

    def choose(work: Callable[[], object], name: str = "") -> None:
        begun, before = time.perf_counter(), cpu(pid)
        work()
        page.wait_for_selector("#record:not([aria-busy])", timeout=120_000)
        if name:
            found[f"{name}_s"], found[f"{name}_cpu_s"] = time.perf_counter() - begun, cpu(pid) - before

    for name, label, option in (("source", "Source", 3), ("hardest", "Order", 2), ("unreviewed", "Show", 1)):
        choose(lambda label=label, option=option: page.get_by_label(label).select_option(index=option), f"filter_{name}")
    for label in ("Source", "Order", "Show"):
        choose(lambda label=label: page.get_by_label(label).select_option(index=0))
    found_one = page.get_by_text("1 records", exact=True)
    choose(lambda: (page.locator("#search").fill("how many in 54321?"), found_one.wait_for()), "search")
    choose(lambda: page.locator("#search").fill(""))
    page.keyboard.press("Escape")
    # From the key to the drawn record with its image.
    one = """async (key) => {
        const before = document.querySelector('.meta strong').textContent;
        const begun = performance.now();
        document.body.dispatchEvent(new KeyboardEvent('keydown', { key, bubbles: true }));
        const until = async (done) => {
            while (!done()) {
                if (performance.now() - begun > 10_000) throw new Error(document.body.innerText.slice(0, 300));
                await new Promise((next) => setTimeout(next, 1));
            }
        };
        await until(() => document.querySelector('.meta strong')?.textContent !== before);
        await until(() => document.querySelector('.gallery img')?.naturalWidth);
        return performance.now() - begun;
    }"""
    for name, key in (("next_record", "n"), ("decide_and_next", "a")):
        times, before = [], cpu(pid)
        for _ in range(moves):
            times.append(page.evaluate(one, key))
            page.wait_for_timeout(150)  # a person looks, if shortly
        found[f"{name}_ms"] = {"median": statistics.median(times), "p95": sorted(times)[int(0.95 * len(times))]}
        found[f"{name}_cpu_ms"] = 1000 * (cpu(pid) - before) / moves


def cpu(pid: int) -> float:
    """Seconds of CPU of a process and its threads so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--bytes", type=int, default=3000, help="bytes of a record")
    parser.add_argument("--moves", type=int, default=100)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), args.records, args.bytes, args.moves)
    found = json.loads(json.dumps(found), parse_float=lambda text: round(float(text), 3))
    print(json.dumps(found, indent=1))
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

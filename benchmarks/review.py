"""How fast `mpo review` is on 100,000 records of 300 MB, in a real Chromium: first record, facets, filters, next record.

    python benchmarks/review.py --output benchmarks/review.json

The server is a process of its own. Times are of the page: from a key to the record that is drawn, with its image.
"""

import argparse
import atexit
import json
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

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


def measure(folder: Path, records: int, size: int, moves: int) -> dict[str, object]:
    path = write(folder, records, size)
    started = time.perf_counter()
    command = [sys.executable, "-m", "mpo", "review", str(path), "--reviewer", "bench"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    link = next(found[0] for line in server.stderr if (found := re.search(r"http://\S+", line)))
    found: dict[str, object] = {"records": records, "megabytes": round(path.stat().st_size / 1e6)}
    found["server_answers_s"] = time.perf_counter() - started
    with server, sync_playwright() as player:
        atexit.register(server.kill)  # whatever happens, it does not outlive this
        browser = player.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page()
        opened = time.perf_counter()
        page.goto(link)
        page.wait_for_selector("#record section")
        found["first_record_s"] = time.perf_counter() - opened
        print("first record", round(found["first_record_s"], 2), file=sys.stderr, flush=True)
        found["start_to_first_record_s"] = found["server_answers_s"] + found["first_record_s"]
        page.wait_for_selector("#facets select", timeout=120_000)
        found["facets_s"] = time.perf_counter() - opened
        for name, work in {
            "filter_source_s": lambda: page.get_by_label("Source").select_option(index=3),
            "filter_hardest_s": lambda: page.get_by_label("Order").select_option("hardest"),
            "filter_unreviewed_s": lambda: page.get_by_label("Show").select_option("unreviewed"),
            "all_again_s": lambda: [page.get_by_label(one).select_option(index=0) for one in ("Source", "Order", "Show")],
            "search_s": lambda: page.locator("#search").fill("how many in 54321?"),
        }.items():
            page.evaluate("document.getElementById('status').textContent = ''")
            begun = time.perf_counter()
            work()
            page.wait_for_function("() => / records$/.test(document.getElementById('status').textContent)", timeout=60_000)
            found[name] = time.perf_counter() - begun
            print(name, round(found[name], 2), file=sys.stderr, flush=True)
        page.evaluate("document.getElementById('status').textContent = ''")
        page.locator("#search").fill("")
        page.wait_for_function("() => / records$/.test(document.getElementById('status').textContent)", timeout=60_000)
        page.keyboard.press("Escape")
        # From the key to the drawn record with its image: two frames after the image is decoded.
        one = """async (key) => {
            const before = document.querySelector('.meta strong').textContent;
            const begun = performance.now();
            document.body.dispatchEvent(new KeyboardEvent('keydown', { key, bubbles: true }));
            const late = () => performance.now() - begun > 3_000;
            const now = () => document.querySelector('.meta strong').textContent;
            while (!late() && now() === before) await new Promise(requestAnimationFrame);
            const shown = document.querySelector('.gallery img');
            while (!late() && shown && !(shown.complete && shown.naturalWidth)) await new Promise(requestAnimationFrame);
            return performance.now() - begun;
        }"""
        for name, key in (("next_record_ms", "n"), ("decide_and_next_ms", "a")):
            times = []
            for _ in range(moves):
                times.append(page.evaluate(one, key))
                page.wait_for_timeout(150)  # a person looks, if shortly
            found[name] = {"median": statistics.median(times), "p95": sorted(times)[int(0.95 * len(times))]}
        browser.close()
        server.terminate()
    return found


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

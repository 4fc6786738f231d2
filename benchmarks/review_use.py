"""What `mpo review` is for, done once in a real Chromium: 50 pairs corrected by keys, exported and trained on; and kills.

    python benchmarks/review_use.py --output benchmarks/review_use.json --images docs/images

The pictures of docs/review.md are of this: the pairs, the differences of two completions, and a conversation in the dark. Then a
server is killed (SIGKILL) nine times while three reviewers decide at once: what was answered as saved is looked for in the log.
"""

import argparse
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from playwright.sync_api import Browser, Page, sync_playwright

PAIRS = 50
KILLS = 9
REVIEWERS = ("anna", "ben", "eve")
MPO = [sys.executable, "-m", "mpo"]
COLORS = ("#c0392b", "#2471a3", "#1e8449", "#b7950b")


def dots(count: int, path: Path) -> None:
    image, rng = Image.new("RGB", (420, 200), "#fcfdff"), random.Random(count)
    for place in range(count):
        left, top = 20 + 44 * place, rng.randrange(30, 110)
        ImageDraw.Draw(image).ellipse((left, top, left + 34, top + 34), fill=rng.choice(COLORS))
    image.save(path)


def write(folder: Path) -> Path:
    """Pairs whose chosen completion counts the dots; in three of ten it is the rejected one that does, in one of ten neither."""
    lines = []
    for number in range(PAIRS):
        count = 4 + number % 5
        dots(count, folder / f"{count}.png")
        right = "I go through the image from left to right and count:\n\n1. the dots up to the middle: 3\n"
        right += f"2. the others: {count - 3}\n\nTogether $\\sum_i n_i = {count}$.\n\nFinal answer: {count}"
        wrong = right.replace(f"= {count}$", f"= {count + 1}$").replace(f"answer: {count}", f"answer: {count + 1}")
        wrong = wrong.replace("middle: 3", "middle: 4").replace(" from left to right", "")
        kind = ("good", "turned", "neither", "good", "turned", "good", "good", "turned", "good", "good")[number % 10]
        chosen, rejected = (wrong, right) if kind == "turned" else (right, wrong)
        if kind == "neither":
            chosen, rejected = wrong.replace(str(count + 1), str(count + 2)), wrong
        line = {"id": f"dots-{number}", "image": f"{count}.png", "answer_gt": str(count), "source": f"dots {number % 2 + 1}"}
        lines.append(
            {**line, "question": "How many dots are in the image? Think step by step.", "chosen": chosen, "rejected": rejected}
        )
    path = folder / "dots.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = ["<image>\n<image>\nWhich of the two images has more dots?"]
    said += ["| image | dots |\n|---|---|\n| first | 4 |\n| second | 5 |\n\nThe **second** one."]
    said += ["What is the fraction of the smaller number in the total?", "$\\frac{4}{4 + 5} = \\frac{4}{9}$"]
    turns = [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(said)]
    chat = {"id": "chart-7", "source": "charts", "image": ["4.png", "5.png"], "conversations": turns}
    (folder / "chat.jsonl").write_text(json.dumps(chat) + "\n")
    return path


class Serving:
    """`mpo review` of a file as a process; `links` by reviewer."""

    def __init__(self, path: Path, *reviewers: str) -> None:
        names = [word for name in reviewers for word in ("--reviewer", name)]
        self.process = subprocess.Popen([*MPO, "review", str(path), *names], stderr=subprocess.PIPE, text=True)
        self.links: dict[str, str] = {}
        assert self.process.stderr
        for line in self.process.stderr:
            if found := re.fullmatch(r"(\S+)\s+(http://\S+)\n", line):
                self.links[found[1]] = found[2]
            if len(self.links) == len(reviewers):
                break

    def __enter__(self) -> "Serving":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def ask(self, path: str, by: str, body: Any = None) -> Any:
        """The JSON of an answer."""
        address, token = self.links[by].split("/#")
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json", "Origin": address}
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(address + path, data, headers), timeout=30) as answer:
            return json.loads(answer.read())


def correct(browser: Browser, path: Path, images: Path | None) -> Counter[str]:
    """Decide on every pair by the keys that a person would press."""
    done: Counter[str] = Counter()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    with Serving(path, "anna") as server:
        page = opened(browser, server.links["anna"])
        shot(page, images, "review-pair.png")
        page.keyboard.press("d")
        shot(page, images, "review-diff.png")
        page.keyboard.press("d")
        for number, line in enumerate(lines):
            page.wait_for_function("id => document.querySelectorAll('.meta strong')[1]?.innerText === id", arg=line["id"])
            right = [f"Final answer: {line['answer_gt']}" in line[side] for side in ("chosen", "rejected")]
            work = "swap" if right[1] else "accept" if right[0] else "reject"
            if number % 13 == 0:
                work = "edit"
                page.keyboard.press("e")
                page.get_by_label("Prompt, user 1.1").fill("How many dots are in the image? Count from left to right.")
                page.keyboard.press("Control+Enter")
            elif work == "reject":
                page.keyboard.press("r")
                page.keyboard.type("both completions wrong")
                page.keyboard.press("Enter")
            else:
                page.keyboard.press(work[0])
            done[work] += 1
            page.wait_for_function(
                "done => document.getElementById('progress').innerText.includes(`, ${done} decided`)", arg=done.total()
            )
        page.close()
    with Serving(path.with_name("chat.jsonl"), "anna") as server:
        page = opened(browser, server.links["anna"], color_scheme="dark")
        shot(page, images, "review-conversation.png")
        page.close()
    return done


def opened(browser: Browser, link: str, **settings: Any) -> Page:
    page = browser.new_page(viewport={"width": 1040, "height": 700}, **settings)
    page.goto(link)
    page.wait_for_selector("#facets select", state="attached")
    page.wait_for_function("() => [...document.querySelectorAll('.gallery img')].every((one) => one.naturalWidth)")
    return page


def shot(page: Page, images: Path | None, name: str) -> None:
    if images:
        page.screenshot(path=images / name)


def exported(path: Path) -> dict[str, Any]:
    out = path.with_name("corrected.jsonl")
    report = json.loads(subprocess.check_output([*MPO, "review", str(path), "--export", str(out), "--json"]))
    before, after = path.read_bytes().splitlines(), out.read_bytes().splitlines()
    changed = sum("review" in json.loads(line).get("metadata", {}) for line in after)
    return {"counts": report["counts"], "with_their_bytes": len({*before} & {*after}), "with_provenance": changed}


def trained(folder: Path) -> dict[str, Any]:
    """Six steps of a small model of InternVL's architecture on the corrected pairs."""
    from mpo.models.small import small_internvl, small_processor

    texts = [str(value) for line in (folder / "corrected.jsonl").read_text().splitlines() for value in json.loads(line).values()]
    processor = small_processor(texts, image_size=32, patch_size=8, max_patches=4)
    model = small_internvl(processor, hidden_size=32, layers=2, vision_hidden_size=32, vision_layers=2)
    for part in (model, processor):
        part.save_pretrained(folder / "model")
    keys = ["experiment=internvl3_1b_lora", "model.name_or_path=model", "data.path=corrected.jsonl", "run_dir=run"]
    keys += [f"trainer.{one}" for one in ("max_steps=6", "warmup_steps=0", "global_batch_size=4", "per_device_train_batch_size=2")]
    subprocess.run([*MPO, "train", *keys, "trainer.logging_steps=1"], cwd=folder, check=True, stdout=sys.stderr)
    state = json.loads(next((folder / "run").rglob("trainer_state.json")).read_text())
    return {"steps": state["global_step"], "loss": [one["loss"] for one in state["log_history"] if "loss" in one]}


def killed(path: Path) -> dict[str, Any]:
    """Kill the server at random moments; every decision that was answered as saved is in the log, once."""
    saved: dict[str, tuple[str, int, str]] = {}
    rng, asked = random.Random(0), 0
    for kill in range(KILLS):
        with Serving(path, *REVIEWERS) as server:

            def work(by: str, server: Serving = server, kill: int = kill) -> None:
                nonlocal asked
                for place in range(PAIRS):
                    uid, action = uuid.uuid4().hex, ("accept", "swap", "reject")[(place + kill) % 3]
                    try:
                        view = server.ask(f"/api/records/{place}", by)
                        body = {"place": place, "action": action, "key": view["key"], "base": view["base"], "uid": uid, "edits": []}
                        asked += 1
                        server.ask("/api/decide", by, body)
                    except (OSError, ValueError):
                        return  # it was killed: nothing was answered
                    saved[uid] = (by, place, action)

            threads = [threading.Thread(target=work, args=(by,)) for by in REVIEWERS]
            for thread in threads:
                thread.start()
            wanted = len(saved) + rng.randrange(1, 30)
            while len(saved) < wanted and any(thread.is_alive() for thread in threads):
                time.sleep(0.001)
            server.process.kill()
            for thread in threads:
                thread.join()
    with Serving(path, *REVIEWERS):  # which cuts half a line off
        pass
    events = [json.loads(line) for line in path.with_name(f"{path.name}.review.jsonl").read_text().splitlines()]
    found = Counter(one["uid"] for one in events)
    there = {one["uid"]: (one["by"], one.get("place"), one["action"]) for one in events}
    return {
        "kills": KILLS,
        "reviewers": len(REVIEWERS),
        "asked": asked,
        "answered_as_saved": len(saved),
        "of_them_in_the_log_once": sum(there.get(uid) == told and found[uid] == 1 for uid, told in saved.items()),
        "in_the_log_though_the_answer_was_lost": sum(uid not in saved for uid, one in there.items() if one[2] != "file"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--images", type=Path, help="folder for the pictures of the page (default: none are taken)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = write(folder)
        with sync_playwright() as player:
            browser = player.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            found: dict[str, Any] = {"corrected": dict(sorted(correct(browser, path, args.images).items()))}
            browser.close()
        found |= {"exported": exported(path), "trained": trained(folder)}
        again = folder / "again.jsonl"
        shutil.copy(path, again)
        found["killed"] = killed(again)
    print(json.dumps(found, indent=1))
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

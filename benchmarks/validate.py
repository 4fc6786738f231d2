"""Measure the speed of `mpo data validate` in records per second: text and real photographs, without and with a processor.

    python benchmarks/validate.py                     # both sets, JSON into results/
    python benchmarks/validate.py --texts 1000 --images 50 --workers 4

The script writes a file of records. The lengths of questions and completions are drawn (seeded) from log-normal distributions with
medians of 20 and 80 words, at most 600. Records with images have a JPEG crop of scikit-learn's photographs each, 640 to 1280 pixels
wide, 600 of them different. The whole command is timed once per case, with its startup; its checks are listed in
`mpo data validate --help`. The processor is a small one saved to a folder: its rules are InternVL's, with at most 12 tiles of 448
pixels, but its vocabulary is small. Few of these texts are long enough to need encoding to check their length.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from data import RESULTS, WORDS, photographs

from mpo.models.small import small_processor

MEDIAN_WORDS = {"question": 20, "chosen": 80, "rejected": 80}
MOST_WORDS = 600


def records(count: int, images: bool, seed: int = 0) -> Iterator[dict[str, str]]:
    """Different records with a question each; their images are 0.jpg, 1.jpg and so on."""
    rng = np.random.default_rng(seed)
    words = np.array(WORDS[0].split())
    for number in range(count):
        record = {"id": str(number)}
        for name, median in MEDIAN_WORDS.items():
            length = int(np.clip(rng.lognormal(np.log(median), 0.8), 3, MOST_WORDS))
            record[name] = f"{number}: {' '.join(rng.choice(words, length))}."
        yield {**record, "image": f"{number}.jpg"} if images else record


def write_source(folder: Path, count: int, images: bool) -> Path:
    """Write a file of records to a folder, with their images."""
    folder.mkdir()
    if images:
        for number, content in enumerate(photographs(count)):
            (folder / f"{number}.jpg").write_bytes(content)
    path = folder / "pairs.jsonl"
    with path.open("w") as file:
        file.writelines(json.dumps(record) + "\n" for record in records(count, images))
    return path


def measure(path: Path, count: int, workers: int, processor: Path | None) -> dict[str, Any]:
    """Time the command on a file of `count` records.

    Raises:
        RuntimeError: when it reports an error, or another number of records.
    """
    command = [sys.executable, "-m", "mpo", "data", "validate", path.name, "--num-proc", str(workers)]
    command += ["--model", str(processor), "--max-length", "8192"] if processor else []
    start = time.perf_counter()
    done = subprocess.run(command, cwd=path.parent, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode or f"{count:,} pairs in {count:,} lines" not in done.stdout:
        raise RuntimeError(f"{' '.join(command)} gave {done.returncode}:\n{done.stdout}\n{done.stderr[-2000:]}")
    return {"seconds": seconds, "records_per_second": count / seconds, "said": done.stdout.strip().split("\n")}


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=100_000, metavar="N", help="records of text (default: %(default)s)")
    parser.add_argument(
        "--images", type=int, default=2_000, metavar="N", help="number of records with an image (default: %(default)s)"
    )
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="number of processes (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file to write; default: benchmarks/results/validate_cpu_DATE.json")
    options = parser.parse_args()
    result: dict[str, Any] = {
        "command": " ".join(["python benchmarks/validate.py", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "device": f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("transformers", "tokenizers", "pillow", "numpy", "mpo-trainer")},
        "how": __doc__,
        "workers": options.workers,
        "cases": [],
    }
    print("records            megabytes processor | seconds records per second")
    with tempfile.TemporaryDirectory() as place:
        processor = Path(place) / "processor"
        small_processor(WORDS, image_size=448, patch_size=14, max_patches=12, vocab_size=300).save_pretrained(processor)
        for kind, count in (("texts", options.texts), ("photographs", options.images)):
            path = write_source(Path(place) / kind, count, kind == "photographs")
            megabytes = sum(file.stat().st_size for file in path.parent.iterdir()) / 1e6
            for folder in (None, processor):
                found = measure(path, count, options.workers, folder)
                result["cases"].append(
                    {"records": count, "kind": kind, "megabytes": megabytes, "with_processor": folder is not None, **found}
                )
                print(
                    f"{count:>7,} {kind:<11} {megabytes:>8.0f} {'yes' if folder else 'no':>9} | {found['seconds']:>7.1f} "
                    f"{found['records_per_second']:>18,.0f}",
                    flush=True,
                )
    path = options.output or RESULTS / f"validate_cpu_{result['date']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path}", file=sys.stderr)


if __name__ == "__main__":
    main()

"""Compare the collators of this library and TRL: seconds to turn records with real photographs into one batch.

    python benchmarks/data.py                 # all cases, JSON into results/
    python benchmarks/data.py --rounds 21

Records are in a `datasets.Dataset` with JPEG files, as in training. For both sides in turn and in one thread, two times are
measured: the call of the collator on records in memory, and that call with reading the records (which decodes the images). TRL's
side is the collator that its DPOTrainer creates for images, ours that of MPOTrainer for packed rows; both use the same processor,
with tiles of 448 pixels, and the same records. The images that go through the image processor are counted.
"""

import argparse
import copy
import io
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from datasets import Dataset, Image, List
from PIL import Image as PILImage
from sklearn.datasets import load_sample_images
from transformers import GotOcr2ImageProcessor
from transformers.image_utils import make_flat_list_of_images
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from mpo.batching.collator import PairCollator
from mpo.models.small import small_processor

RESULTS = Path(__file__).parent / "results"
SIDES = ("trl", "mpo")
WORDS = ["What does the picture show, and why do you think so? A temple with a roof of many colours, and a flower in front of it."]


@dataclass(frozen=True)
class Case:
    """``tiles``: tile limit per image; ``pairs`` per batch, ``per_question`` of them with one question; ``images`` per prompt."""

    tiles: int
    pairs: int = 4
    per_question: int = 1
    images: int = 1
    answer_words: int = 200


CASES = [
    Case(1),
    Case(6),
    Case(12),
    Case(6, per_question=4),
    Case(6, pairs=16, per_question=4),
    Case(6, images=3),
]


def photographs(count: int) -> list[bytes]:
    """Different JPEG crops of scikit-learn's two photographs, 640 to 1280 pixels wide."""
    wholes = [PILImage.fromarray(pixels) for pixels in load_sample_images().images]
    files = []
    for number in range(count):
        whole = wholes[number % 2]
        left = 3 * (number // 2) % 100
        width = (640, 960, 1280)[number % 3]
        part = whole.crop((left, 0, left + 540, 405)).resize((width, width * 3 // 4))
        file = io.BytesIO()
        part.save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def dataset_of(case: Case) -> Dataset:
    """The records of a batch."""
    questions = case.pairs // case.per_question
    files = photographs(questions * case.images)
    rows = []
    for number in range(case.pairs):
        question = number // case.per_question
        own = files[question * case.images : (question + 1) * case.images]
        words = [WORDS[0].split()[(number + place) % 25] for place in range(case.answer_words)]

        def said(role: str, text: str) -> list[dict[str, str]]:
            return [{"role": role, "content": text}]

        rows.append(
            {
                "images": [{"bytes": file, "path": None} for file in own],
                "prompt": said("user", f"What does picture {question} show?"),
                "chosen": said("assistant", " ".join(words)),
                "rejected": said("assistant", f"It is {number}. " + " ".join(words[::-1])),
            }
        )
    return Dataset.from_list(rows).cast_column("images", List(Image()))


def images_processed(work: Callable[[], Any]) -> int:
    """Count the images that go through the image processor."""
    counted, call = [], GotOcr2ImageProcessor.__call__

    def counting(self: Any, images: Any, *args: Any, **kwargs: Any) -> Any:
        counted.append(len(make_flat_list_of_images(images)))
        return call(self, images, *args, **kwargs)

    with mock.patch.object(GotOcr2ImageProcessor, "__call__", counting):
        work()
    return sum(counted)


def fresh(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Copy the messages of records, not their images: TRL's collator modifies messages."""
    return [{name: value if name == "images" else copy.deepcopy(value) for name, value in record.items()} for record in records]


def seconds(work: Callable[[], Any]) -> float:
    """Measure the seconds that `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Measure both sides in turn; medians."""
    processor = small_processor(WORDS, image_size=448, patch_size=14, max_patches=case.tiles, vocab_size=300)
    dataset = dataset_of(case)
    records = list(dataset)
    collators = {
        "trl": DataCollatorForVisionPreference(processor),
        "mpo": PairCollator(processor, layout="packed", tile_budget="image"),
    }
    batches = {side: collator(fresh(records)) for side, collator in collators.items()}
    processed = {side: images_processed(partial(collator, fresh(records))) for side, collator in collators.items()}
    alone: dict[str, list[float]] = {side: [] for side in SIDES}
    with_reading: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side, collator in collators.items():
            alone[side].append(seconds(partial(collator, fresh(records))))
            with_reading[side].append(seconds(lambda own=collator: own(list(dataset))))
    medians = {side: statistics.median(values) for side, values in alone.items()}
    whole = {side: statistics.median(values) for side, values in with_reading.items()}
    return {
        "case": asdict(case),
        "seconds_of_each_round": {"collating": alone, "reading and collating": with_reading},
        "milliseconds_per_batch": {side: 1000 * value for side, value in medians.items()},
        "milliseconds_per_batch_with_reading": {side: 1000 * value for side, value in whole.items()},
        "pairs_per_second_with_reading": {side: case.pairs / value for side, value in whole.items()},
        "images_processed": processed,
        "tiles_for_the_model": {side: len(batch["pixel_values"]) for side, batch in batches.items()},
        "tokens_for_the_model": {side: batch["input_ids"].numel() for side, batch in batches.items()},
        "TRL over ours": {"collating": medians["trl"] / medians["mpo"], "reading and collating": whole["trl"] / whole["mpo"]},
    }


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11, help="number of timed rounds per side (default 11)")
    parser.add_argument("--output", type=Path, help="JSON file to write; default: benchmarks/results/data_cpu_DATE.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "command": " ".join(["python benchmarks/data.py", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "device": f"{platform.machine()} CPU, 1 thread",
        "versions": {name: version(name) for name in ("torch", "torchvision", "transformers", "trl", "datasets", "mpo-trainer")},
        "how": __doc__,
        "cases": [],
    }
    print("tiles images pairs a question |  TRL ms ours ms ratio | pairs per second with reading")
    for case in CASES:
        found = measure(case, options.rounds)
        result["cases"].append(found)
        ms, speed, ratio = found["milliseconds_per_batch"], found["pairs_per_second_with_reading"], found["TRL over ours"]
        print(
            f"{case.tiles:>5} {case.images:>8} {case.pairs:>5} {case.per_question:>10} | {ms['trl']:>7.0f} {ms['mpo']:>7.0f} "
            f"{ratio['collating']:>5.2f} | {speed['trl']:.1f} against {speed['mpo']:.1f}",
            flush=True,
        )
    path = options.output or RESULTS / f"data_cpu_{result['date']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path}", file=sys.stderr)


if __name__ == "__main__":
    main()

"""Stage 1: draw handwritten digits side by side, with disjoint sources in every split, and ask questions about them."""

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm.auto import tqdm

from mpo.demo.folder import DemoFolder, DemoSettings
from mpo.io import write_json_lines, write_text

SPLITS = ("worked", "questions", "eval")


def make_dataset(folder: DemoFolder, settings: DemoSettings) -> dict[str, Any]:
    """Draw the images of all splits and write their questions. Returns the numbers of images and sources per split.

    Every line has the ground truth; those of `worked` also have a worked example, and those of `eval` the digits.
    """
    handwriting = load_handwriting()
    rng = np.random.default_rng(settings.seed)
    sources = split_sources(handwriting.labels, worked=settings.worked_sources, questions=settings.question_sources, rng=rng)
    assert_disjoint(sources)
    counts = dict(zip(SPLITS, (settings.worked_examples, settings.questions, settings.eval_questions), strict=True))
    used: dict[str, list[int]] = {}
    for split, count in counts.items():
        lines, drawn_so_far = [], set()
        (folder.data / split).mkdir(parents=True, exist_ok=True)
        for number in tqdm(range(count), desc=f"drawing {split}", unit="image"):
            drawn = rng.choice(sources[split], size=settings.digits_per_image, replace=False).tolist()
            digits: list[int] = handwriting.labels[drawn].tolist()
            kind = list(KINDS.values())[number % len(KINDS)]
            line: dict[str, Any] = {"id": f"{split}-{number:05d}", "image": f"{split}/{number:05d}.png", "question": kind.text}
            line["ground_truth"] = kind.ground_truth(digits)
            if split == "worked":
                line["worked_example"] = kind.worked_example(digits)
            if split == "eval":
                line["digits"] = digits
            draw(handwriting, drawn, digit_size=settings.tile_size).save(folder.data / line["image"])
            lines.append(line)
            drawn_so_far |= set(drawn)
        used[split] = sorted(drawn_so_far)
        write_json_lines(folder.lines(split), lines)
    assert_disjoint(used)
    write_text(folder.sources, json.dumps(used) + "\n")
    return {"images": counts, "sources": {split: len(drawn) for split, drawn in used.items()}}


class Handwriting(NamedTuple):
    """Single handwritten digits: ``images`` of shape (sources, 8, 8), ink from 0 to 16; ``labels`` of shape (sources,), 0 to 9."""

    images: NDArray[np.float64]
    labels: NDArray[np.int64]


def load_handwriting() -> Handwriting:
    """Load the 1,797 scanned digits of scikit-learn (UCI Optical Recognition of Handwritten Digits, test part)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return Handwriting(images=digits.images, labels=digits.target)


def split_sources(
    labels: NDArray[np.int64], *, worked: int, questions: int, rng: np.random.Generator
) -> dict[str, NDArray[np.int64]]:
    """Assign every source digit to exactly one split, with each digit equally often in `worked` and `questions`.

    Args:
        labels: shape `(sources,)`, 0 to 9.
        worked: sources for the worked examples, and `questions` for the questions: multiples of ten. The rest is for evaluation.

    Returns:
        Source indices by split name, sorted.
    """
    if worked % 10 or questions % 10:
        raise ValueError(f"Expected multiples of ten, as there are ten digits; got worked={worked}, questions={questions}.")
    assigned: dict[str, list[int]] = {name: [] for name in SPLITS}
    first, second = worked // 10, (worked + questions) // 10
    for digit in range(10):
        sources = rng.permutation(np.flatnonzero(labels == digit))
        if second >= len(sources):
            raise ValueError(
                f"worked={worked}, questions={questions} need {second} of the {len(sources)} sources of the digit {digit}, and at "
                "least one must remain for evaluation. Set fewer worked or question sources."
            )
        for name, part in zip(SPLITS, np.split(sources, [first, second]), strict=True):
            assigned[name] += part.tolist()
    return {name: np.array(sorted(sources)) for name, sources in assigned.items()}


def assert_disjoint(sources: dict[str, Any]) -> None:
    """Check that no handwritten digit is in two splits."""
    seen: set[int] = set()
    for split, indices in sources.items():
        shared = seen.intersection(map(int, indices))
        assert not shared, f"digits {sorted(shared)} of split {split} are in another split too"
        seen.update(map(int, indices))


def draw(handwriting: Handwriting, sources: Sequence[int], *, digit_size: int) -> Image.Image:
    """Draw digits, given by their indices, from left to right in an RGB image, `digit_size` pixels wide and high each."""
    ink = np.concatenate([handwriting.images[source] for source in sources], axis=1)
    paper = Image.fromarray((255 - ink * (255 / 16)).round().astype(np.uint8))
    return paper.resize((digit_size * len(sources), digit_size), Image.Resampling.BICUBIC).convert("RGB")


class QuestionKind(NamedTuple):
    """One kind of question about the digits of an image; ``work`` gives the steps as text and the ground truth of digits."""

    name: str
    text: str
    work: Callable[[Sequence[int]], tuple[str, str]]

    def ground_truth(self, digits: Sequence[int]) -> str:
        """The ground truth for digits read from left to right.

        >>> KINDS["sum"].ground_truth([3, 8, 1])
        '12'
        """
        return self.work(digits)[1]

    def worked_example(self, digits: Sequence[int]) -> str:
        """A worked example in three lines: the digits, the steps, the final answer.

        >>> print(KINDS["sum"].worked_example([3, 8, 1]))
        The digits are 3 8 1
        3 + 8 = 11 , 11 + 1 = 12
        Final answer: 12
        """
        steps, ground_truth = self.work(digits)
        return f"The digits are {' '.join(map(str, digits))}\n{steps}\nFinal answer: {ground_truth}"


def _sum(digits: Sequence[int]) -> tuple[str, str]:
    steps, total = [], digits[0]
    for digit in digits[1:]:
        steps.append(f"{total} + {digit} = {total + digit}")
        total += digit
    return " , ".join(steps), str(total)


def _order(digits: Sequence[int]) -> tuple[str, str]:
    ordered = [str(digit) for digit in sorted(digits)]
    return "In order " + " , ".join(ordered), " ".join(ordered)


def _double(digits: Sequence[int]) -> tuple[str, str]:
    steps = [f"{digit} + {digit} = {2 * digit}" for digit in digits]
    return " , ".join(steps), " ".join(str(2 * digit) for digit in digits)


_KINDS = (
    QuestionKind("sum", "What is the sum of all digits?", _sum),
    QuestionKind("order", "What are the digits from smallest to largest?", _order),
    QuestionKind("double", "What is twice each digit?", _double),
)
KINDS = {kind.name: kind for kind in _KINDS}
"""Every kind of question, by name.

Each ground truth depends on every digit, so that a misread image rarely leads to a correct final answer.
"""

"""What the jobs of a task and seed share, in files: the data, the warmed-up model and pairs of its own responses."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpo.models.small import small_internvl, small_processor
from preference.model import Pixels, Row, sample, token_logps
from preference.tasks import READING, TASKS, Task, draw_split, final_answer

EVAL = 1000  # half of them validate, half test
SAMPLES = 8
WIDTH, LAYERS, WARM_RATE, BATCH = 64, 2, 2e-3, 32


@dataclass
class Start:
    """The start of all jobs of a task and seed."""

    task: Task
    model: Any
    processor: Any
    questions: Pixels
    eval: Pixels
    samples: list[list[list[int]]]  # of `questions`
    numbers: dict[str, Any]
    ends: int
    probe: list[list[list[int]]] | None = None  # samples of the first evaluation questions
    paired: list[Any] | None = None  # the last job's pairs, and their log-probs under the start's model
    references: list[torch.Tensor] = field(default_factory=list)

    def right(self, split: Pixels, image: int, response: list[int]) -> bool:
        """Whether a response ends with the right final answer."""
        return response[-1:] == [self.ends] and final_answer(self.text(response)) == split.lines[image]["truth"]

    def text(self, response: list[int]) -> str:
        """The text of a response, without the end of the turn."""
        return str(self.processor.tokenizer.decode([token for token in response if token != self.ends]))

    def sample(self, split: Pixels, images: Sequence[int], *, n: int, temperature: float, seed: int) -> list[list[list[int]]]:
        """Responses of the model to the questions of images, as `preference.model.sample` gives them."""
        return sample(self.model, split, images, n=n, temperature=temperature, seed=seed, end=self.ends, limit=self.task.limit)

    def fit(
        self, split: Pixels, texts: Sequence[str], epochs: float, rate: float, seed: int, prompt: list[int] | None = None
    ) -> None:
        """Train the model to respond with texts to the first images, each to its own question or all to a prompt."""
        encoded = ([*self.processor.tokenizer(text, add_special_tokens=False)["input_ids"], self.ends] for text in texts)
        rows = [(i, prompt or split.prompts[split.lines[i]["kind"]], tokens) for i, tokens in enumerate(encoded)]
        fit_examples(self.model, split, rows, epochs, rate, seed)

    def freeze(self, *splits: Pixels) -> None:
        """Train tower and projector no longer, and keep what they make of the images of splits."""
        self.model.model.vision_tower.requires_grad_(False)
        self.model.model.multi_modal_projector.requires_grad_(False)
        for split in splits:
            split.freeze(self.model)


def train(model: Any, loss_of: Any, steps: int, rate: float, decay: float = 0.05) -> list[Any]:
    """Run AdamW with the schedule of the recipes: 5 % linear warm-up, then cosine to 0; gradients are clipped at norm 1.

    Args:
        model: trained in place.
        loss_of: loss of a step's number; its second value is kept.
        steps: number of steps.
        rate: peak learning rate.
        decay: weight decay, of matrices.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim > 1]
    others = [p for p in trained if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.999))
    warm = max(1, round(0.05 * steps))
    kept = []
    for step in range(steps):
        share = (step + 1) / warm if step < warm else 0.5 * (1 + np.cos(np.pi * (step - warm) / max(1, steps - warm)))
        for group in optimizer.param_groups:
            group["lr"] = rate * share
        loss, more = loss_of(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        kept.append(more)
    return kept


def order_of(count: int, steps: int, batch: int, seed: int) -> list[list[int]]:
    """Numbers of the examples of each step: epochs in random order."""
    rng, order = random.Random(seed), []
    while len(order) < steps * batch:
        order += rng.sample(range(count), count)
    return [order[step * batch : (step + 1) * batch] for step in range(steps)]


def fit_examples(model: Any, pixels: Pixels, rows: list[Row], epochs: float, rate: float, seed: int) -> None:
    """Train on rows with the mean of the tokens' cross-entropy."""
    steps = max(1, round(epochs * len(rows) / BATCH))
    order = order_of(len(rows), steps, BATCH, seed)

    def loss_of(step: int) -> tuple[torch.Tensor, None]:
        logps, mask = token_logps(model, pixels, [rows[i] for i in order[step]])
        return -logps.sum() / mask.sum(), None

    model.train()
    train(model, loss_of, steps, rate)
    model.eval()


def prepare(folder: Path, name: str, seed: int, *, epochs: float | None = None) -> Start:
    """Draw the data of a task, warm a model up and sample from it, unless the folder holds these.

    Args:
        folder: folder of all starts.
        name: name of the task in `TASKS`.
        seed: seed of data, weights, samples.
        epochs: epochs over the worked examples, instead of the task's.
    """
    torch.set_num_threads(1)
    task = TASKS[name]
    epochs = task.worked_epochs if epochs is None else epochs
    counts = {"worked": max(task.worked, task.reading), "questions": task.questions, "eval": EVAL}
    lines = draw_split(task, counts, seed)
    rng = np.random.default_rng([seed, 1])
    responses = [task.response(task.kinds[line["kind"]], line["digits"], rng) for line in lines["worked"]]
    reading = [f"The digits are {' '.join(map(str, line['digits']))}" for line in lines["worked"]]
    asked = [kind.text for kind in task.kinds]
    long = [f"The digits are 0\n{kind.work([1, 2, 3])[0]}\nFinal answer: 1" for kind in task.kinds]
    texts = [*asked, READING, *responses[:300], *long]
    model, processor = _untrained(texts, task.digits, seed)
    ends = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    pixels = {split: Pixels(processor, some, asked) for split, some in lines.items()}
    worked = pixels["worked"]
    start = Start(task, model, processor, pixels["questions"], pixels["eval"], [], {}, ends)
    path = folder / f"{task.base or name}_{seed}_{epochs:g}.pt"
    short_path = folder / f"{name}_{seed}_{epochs:g}.pt"
    samples_path = folder / f"{name}_{seed}_{epochs:g}_samples.pt"
    numbers_path = samples_path.with_suffix(".json")
    seconds = {}
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        if task.reading:
            prompt = Pixels(processor, lines["worked"][:1], [READING]).prompts[0]
            start.fit(worked, reading[: task.reading], task.reading_epochs, WARM_RATE, seed, prompt)
        start.freeze(worked)
        start.fit(worked, responses[: task.worked], epochs, WARM_RATE, seed)
        torch.save(model.state_dict(), path)
        seconds["warm_up"] = time.monotonic() - started
    model.load_state_dict(torch.load(path))
    if task.short:
        if not short_path.is_file():
            start.freeze(worked)
            mixed = [task.response(task.kinds[line["kind"]], line["digits"], rng, short=task.short) for line in lines["worked"]]
            start.fit(worked, mixed, task.short_epochs, WARM_RATE / 2, seed)
            torch.save(model.state_dict(), short_path)
        model.load_state_dict(torch.load(short_path))
    start.freeze(start.questions, start.eval)
    if not samples_path.is_file():
        started, everything = time.monotonic(), range(len(start.questions))
        start.samples = start.sample(start.questions, everything, n=SAMPLES, temperature=task.temperature, seed=seed)
        torch.save(start.samples, samples_path)
        seconds["sampling"] = time.monotonic() - started
        numbers_path.write_text(json.dumps({"seconds": seconds, **evaluate(start), **_shares(start)}) + "\n")
    start.samples = torch.load(samples_path)
    start.numbers = json.loads(numbers_path.read_text())
    return start


def _untrained(texts: Sequence[str], tiles: int, seed: int) -> tuple[Any, Any]:
    """A small InternVL and its processor, whose tokenizer is made of texts."""
    processor = small_processor(texts, image_size=32, patch_size=16, max_patches=tiles)
    sizes: dict[str, Any] = {"hidden_size": WIDTH, "layers": LAYERS, "vision_hidden_size": WIDTH, "vision_layers": LAYERS}
    return small_internvl(processor, **sizes, layer_scale_init_value=1.0, seed=seed), processor


def evaluate(start: Start, count: int | None = None) -> dict[str, Any]:
    """Respond to evaluation questions: greedily, and to the first half of them with a sample each.

    Args:
        start: the start, with the model as it is now.
        count: number of questions; None: all.

    Returns:
        `correct` (a string of 0 or 1 per question: the first half is for validation, the second the test), `unparsable`, `tokens`,
        `short` (responses without a reading), `read`, `sampled` (share of right samples).
    """
    count = len(start.eval) if count is None else count
    everything = range(count)
    greedy = [few[0] for few in start.sample(start.eval, everything, n=1, temperature=0.0, seed=0)]
    sampled = start.sample(start.eval, range(count // 2), n=1, temperature=1.0, seed=1)
    texts = [start.text(response) for response in greedy]
    correct = [int(start.right(start.eval, i, response)) for i, response in enumerate(greedy)]
    read = [
        text.startswith(f"The digits are {' '.join(map(str, start.eval.lines[i]['digits']))}\n") for i, text in enumerate(texts)
    ]
    right = [start.right(start.eval, i, response) for i, few in enumerate(sampled) for response in few]
    return {
        "correct": "".join(map(str, correct)),
        "unparsable": sum(final_answer(text) is None for text in texts),
        "tokens": sum(map(len, greedy)) / len(greedy),
        "short": sum(text.startswith("Final") for text in texts),
        "read": sum(read),
        "sampled": sum(right) / len(right),
    }


def _shares(start: Start) -> dict[str, Any]:
    shares, short, short_right, long_right, long = [], 0, 0, 0, 0
    for image, responses in enumerate(start.samples):
        verdicts = [start.right(start.questions, image, response) for response in responses]
        shares.append(sum(verdicts) / len(verdicts))
        for response, verdict in zip(responses, verdicts, strict=True):
            is_short = start.text(response).startswith("Final")
            short, short_right = short + is_short, short_right + (is_short and verdict)
            long, long_right = long + (not is_short), long_right + (not is_short and verdict)
    return {
        "all_right": shares.count(1.0),
        "all_wrong": shares.count(0.0),
        "questions": len(shares),
        "short_samples": [short_right, short],
        "long_samples": [long_right, long],
    }

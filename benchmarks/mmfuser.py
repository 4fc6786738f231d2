"""Compare four projectors of a small VLM on fine detail: plain, MMFuser, concatenated layers, and a wider one of equal parameters.

    python benchmarks/mmfuser.py                      # everything, about an hour of one thread; JSON and plot into results/
    python benchmarks/mmfuser.py --seeds 1 --quick    # a test of the script in a minute, with nothing learned
    python benchmarks/mmfuser.py --list               # list the jobs that are done

Task, sizes, metric and what decides were fixed before the run: mmfuser.md. Every job (one projector, one seed) is one JSON file in
the work folder: stop at any time and run the same command again. The photographs are those of scikit-image and scikit-learn.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np  # noqa: E402 (the environment comes first)
import torch  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from PIL import Image, ImageDraw, ImageFont  # noqa: E402
from torch import nn  # noqa: E402
from tqdm import tqdm, trange  # noqa: E402

from mpo.io import write_text  # noqa: E402
from mpo.models import add_fuser  # noqa: E402
from mpo.models.parts import freeze_parts  # noqa: E402
from mpo.models.small import small_internvl, small_processor  # noqa: E402

RESULTS = Path(__file__).parent / "results"
ARMS = {"plain": "projector only", "mmfuser": "MMFuser", "concat": "concatenated layers", "wide": "projector of equal parameters"}
TRAINED_ON = (
    "coffee.png",
    "chelsea.png",
    "motorcycle_left.png",
    "astronaut.png",
    "retina.jpg",
    "ihc.png",
    "gravel.png",
    "brick.png",
)
EVALUATED_ON = ("rocket.jpg", "camera.png", "hubble_deep_field.jpg", "china.jpg", "flower.jpg")
COLOURS = {"red": (220, 30, 30), "green": (20, 150, 40), "blue": (40, 60, 220), "yellow": (230, 200, 20), "black": (20, 20, 20)}
CELL = 16
"""Width in pixels of the part of an image that becomes one token, and of a card or a number: 1/36 of the image."""
PRETRAINING = 0
"""Its seed; reported seeds begin with 1."""
KINDS = ("digit", "label", "dots", "crosses")
Example = tuple[Image.Image, list[tuple[str, str, str]]]
"""An image, and its questions: kind, question, answer."""


@dataclass(frozen=True)
class Settings:
    """Sizes, fixed in mmfuser.md before the run: pixels, layers and widths, steps of pretraining and of each job."""

    size: int = 96
    patch: int = 8
    width: int = 64
    layers: int = 5
    levels: int = 2
    language_layers: int = 2
    word_steps: int = 800
    first_steps: int = 2400
    steps: int = 300
    batch: int = 32
    rate: float = 2e-3
    evaluated: int = 600


QUICK = Settings(width=32, layers=3, levels=1, word_steps=2, first_steps=2, steps=2, batch=4, evaluated=8)


@cache
def photograph(name: str) -> Image.Image:
    """A photograph of scikit-image or scikit-learn, 400 pixels high."""
    folders = [Path(str(find_spec(package).origin)).parent for package in ("skimage.data", "sklearn.datasets")]  # type: ignore[union-attr]
    (path,) = [path for path in (folders[0] / name, folders[1] / "images" / name) if path.is_file()]
    image = Image.open(path).convert("RGB")
    return image.resize((400 * image.width // image.height, 400))


@cache
def scans(evaluated: bool) -> tuple[Any, Any]:
    """Handwritten digits, 8 x 8, and what they are: the last 597 of 1,797 are for evaluation."""
    from sklearn.datasets import load_digits

    found = load_digits()
    chosen = slice(1200, None) if evaluated else slice(1200)
    return found.images[chosen], found.target[chosen]


def _digit(rng: np.random.Generator, evaluated: bool, pixels: int) -> tuple[Image.Image, str]:
    images, values = scans(evaluated)
    index = rng.integers(len(values))
    ink = Image.fromarray((255 - images[index] * 15.9).astype(np.uint8)).resize((pixels, pixels), Image.Resampling.BICUBIC)
    return ink, str(values[index])


def _places(rng: np.random.Generator, size: int, count: int, taken: Sequence[tuple[int, int, int]] = ()) -> list[tuple[int, int]]:
    """Corners of marks of 7 pixels that do not overlap each other or `taken` squares (x, y, side), within an image."""
    found = list(taken)
    while len(found) < len(taken) + count:
        x, y = (int(value) for value in rng.integers(0, size - 7, 2))
        if all(x + 7 <= a or a + side <= x or y + 7 <= b or b + side <= y for a, b, side in found):
            found.append((x, y, 7))
    return [(x, y) for x, y, _ in found[len(taken) :]]


def photo(rng: np.random.Generator, size: int, *, evaluated: bool, coarse: bool) -> Example:
    """A part of a photograph with digits on four coloured cards, and 1 to 5 dots; for `coarse`, large cards and no dots."""
    names = EVALUATED_ON if evaluated else TRAINED_ON
    which = int(rng.integers(len(names)))
    whole, side = photograph(names[which]), int(rng.integers(150, 400))
    x, y = (int(rng.integers(0, length - side + 1)) for length in whole.size)
    image = whole.resize((size, size), Image.Resampling.BILINEAR, (x, y, x + side, y + side))
    draw, card = ImageDraw.Draw(image), CELL * (1 + coarse)
    across = size // card
    cells = [(card * int(cell % across), card * int(cell // across)) for cell in rng.permutation(across**2)[:4]]
    questions = [("scene", "scene", "abcdefgh"[which])] if coarse else []
    for (x, y), colour in zip(cells, rng.permutation([*COLOURS]), strict=False):
        ink, value = _digit(rng, evaluated, card * 3 // 4)
        draw.rectangle((x, y, x + card - 1, y + card - 1), fill=COLOURS[colour])
        image.paste(ink, (x + card // 8, y + card // 8))
        questions.append(("digit", f"{colour} card", value))
    if coarse:
        return image, questions
    count = int(rng.integers(1, 6))
    for x, y in _places(rng, size, count, [(x, y, card) for x, y in cells]):
        draw.ellipse((x, y, x + 5, y + 5), fill=(255, 255, 255), outline=(0, 0, 0))
    return image, [*questions, ("dots", "dots", str(count))]


def chart(rng: np.random.Generator, size: int, *, evaluated: bool, coarse: bool) -> Example:
    """A bar chart with a number in each of its bars, which its height does not tell, and 1 to 5 small crosses."""
    image = Image.new("RGB", (size, size), tuple(int(value) for value in rng.integers(200, 256, 3)))
    draw, bars = ImageDraw.Draw(image), int(rng.integers(3, 6))
    heights, font = rng.permutation(size // CELL - 1)[:bars] + 1, ImageFont.load_default(size=12)
    draw.line((CELL - 2, 4, CELL - 2, size - 2, size - 2, size - 2), fill=(0, 0, 0))
    questions = []
    for place, (colour, height) in enumerate(zip(rng.permutation([*COLOURS]), heights, strict=False)):
        left, top, value = CELL * (place + 1), size - CELL * int(height), str(rng.integers(10))
        draw.rectangle((left + 1, top, left + CELL - 3, size - 3), fill=COLOURS[colour])
        x, y = (int(value) for value in rng.integers(0, 4, 2))
        draw.rectangle((left + 3, top + 2, left + CELL - 5, top + CELL - 3), fill=(255, 255, 255))
        draw.text((left + 3 + x, top - 1 + y), value, fill=(0, 0, 0), font=font)
        questions.append(("label", f"{colour} bar", value))
    if coarse:
        tallest = questions[int(heights.argmax())][1].removesuffix(" bar")
        return image, [("bars", "bars", str(bars)), ("tallest", "tallest", tallest)]
    count = int(rng.integers(1, 6))
    for x, y in _places(rng, size, count):
        for line in ((x, y, x + 4, y + 4), (x, y + 4, x + 4, y)):
            draw.line(line, fill=(200, 0, 200))
    return image, [*questions, ("crosses", "crosses", str(count))]


def examples(
    seed: Sequence[int], count: int, settings: Settings, *, evaluated: bool = False, coarse: bool = False
) -> list[Example]:
    """Examples of a seed, photographs and charts in turn."""
    rng = np.random.default_rng(seed)
    return [(photo, chart)[index % 2](rng, settings.size, evaluated=evaluated, coarse=coarse) for index in range(count)]


@cache
def processor(settings: Settings) -> Any:
    """The processor of all models: a tile of the size of an image."""
    words = [f"\n{colour} {what}:{colour}" for colour in COLOURS for what in ("card", "bar")]
    words += [f"\n{name}:" for name in ("dots", "crosses", "scene", "bars", "tallest")]
    text = "".join(words) * 20
    return small_processor([text], image_size=settings.size, patch_size=settings.patch, max_patches=1, vocab_size=400)


def encode(found: Sequence[Example], settings: Settings) -> dict[str, Any]:
    """Rows of all examples: image tokens, then each question with its answer; `answers`: (row, place, token, question's index)."""
    tokenizer, tokens = processor(settings).tokenizer, processor(settings).image_seq_length
    start = [
        tokenizer.convert_tokens_to_ids("<img>"),
        *[processor(settings).image_token_id] * tokens,
        tokenizer.convert_tokens_to_ids("</img>"),
    ]
    rows, answers, kinds = [], [], []
    for row, (_, questions) in enumerate(found):
        ids = list(start)
        for kind, question, answer in questions:
            ids += tokenizer.encode(f"\n{question}:", add_special_tokens=False)
            for token in tokenizer.encode(answer, add_special_tokens=False):
                answers.append((row, len(ids) - 1, token, len(kinds)))
                ids.append(token)
            kinds.append(kind)
        rows.append(ids)
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])  # what is right of a causal row has no effect
    mean, deviation = (torch.tensor(value).view(3, 1, 1) for value in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image, _ in found])).permute(0, 3, 1, 2) / 255
    return {"ids": ids, "pixels": (pixels - mean) / deviation, "answers": torch.tensor(answers), "kinds": kinds}


def logits_of(model: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    """Logits of all answers' tokens, shape (tokens, vocabulary)."""
    states = model.model(input_ids=batch["ids"], pixel_values=batch["pixels"]).last_hidden_state
    rows, places = batch["answers"][:, 0], batch["answers"][:, 1]
    return model.lm_head(states[rows, places])  # type: ignore[no-any-return]


def train(model: Any, seed: int, steps: int, settings: Settings, *, coarse: bool) -> list[float]:
    """Train on new examples at each step, the same for all models of a seed; returns the losses."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.rate, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.rate, total_steps=steps + 1, pct_start=0.1)
    losses = []
    for step in trange(steps, desc="first stage" if coarse else "training", unit="step", disable=None):
        batch = encode(examples([seed, int(coarse), step], settings.batch, settings, coarse=coarse), settings)
        loss = nn.functional.cross_entropy(logits_of(model.train(), batch), batch["answers"][:, 2])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def evaluate(model: Any, seed: int, settings: Settings, *, coarse: bool = False) -> dict[str, float]:
    """Accuracy by kind of question on unseen photographs, scans and charts. An answer is right when all its tokens are."""
    right: dict[str, list[bool]] = {}
    for part in range(0, settings.evaluated, 100):
        # the scenes of the first stage have names, so those are of the same photographs
        found = examples([seed, 2, part], min(100, settings.evaluated - part), settings, evaluated=not coarse, coarse=coarse)
        batch = encode(found, settings)
        hits = logits_of(model.eval(), batch).argmax(dim=-1) == batch["answers"][:, 2]
        wrong = set(batch["answers"][~hits, 3].tolist())
        for index, kind in enumerate(batch["kinds"]):
            right.setdefault(kind, []).append(index not in wrong)
    return {kind: float(np.mean(hits)) for kind, hits in right.items()}


def new_model(seed: int, settings: Settings) -> Any:
    """An untrained InternVL. Weights have a variance of 1 / inputs: with the usual 0.02, a model of this width learns slowly."""
    sizes = {"hidden_size": settings.width, "layers": settings.language_layers, "vision_hidden_size": settings.width}
    more = {"vision_layers": settings.layers, "layer_scale_init_value": 1.0, "max_position_embeddings": 256}
    model = small_internvl(processor(settings), **sizes, **more, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5, generator=generator)
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=1.0, generator=generator)
    nn.init.normal_(model.model.vision_tower.embeddings.position_embeddings, generator=generator)
    nn.init.normal_(model.lm_head.weight, std=0.02, generator=generator)
    return model


def with_arm(model: Any, arm: str, seed: int, settings: Settings) -> Any:
    """The model of the first stage with one of the projectors, and its tower frozen."""
    if arm in ("mmfuser", "concat"):
        heads = max(4, settings.width // 16)
        model = add_fuser(model, settings.levels, fusion=arm, num_heads=heads, seed=seed)
    if arm == "wide":
        extra = sum(p.numel() for p in with_arm(new_model(seed, settings), "mmfuser", seed, settings).model.fuser.parameters())
        widen(model.model.multi_modal_projector, extra, seed)
    freeze_parts(model, {"vision": "freeze"})
    return model


def widen(projector: Any, extra: int, seed: int) -> None:
    """Add hidden units with about `extra` parameters to a projector; as those of a fuser, they have no effect at first."""
    old_1, old_2 = projector.linear_1, projector.linear_2
    units = round(extra / (old_1.in_features + 1 + old_2.out_features))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        new_1 = nn.Linear(old_1.in_features, old_1.out_features + units)
        new_2 = nn.Linear(old_2.in_features + units, old_2.out_features)
        nn.init.normal_(new_1.weight, std=0.02)
        nn.init.zeros_(new_1.bias)
        nn.init.zeros_(new_2.weight)
        new_1.weight[: old_1.out_features], new_1.bias[: old_1.out_features] = old_1.weight, old_1.bias
        new_2.weight[:, : old_2.in_features] = old_2.weight
        new_2.bias.copy_(old_2.bias)
    projector.linear_1, projector.linear_2 = new_1, new_2


def read_words(model: Any, seed: int, settings: Settings) -> list[float]:
    """Let the language model alone learn to look up: places of an image hold the words of a colour and a number, others noise.

    It stands for a language model that has read before: four of the image's tokens are the sum of two words' embeddings.
    """
    parameters = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=settings.rate, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.rate, total_steps=settings.word_steps + 1, pct_start=0.1)
    tokenizer, tokens = processor(settings).tokenizer, processor(settings).image_seq_length
    blank, losses = Image.new("RGB", (settings.size, settings.size)), []
    for step in trange(settings.word_steps, desc="words", unit="step", disable=None):
        rng = np.random.default_rng([seed, 3, step])
        drawn = [(rng.permutation([*COLOURS])[:4], rng.integers(10, size=4)) for _ in range(settings.batch)]
        asked = [[("digit", f"{c} {rng.choice(('card', 'bar'))}", str(n)) for c, n in zip(*pair, strict=True)] for pair in drawn]
        batch = encode([(blank, questions) for questions in asked], settings)
        embed = model.get_input_embeddings()
        rows = embed(batch["ids"])
        image = torch.from_numpy(rng.standard_normal((len(drawn), tokens, settings.width))).float()
        for row, pair in enumerate(drawn):
            for place, colour, number in zip(rng.permutation(tokens), *pair, strict=False):
                words = [tokenizer.encode(str(word), add_special_tokens=False)[0] for word in (colour, number)]
                image[row, place] = image[row, place] * 0.3 + embed.weight[words].sum(dim=0)
        rows = torch.cat([rows[:, :1], image, rows[:, 1 + tokens :]], dim=1)
        states = model.model.language_model(inputs_embeds=rows).last_hidden_state
        logits = model.lm_head(states[batch["answers"][:, 0], batch["answers"][:, 1]])
        loss = nn.functional.cross_entropy(logits, batch["answers"][:, 2])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def pretrained(folder: Path, settings: Settings) -> Any:
    """The model that all jobs begin with: a language model that can look up, then a tower that reads large cards; trained once."""
    path, model = folder / "pretrained.pt", new_model(PRETRAINING, settings)
    if not path.is_file():
        started = time.process_time()
        words = read_words(model, PRETRAINING, settings)
        losses = train(model, PRETRAINING, settings.first_steps, settings, coarse=True)
        numbers = {"seconds": time.process_time() - started, "words": words[-20:], "losses": losses[-20:]}
        numbers["accuracy"] = evaluate(model, PRETRAINING, settings, coarse=True)
        write_text(folder / "pretrained.json", json.dumps(numbers, indent=1) + "\n")
        torch.save(model.state_dict(), path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


def run_job(folder: Path, arm: str, seed: int, settings: Settings) -> None:
    """Train and evaluate one arm from the first stage of its seed."""
    model = with_arm(pretrained(folder, settings), arm, seed, settings)
    counted = [
        p.numel()
        for n, p in model.named_parameters()
        if "vision_tower" not in n and "language_model" not in n and "lm_head" not in n
    ]
    started = time.process_time()
    losses = train(model, seed, settings.steps, settings, coarse=False)
    seconds = time.process_time() - started
    accuracy = evaluate(model, seed, settings)
    numbers = {"arm": arm, "seed": seed, "parameters": sum(counted), "seconds": seconds, "accuracy": accuracy}
    write_text(
        folder / f"{arm}_{seed}.json",
        json.dumps(numbers | {"mean": float(np.mean([accuracy[k] for k in KINDS])), "losses": losses}, indent=1) + "\n",
    )


def summarize(folder: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Accuracies of all arms and seeds, and the intervals of differences that mmfuser.md names."""
    from comparison.report import paired_interval

    found = {arm: [json.loads((folder / f"{arm}_{seed}.json").read_text()) for seed in seeds] for arm in ARMS}
    measures = ("mean", *KINDS)

    def values(arm: str, measure: str) -> list[float]:
        return [job["mean"] if measure == "mean" else job["accuracy"][measure] for job in found[arm]]

    pairs = [(arm, "plain") for arm in list(ARMS)[1:]] + [("mmfuser", "wide"), ("concat", "mmfuser")]
    return {
        "arms": {
            arm: {
                "parameters": jobs[0]["parameters"],
                "seconds": float(np.mean([job["seconds"] for job in jobs])),
                "loss": float(np.mean([np.mean(job["losses"][-20:]) for job in jobs])),
                **{measure: values(arm, measure) for measure in measures},
            }
            for arm, jobs in found.items()
        },
        "differences": {
            f"{first} - {second}": {name: paired_interval(values(first, name), values(second, name)) for name in measures}
            for first, second in pairs
        },
        "pretrained": json.loads((folder / "pretrained.json").read_text())["accuracy"],
    }


def table(summary: Mapping[str, Any]) -> str:
    """The summary as Markdown."""
    lines = [f"| projector | parameters | CPU s | accuracy, % | {' | '.join(KINDS)} |", f"|{'---|' * (4 + len(KINDS))}"]
    for arm, found in summary["arms"].items():
        shares = [f"{100 * np.mean(found[name]):.1f}" for name in ("mean", *KINDS)]
        lines.append(f"| {ARMS[arm]} | {found['parameters']:,} | {found['seconds']:.0f} | {' | '.join(shares)} |")
    lines += ["", f"| difference, points | all | {' | '.join(KINDS)} |", f"|{'---|' * (2 + len(KINDS))}"]
    for name, found in summary["differences"].items():
        cells = [f"{100 * one['mean']:+.1f}" for one in found.values()]
        if found["mean"]["low"] is not None:
            cells[0] += f" ({100 * found['mean']['low']:+.1f} to {100 * found['mean']['high']:+.1f})"
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(summary: Mapping[str, Any], path: Path) -> None:
    """Accuracy by kind of question: the mean of each projector, a dot per seed."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes, groups = figure.subplots(), ("mean", *KINDS)
    for place, (arm, found) in enumerate(summary["arms"].items()):
        middle = np.arange(len(groups)) + (place - 1.5) * 0.2
        axes.bar(middle, [100 * np.mean(found[name]) for name in groups], width=0.18, label=ARMS[arm], alpha=0.7)
        for x, name in zip(middle, groups, strict=True):
            axes.plot([x] * len(found[name]), [100 * value for value in found[name]], "k.", markersize=4)
    axes.set_xticks(range(len(groups)), ["all", *KINDS])
    axes.set_ylabel("accuracy, %")
    axes.legend(ncols=2, fontsize="small")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run what is missing, then write JSON, table and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="number of seeds, from 1 (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="use tiny sizes, to test the script only")
    parser.add_argument("--list", action="store_true", help="list the jobs that are done")
    parser.add_argument("--work", type=Path, help="folder of models and jobs (default: runs/mmfuser or runs/mmfuser_quick)")
    parser.add_argument(
        "--output", type=Path, default=RESULTS / "mmfuser", help="folder to write to (default: results/mmfuser here)"
    )
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error(f"--seeds must be 1 or more; got {options.seeds}.")
    settings, seeds = QUICK if options.quick else Settings(), range(1, options.seeds + 1)
    work = options.work or Path("runs") / ("mmfuser_quick" if options.quick else "mmfuser")
    work.mkdir(parents=True, exist_ok=True)
    same = work / "settings.json"
    if same.is_file() and json.loads(same.read_text()) != asdict(settings):
        raise SystemExit(f"{work} holds jobs of other sizes (see {same}). Remove it, or choose another --work.")
    write_text(same, json.dumps(asdict(settings), indent=1) + "\n")
    jobs = [(arm, seed) for seed in seeds for arm in ARMS]
    missing = [(arm, seed) for arm, seed in jobs if not (work / f"{arm}_{seed}.json").is_file()]
    if options.list:
        print("\n".join(f"{arm}, seed {seed}: {'missing' if (arm, seed) in missing else 'done'}" for arm, seed in jobs))
        return
    torch.set_num_threads(1)
    pretrained(work, settings)
    if (read := json.loads((work / "pretrained.json").read_text())["accuracy"]["digit"]) < 0.5 and not options.quick:
        raise SystemExit(
            f"The pretrained model reads {read:.0%} of large cards, and mmfuser.md wants half: raise its steps, and remove {work}."
        )
    for arm, seed in tqdm(missing, desc="jobs", unit="job"):
        run_job(work, arm, seed, settings)
    result = {
        "command": " ".join(["python benchmarks/mmfuser.py", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "device": f"{platform.machine()} CPU, one thread",
        "versions": {name: version(name) for name in ("torch", "transformers", "scikit-image", "scikit-learn", "mpo-trainer")},
        "settings": asdict(settings),
        "summary": summarize(work, seeds),
    }
    options.output.mkdir(parents=True, exist_ok=True)
    for arm, seed in jobs:  # each job's numbers, with its losses
        write_text(options.output / f"{arm}_{seed}.json", (work / f"{arm}_{seed}.json").read_text())
    write_text(options.output / "summary.json", json.dumps(result, indent=1) + "\n")
    plot(result["summary"], options.output / "summary.png")
    print(table(result["summary"]))


if __name__ == "__main__":
    main()

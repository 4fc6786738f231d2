"""A job: pairs of a start, one way to train on them, and what is measured; one JSON file."""

from __future__ import annotations

import random
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mpo.losses import Mixture, PairLogps
from preference.model import Pixels, Row, token_logps
from preference.start import SAMPLES, Start, evaluate, order_of, train

PROBED = 96  # pairs of evaluation questions whose log-probs are followed


@dataclass(frozen=True)
class Job:
    """One way to train from a start. The defaults are MPO as in the paper.

    Attributes:
        weights: of DPO, BCO and SFT.
        beta: of DPO and BCO.
        rate: peak learning rate.
        steps: optimizer steps.
        batch: pairs per step.
        shift: whether BCO has its reward shift.
        average: of SFT: over each completion (the paper), or over the tokens of the batch (TRL).
        max_pairs: pairs of a question.
        questions: questions that pairs are made of; None: all.
        accuracy: smallest and largest share of right samples of a question with pairs.
        choose: which pairs: `random`, or `near` and `far`: those that share most and least of their tokens.
        rounds: how often responses are sampled, from the model as it is then; steps are divided among the rounds. The reference
            is the model at the start of a round.
        epochs: epochs of the warm-up over its worked examples; None: the task's.
    """

    weights: tuple[float, float, float] = (0.8, 0.2, 1.0)
    beta: float = 0.1
    rate: float = 1e-4
    steps: int = 100
    batch: int = 32
    shift: bool = True
    average: str = "completion"
    max_pairs: int = 4
    questions: int | None = None
    accuracy: tuple[float, float] = (0.0, 1.0)
    choose: str = "random"
    rounds: int = 1
    epochs: float | None = None

    def mixture(self) -> Mixture:
        """The losses with a weight."""
        named = [(name, weight) for name, weight in zip(("sigmoid", "bco_pair", "sft"), self.weights, strict=True) if weight]
        shift = "running_mean" if self.shift and self.weights[1] else "none"
        return Mixture.from_trl(
            [n for n, _ in named], [w for _, w in named], beta=self.beta, reward_shift=shift, sft_average=self.average
        )


METHODS: dict[str, dict[str, Any]] = {
    "sft": {"weights": (0.0, 0.0, 1.0)},
    "dpo": {"weights": (1.0, 0.0, 0.0)},
    "bco": {"weights": (0.0, 1.0, 0.0)},
    "dpo_sft": {"weights": (1.0, 0.0, 1.0)},
    "bco_sft": {"weights": (0.0, 1.0, 1.0)},
    "mpo_no_delta": {"shift": False},
    "mpo": {},
}


@dataclass(frozen=True)
class Pair:
    """A chosen and a rejected response to the question of an image, in tokens."""

    image: int
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def shared(self) -> int:
        """Tokens before the first that differs."""
        same = (a == b for a, b in zip(self.chosen, self.rejected, strict=False))
        return next((i for i, equal in enumerate(same) if not equal), min(len(self.chosen), len(self.rejected)))

    @property
    def rows(self) -> tuple[Row, Row]:
        """Both as rows of a batch."""
        return (self.image, self.prompt, self.chosen), (self.image, self.prompt, self.rejected)


def make_pairs(start: Start, split: Pixels, samples: dict[int, list[list[int]]], job: Job, seed: int) -> list[Pair]:
    """Pair right with wrong samples as `mpo.pipelines.mmpr.pair` does: distinct ones, all with all, `max_pairs` at random."""
    pairs = []
    for image, responses in samples.items():
        distinct = list({tuple(one): one for one in responses}.values())
        verdicts = [start.right(split, image, one) for one in responses]
        if not job.accuracy[0] <= sum(verdicts) / len(verdicts) <= job.accuracy[1]:
            continue
        right = [one for one in distinct if start.right(split, image, one)]
        wrong = [one for one in distinct if not start.right(split, image, one)]
        prompt = split.prompts[split.lines[image]["kind"]]
        found = [Pair(image, prompt, one, other) for one in right for other in wrong]
        random.Random(f"{seed}/{image}").shuffle(found)
        if job.choose != "random":
            found.sort(key=lambda pair: pair.shared / len(pair.chosen), reverse=job.choose == "near")
        pairs += found[: job.max_pairs]
    return pairs


def pair_logps(model: Any, pixels: Pixels, pairs: list[Pair]) -> tuple[Tensor, Tensor]:
    """Log-probs of tokens, shape (2, pairs, tokens), chosen before rejected, and their mask."""
    rows = [pair.rows[side] for side in (0, 1) for pair in pairs]
    logps, mask = token_logps(model, pixels, rows)
    return logps.view(2, len(pairs), -1), mask.view(2, len(pairs), -1)


@torch.no_grad()
def all_logps(model: Any, pixels: Pixels, pairs: list[Pair]) -> list[Tensor]:
    """Summed log-probs of all pairs, chosen and rejected, shape (2,) each."""
    found: list[Tensor] = []
    for place in range(0, len(pairs), 128):
        found += list(pair_logps(model, pixels, pairs[place : place + 128])[0].sum(-1).T)
    return found


def run(start: Start, job: Job, seed: int, count: int | None = None) -> dict[str, Any]:
    """Train the start's model, which is restored afterwards, with a job, and measure it on `count` evaluation questions."""
    begun, before = time.process_time(), {name: value.clone() for name, value in start.model.state_dict().items()}
    torch.manual_seed(seed)
    model, images = start.model, list(range(len(start.questions)))[: job.questions]
    if start.probe is None:
        start.probe = start.sample(start.eval, range(min(300, len(start.eval))), n=4, temperature=1.0, seed=7)
    probe = make_pairs(start, start.eval, dict(enumerate(start.probe)), Job(max_pairs=1), 0)[:PROBED]
    reference_tokens = pair_logps(model, start.eval, probe)[0].detach()
    result: dict[str, Any] = {"job": asdict(job), "seed": seed, "probe": [], "train": [], "gradients": []}
    mixture = job.mixture()
    for number in range(job.rounds):
        samples = start.samples
        if number:
            again = {"n": SAMPLES, "temperature": start.task.temperature, "seed": seed + number}
            samples = start.sample(start.questions, images, **again)
        pairs = make_pairs(start, start.questions, {i: samples[i] for i in images}, job, seed)
        if not pairs:
            break
        result.setdefault("pairs", []).append(_about(pairs))
        references = start.references if number == 0 and start.paired == pairs else all_logps(model, start.questions, pairs)
        if number == 0:
            start.paired, start.references = pairs, references
        steps = job.steps // job.rounds
        order = order_of(len(pairs), steps, job.batch, seed + number)

        def terms(chosen: list[int], mixture: Mixture = mixture, pairs: list[Pair] = pairs, references: list[Tensor] = references):  # type: ignore[no-untyped-def] # noqa: ANN202
            some = [pairs[i] for i in chosen]
            tokens, mask = pair_logps(model, start.questions, some)
            sums, counts = tokens.sum(-1), mask.sum(-1)
            reference = torch.stack([references[i] for i in chosen]).T
            return PairLogps(sums[0], sums[1], reference[0], reference[1], counts[0], counts[1])

        def loss_of(step: int, steps: int = steps, order: list[list[int]] = order, terms: Any = terms) -> tuple[Tensor, Any]:
            if step in (0, steps // 3):
                result["probe"].append(_probe(model, start.eval, probe, reference_tokens, job))
                result["gradients"].append(_gradients(model, mixture, terms(order[step])))
            logps = terms(order[step])
            output = mixture(logps)
            margin = (logps.chosen_logratio - logps.rejected_logratio).detach()
            moved = [logps.chosen_logratio.mean().item(), logps.rejected_logratio.mean().item(), (margin > 0).float().mean().item()]
            return output.loss, [round(value, 3) for value in moved]

        model.train()
        result["train"] += train(model, loss_of, steps, job.rate)[:: max(1, steps // 20)]
        model.eval()
    result["probe"].append(_probe(model, start.eval, probe, reference_tokens, job))
    trained = time.process_time()
    result |= evaluate(start, count)
    model.load_state_dict(before)
    result["seconds"] = {"training": trained - begun, "measuring": time.process_time() - trained}
    return result


def _about(pairs: list[Pair]) -> dict[str, float]:
    return {
        "pairs": len(pairs),
        "questions": len({pair.image for pair in pairs}),
        "tokens": sum(len(pair.chosen) for pair in pairs) / len(pairs),
        "shared": sum(pair.shared / len(pair.chosen) for pair in pairs) / len(pairs),
    }


@torch.no_grad()
def _probe(model: Any, pixels: Pixels, pairs: list[Pair], reference: Tensor, job: Job) -> dict[str, list[float]]:
    """Mean change of log-probs since the start, of chosen and rejected: before the first token that differs, at it, after it."""
    tokens, mask = pair_logps(model, pixels, pairs)
    change = tokens - reference
    places = torch.arange(tokens.shape[-1])
    first = torch.tensor([pair.shared for pair in pairs]).unsqueeze(1)
    parts = {"before": places < first, "first": places == first, "after": places > first}
    found = {name: (change * part * mask).sum(-1).mean(-1).tolist() for name, part in parts.items()}
    total = change.sum(-1)
    found["sum"] = total.mean(-1).tolist()
    found["accuracy"] = [(total[0] > total[1]).float().mean().item()]
    # |d loss / d logits| summed over tokens, up to a factor of 2: coefficient of the token's log-prob times (1 - its probability)
    away = (1 - tokens.exp()) * mask
    slope = job.weights[0] * job.beta * torch.sigmoid(-job.beta * (total[0] - total[1])) / len(pairs)
    by_part = {
        f"gradient_{name}": [(slope * (away * part).sum(-1)[side]).sum().item() for side in (0, 1)] for name, part in parts.items()
    }
    sft = job.weights[2] * (away[0] / mask[0].sum(-1, keepdim=True)) / len(pairs)
    by_part |= {f"gradient_sft_{name}": [(sft * part).sum().item()] for name, part in parts.items()}
    return {name: [round(value, 5) for value in values] for name, values in (found | by_part).items()}


def _gradients(model: Any, mixture: Mixture, logps: PairLogps) -> dict[str, Any]:
    """Norm of the gradient of each weighted term, and the cosine of preference terms and SFT."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = {}
    shift = mixture.reward_shift
    state = None if shift is None else {name: value.clone() for name, value in shift.state_dict().items()}
    for weight, loss in zip(mixture.weights, mixture.losses, strict=True):
        gradients = torch.autograd.grad(weight * loss(logps).mean(), parameters, retain_graph=True, allow_unused=True)
        found[loss.name] = torch.cat([g.flatten() for g in gradients if g is not None])
    if shift is not None and state is not None:
        shift.load_state_dict(state)
    result = {str(name): gradient.norm().item() for name, gradient in found.items()}
    if "sft" in found and len(found) > 1:
        preference = torch.stack([gradient for name, gradient in found.items() if name != "sft"]).sum(0)
        result["cosine"] = torch.cosine_similarity(preference, found["sft"], dim=0).item()
        result["preference"] = preference.norm().item()
    return {name: round(value, 5) for name, value in result.items()}

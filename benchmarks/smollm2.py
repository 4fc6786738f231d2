"""SFT, DPO + SFT and MPO on a real language model's own responses: SmolLM2-135M-Instruct, text only, with LoRA.

    python benchmarks/smollm2.py                      # the registered run (methods2.md); hours on a CPU; JSON into results/smollm2/
    python benchmarks/smollm2.py --quick --out runs/smollm2_quick     # a test of the script in minutes; numbers are meaningless
    python benchmarks/gpu.py --steps smollm2          # five seeds on a GPU

Questions are drawn by a program (preference/problems.py); three templates of each kind are in the test alone. For each seed: LoRA
on worked examples, merged (the start); 8 samples of each question; pairs of a right and a wrong one; then each method from the same
start, with the same pairs in the same order. Seed 0 chooses each method's rate by its accuracy on validation questions. Every
finished job leaves a JSON file and is not run again: stop at any time and run the same command again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402 (the environment comes first)
from peft import LoraConfig, get_peft_model  # noqa: E402
from preference.problems import KINDS, Problem, draw_problems, is_right  # noqa: E402
from preference.start import order_of, train  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache  # noqa: E402

from mpo.losses import Mixture, PairLogps  # noqa: E402
from mpo.models.smollm2 import GGUF_FILE, smollm2_folder  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "smollm2"
METHODS = {"sft": (0.0, 0.0, 1.0), "dpo_sft": (1.0, 0.0, 1.0), "mpo": (0.8, 0.2, 1.0)}
RATES = (3e-5, 1e-4, 3e-4)
CHOOSING = 0


@dataclass(frozen=True)
class Sizes:
    """Sizes of the run.

    Attributes:
        worked: worked examples of the warm-up.
        questions: questions that are sampled.
        validation: further questions of the same templates, which choose the rates.
        test: questions of the test's templates.
        samples: responses of each question, at temperature 1.
        max_pairs: pairs of a question.
        steps: optimizer steps of each method.
        batch: pairs of a step.
        rank: rank of LoRA, on every linear layer.
        warm_rate: learning rate of the warm-up.
        new_tokens: longest response, in tokens.
    """

    worked: int = 300
    questions: int = 3000
    validation: int = 300
    test: int = 600
    samples: int = 8
    max_pairs: int = 1
    steps: int = 40
    batch: int = 16
    rank: int = 16
    warm_rate: float = 3e-4
    new_tokens: int = 32


QUICK = Sizes(worked=16, questions=24, validation=6, test=6, steps=2, batch=4)


class Lab:
    """A model, its tokenizer and its device."""

    def __init__(self, device: str) -> None:
        folder = smollm2_folder()
        self.device, self.tokenizer = device, AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_FILE)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF_FILE, dtype=torch.float32)
        self.model = self.model.to(device, torch.bfloat16).eval()
        self.end = self.tokenizer.convert_tokens_to_ids("<|im_end|>")

    def prompt(self, problem: Problem) -> list[int]:
        """Tokens of a prompt."""
        text = f"<|im_start|>user\n{problem.question}<|im_end|>\n<|im_start|>assistant\n"
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def encoded(self, text: str) -> list[int]:
        """Tokens of a response, with the end of the turn."""
        return [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.end]

    def with_adapter(self, rank: int, seed: int) -> Any:
        """The model with a new adapter on every linear layer."""
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(self.model, config)

    def logps(self, model: Any, rows: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
        """Summed log-probs of completions and their numbers of tokens, of rows (prompt, completion); shape (rows,)."""
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor([*a, *b]) for a, b in rows], batch_first=True).to(self.device)
        steps = torch.arange(ids.shape[1] - 1)
        starts, ends = (
            torch.tensor(values).unsqueeze(1) for values in zip(*((len(a), len(a) + len(b)) for a, b in rows), strict=True)
        )
        labelled = ((steps >= starts - 1) & (steps < ends - 1)).to(self.device)
        with torch.autocast(self.device, torch.bfloat16):
            hidden = model.get_base_model().model(input_ids=ids, use_cache=False).last_hidden_state
            logits = model.get_base_model().lm_head(hidden[:, :-1][labelled])
        tokens = -torch.nn.functional.cross_entropy(logits.float(), ids[:, 1:][labelled], reduction="none")
        row = labelled.nonzero()[:, 0]
        return torch.zeros(len(rows), device=self.device).index_add(0, row, tokens), labelled.sum(1)

    @torch.no_grad()
    def sample(
        self, model: Any, problems: Sequence[Problem], n: int, temperature: float, seed: int, sizes: Sizes
    ) -> list[list[str]]:
        """Sample responses, in batches of prompts of similar length, which are padded on the left."""
        generator = torch.Generator(self.device).manual_seed(seed)
        prompts = [self.prompt(problem) for problem in problems]
        order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
        size = max(1, (384 if self.device == "cpu" else 4096) // n)
        found: dict[int, list[str]] = {}
        for start in range(0, len(order), size):
            some = order[start : start + size]
            width = max(len(prompts[place]) for place in some)
            padding = torch.tensor([width - len(prompts[place]) for place in some], device=self.device)
            ids = torch.tensor([[self.end] * (width - len(prompts[place])) + prompts[place] for place in some], device=self.device)
            mask = (torch.arange(width, device=self.device) >= padding.unsqueeze(1)).long()
            cache = DynamicCache(config=self.model.config)
            hidden = self._hidden(model, ids, mask, cache).repeat_interleave(n, 0)
            mask = mask.repeat_interleave(n, 0)
            cache.batch_repeat_interleave(n)
            tokens, live = [], torch.ones(len(hidden), dtype=torch.bool, device=self.device)
            for _ in range(sizes.new_tokens):
                logits = self.model.lm_head(hidden.to(torch.bfloat16)).float()
                if temperature:
                    noise = torch.empty_like(logits).exponential_(generator=generator)  # the Gumbel maximum, without sorting
                    logits = logits / temperature - noise.log()
                token = torch.where(live, logits.argmax(-1), self.end)
                tokens.append(token)
                live = live & (token != self.end)
                if not live.any():
                    break
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
                hidden = self._hidden(model, token.unsqueeze(1), mask, cache)
            rows = torch.stack(tokens, 1).tolist()
            texts = [self.tokenizer.decode(row[: row.index(self.end)] if self.end in row else row) for row in rows]
            for place, member in enumerate(some):
                found[member] = texts[place * n : (place + 1) * n]
        return [found[place] for place in range(len(prompts))]

    def _hidden(self, model: Any, ids: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
        """States of the last position; positions are counted without padding."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with torch.autocast(self.device, torch.bfloat16):
            output = model(input_ids=ids, attention_mask=mask, position_ids=positions, cache=cache, use_cache=True)
        return output.last_hidden_state[:, -1]

    def accuracy(self, model: Any, problems: Sequence[Problem], sizes: Sizes) -> dict[str, Any]:
        """Greedy responses: which are right (a string of 0 or 1), and right and total by kind."""
        texts = [few[0] for few in self.sample(model, problems, 1, 0.0, 0, sizes)]
        right = [is_right(text, problem.answer) for text, problem in zip(texts, problems, strict=True)]
        kinds = {kind: [r for r, problem in zip(right, problems, strict=True) if problem.kind == kind] for kind in KINDS}
        return {
            "correct": "".join(str(int(one)) for one in right),
            "kinds": {kind: [sum(of), len(of)] for kind, of in kinds.items()},
            "without_answer": sum("answer is" not in text for text in texts),
        }


def problems_of(seed: int, sizes: Sizes) -> dict[str, list[Problem]]:
    """The problems of a seed: `worked`, `questions` and `validation` are disjoint, `test` has other templates."""
    drawn = draw_problems(sizes.worked + sizes.questions + sizes.validation, seed, test=False)
    parts = {"worked": drawn[: sizes.worked], "questions": drawn[sizes.worked : sizes.worked + sizes.questions]}
    return parts | {"validation": drawn[-sizes.validation :], "test": draw_problems(sizes.test, seed, test=True)}


def start_of(lab: Lab, seed: int, work: Path, out: Path, sizes: Sizes) -> dict[str, Any]:
    """Warm up, merge into the lab's model, sample and pair, unless the files of the seed exist; the lab must be new."""
    problems, path = problems_of(seed, sizes), work / f"start_{seed}.pt"
    work.mkdir(parents=True, exist_ok=True)
    begun = time.process_time()
    if not path.is_file():
        model = lab.with_adapter(sizes.rank, seed)
        rows = [(lab.prompt(problem), lab.encoded(problem.worked)) for problem in problems["worked"]]
        steps = max(1, len(rows) // sizes.batch)
        order = order_of(len(rows), steps, sizes.batch, seed)

        def loss_of(step: int) -> tuple[Tensor, None]:
            sums, counts = lab.logps(model, [rows[i] for i in order[step]])
            return -sums.sum() / counts.sum(), None

        train(model, loss_of, steps, sizes.warm_rate)
        lab.model = model.merge_and_unload()
        save_tensors(lab.model.state_dict(), path)
    lab.model.load_state_dict(torch.load(path, map_location=lab.device))
    lab.model.eval()
    samples = sampled(lab, problems["questions"], work / f"samples_{seed}.json", seed, sizes)
    pairs = []
    rng = random.Random(seed)
    shares = []
    for problem, texts in zip(problems["questions"], samples, strict=True):
        verdicts = {text: is_right(text, problem.answer) for text in texts}
        shares.append(sum(is_right(text, problem.answer) for text in texts) / len(texts))
        found = [(a, b) for a, right in verdicts.items() for b, other in verdicts.items() if right and not other]
        for chosen, rejected in rng.sample(found, min(len(found), sizes.max_pairs)):
            pairs.append((lab.prompt(problem), lab.encoded(chosen), lab.encoded(rejected)))
    about = out / f"start_{seed}.json"
    if not about.is_file():
        measured = {split: lab.accuracy(lab.model.model, problems[split], sizes) for split in ("validation", "test")}
        counts = {"questions": len(samples), "pairs": len(pairs), "all_right": shares.count(1.0), "all_wrong": shares.count(0.0)}
        write(
            about,
            {"seed": seed, **measured, **counts, "sampled": sum(shares) / len(shares), "seconds": time.process_time() - begun},
        )
    return {"problems": problems, "pairs": pairs}


def sampled(lab: Lab, problems: Sequence[Problem], path: Path, seed: int, sizes: Sizes) -> list[list[str]]:
    """Sample responses to questions, a part at a time, and keep them in a file: an interrupted run continues."""
    found: list[list[str]] = json.loads(path.read_text()) if path.is_file() else []
    part = 480
    for start in range(len(found), len(problems), part):
        few = lab.sample(lab.model.model, problems[start : start + part], sizes.samples, 1.0, 10_000 * seed + start, sizes)
        found += few
        write(path, found)
    return found


def run_job(lab: Lab, start: dict[str, Any], method: str, rate: float, seed: int, sizes: Sizes) -> dict[str, Any]:
    """Train an adapter with a method, measure it, and remove it."""
    begun, pairs = time.process_time(), start["pairs"]
    weights = METHODS[method]
    named = [(name, weight) for name, weight in zip(("sigmoid", "bco_pair", "sft"), weights, strict=True) if weight]
    shift = "running_mean" if weights[1] else "none"
    mixture = Mixture.from_trl([name for name, _ in named], [weight for _, weight in named], beta=0.1, reward_shift=shift)
    mixture = mixture.to(lab.device)
    model = lab.with_adapter(sizes.rank, seed)
    order = order_of(len(pairs), sizes.steps, sizes.batch, seed)

    def loss_of(step: int) -> tuple[Tensor, Any]:
        some = [pairs[i] for i in order[step]]
        rows = [(one[0], one[side]) for side in (1, 2) for one in some]
        reference = torch.zeros(2, len(some), device=lab.device)
        if mixture.needs_reference:
            with torch.no_grad(), model.disable_adapter():
                reference = lab.logps(model, rows)[0].view(2, -1)
        sums, counts = lab.logps(model, rows if mixture.needs_reference else rows[: len(some)])
        sums, counts = (values.expand(2, -1) if len(values) == len(some) else values.view(2, -1) for values in (sums, counts))
        logps = PairLogps(sums[0], sums[1], reference[0], reference[1], counts[0], counts[1])
        moved = [logps.chosen_logratio.mean().item(), logps.rejected_logratio.mean().item()] if mixture.needs_reference else []
        return mixture(logps).loss, moved

    kept = train(model, loss_of, sizes.steps, rate)
    trained = time.process_time()
    model.eval()
    measured = {
        split: lab.accuracy(model.get_base_model().model, start["problems"][split], sizes) for split in ("validation", "test")
    }
    lab.model = model.unload()
    seconds = {"training": trained - begun, "measuring": time.process_time() - trained}
    return {"method": method, "rate": rate, "seed": seed, **measured, "moved": kept[-3:], "seconds": seconds}


def name_of(method: str, rate: float, seed: int) -> str:
    """The name of a job's file."""
    return f"{method}_{rate:.0e}_{seed}"


def run_all(out: Path, work: Path, seeds: int, sizes: Sizes, device: str, methods: Sequence[str] = tuple(METHODS)) -> None:
    """Run the jobs that are not done: rates on seed 0, then the seeds."""
    out.mkdir(parents=True, exist_ok=True)
    for seed in range(seeds + 1):
        chosen = {method: RATES if seed == CHOOSING else (chosen_rate(out, method),) for method in methods}
        jobs = [(method, rate) for method, rates in chosen.items() for rate in rates]
        jobs = [job for job in jobs if not (out / f"{name_of(*job, seed)}.json").is_file()]
        if not jobs:
            continue
        lab = Lab(device)
        start = start_of(lab, seed, work, out, sizes)
        for method, rate in jobs:
            result = run_job(lab, start, method, rate, seed, sizes)
            write(out / f"{name_of(method, rate, seed)}.json", result)
            right = {split: share(result, split) for split in ("validation", "test")}
            print(f"seed {seed}, {method}, {rate:.0e}: {right}, {result['seconds']}", flush=True)


def share(result: dict[str, Any], split: str) -> float:
    """Accuracy in percent."""
    correct = result[split]["correct"]
    return float(100 * correct.count("1") / len(correct))


def chosen_rate(out: Path, method: str) -> float:
    """The rate with the highest accuracy on the validation questions of seed 0; the lowest in case of ties."""
    found = {rate: json.loads((out / f"{name_of(method, rate, CHOOSING)}.json").read_text()) for rate in RATES}
    return max(RATES, key=lambda rate: share(found[rate], "validation"))


def write(path: Path, content: Any) -> None:
    """Replace a JSON file atomically."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(content) + "\n", encoding="utf-8")
    new.replace(path)


def save_tensors(state: Any, path: Path) -> None:
    """Save tensors atomically."""
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2, metavar="N", help="seeds besides seed 0 (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="use tiny sizes, to test the script only")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="device (default: %(default)s)")
    parser.add_argument("--work", type=Path, help="folder of start models and samples (default: runs/smollm2)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of JSON files (default: results/smollm2 here)")
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error(f"--seeds must be 1 or more; got {options.seeds}.")
    if options.quick and options.out == RESULTS:
        parser.error("--quick needs another --out: its numbers mean nothing.")
    if options.device == "cpu":
        torch.set_num_threads(1)
    sizes = QUICK if options.quick else Sizes()
    run_all(options.out, options.work or Path("runs/smollm2" + "_quick" * options.quick), options.seeds, sizes, options.device)


if __name__ == "__main__":
    main()

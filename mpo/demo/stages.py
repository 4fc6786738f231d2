"""Stages 2 to 9: warm up, evaluate, sample, pair, train with MPO, evaluate again; train the control and evaluate it."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, List, Value
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from mpo.demo.data import KINDS
from mpo.demo.folder import DemoFolder, DemoSettings
from mpo.evaluation.statistics import compare_paired, wilson_interval
from mpo.generation.local import LocalGenerator
from mpo.io import read_json_lines, write_json_lines
from mpo.models.loading import load_model
from mpo.models.small import small_internvl, small_processor
from mpo.pipelines.mmpr.output import mmpr_line
from mpo.pipelines.mmpr.pair import Pair
from mpo.pipelines.mmpr.sample import Sample
from mpo.pipelines.mmpr.verify import Verify
from mpo.pipelines.step import Dropped
from mpo.schema import Question
from mpo.training.job import TrainJob, run_train_job
from mpo.training.sft import PackedSFTTrainer
from mpo.training.sft_config import PackedSFTConfig
from mpo.verification import verify

MAX_NEW_TOKENS = 64
"""Maximum length of a response in tokens; worked examples have about 35."""

RESPONSES_PER_BATCH = 400
_MESSAGES = List({"role": Value("string"), "content": Value("string")})
_FEATURES = Features({"images": List(Image()), "prompt": _MESSAGES, "completion": _MESSAGES})


def warm_up(folder: DemoFolder, settings: DemoSettings) -> dict[str, Any]:
    """Build the model and train it on the worked examples with PackedSFTTrainer.

    Returns:
        The numbers of parameters, tokens and steps, and the last loss.
    """
    lines = read_json_lines(folder.lines("worked"))
    texts = [line[text] for text in ("question", "worked_example") for line in lines]
    tiles = {"image_size": settings.tile_size, "patch_size": settings.patch_size, "max_patches": settings.digits_per_image}
    processor = small_processor(texts, **tiles)
    model = small_internvl(
        processor,
        hidden_size=settings.hidden_size,
        layers=settings.layers,
        vision_hidden_size=settings.hidden_size,
        vision_layers=settings.layers,
        layer_scale_init_value=1.0,  # a small tower trained from scratch learns faster with a large one
        seed=settings.seed,
    )
    trainer = train_on_examples(
        model,
        processor,
        [{**line, "image": str(folder.data / line["image"]), "text": line["worked_example"]} for line in lines],
        folder.warm,
        num_train_epochs=settings.warm_epochs,
        per_device_train_batch_size=settings.warm_batch,
        learning_rate=settings.warm_learning_rate,
        seed=settings.seed,
    )
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens": len(processor.tokenizer),
        "steps": trainer.state.global_step,
        "last_loss": losses[-1] if losses else None,
    }


def sample(folder: DemoFolder, settings: DemoSettings) -> dict[str, Any]:
    """Sample several responses to each question from the warmed-up model, at temperature 1."""
    step = Sample(
        _generator(folder.warm, "sampling"),
        prompt="plain",
        name="warm",
        n=settings.responses_per_question,
        max_new_tokens=MAX_NEW_TOKENS,
        seed=settings.seed,
    )
    samples = step(
        {
            "id": line["id"],
            "messages": [{"role": "user", "content": line["question"]}],
            "images": [folder.data / line["image"]],
            "ground_truths": [line["ground_truth"]],
        }
        for line in read_json_lines(folder.lines("questions"))
    )
    for one in samples:
        one["images"] = [str(Path(image).relative_to(folder.data.absolute())) for image in one["images"]]
    write_json_lines(folder.samples, samples)
    return {"responses": sum(len(one["responses"]) for one in samples)}


def pair(folder: DemoFolder, settings: DemoSettings) -> dict[str, Any]:
    """Pair correct with incorrect responses, judged by their final answer."""
    verify, pairing = Verify(format="line"), Pair(max_pairs=settings.max_pairs, seed=settings.seed)
    pairs: list[dict[str, Any]] = []
    counts, responses, kinds = Counter[str](), Counter[str](), Counter[str]()
    for record in read_json_lines(folder.samples):
        judged = verify.finish({**record, "images": [str(folder.data / image) for image in record["images"]]}, ())
        responses.update([response["verdict"] for response in judged["responses"]])
        counts.update(all_right=judged["accuracy"] == 1, all_wrong=judged["accuracy"] == 0)
        try:
            made = pairing.finish(judged, ())
        except Dropped:
            continue
        counts.update(paired=1)
        kinds.update(one["rejected_meta"]["negative"] for one in made)
        pairs += [mmpr_line({**one, "id": f"{one['id']}/{number}"}, str(folder.root)) for number, one in enumerate(made)]
    if not pairs:
        raise ValueError(
            f"No question has both a correct and an incorrect response: {counts['all_right']} have only correct and "
            f"{counts['all_wrong']} only incorrect ones. Choose another --seed."
        )
    write_json_lines(folder.pairs, pairs)
    return {"pairs_total": len(pairs), **counts, "responses": {**responses}, "pairs": {**kinds}}


def train_mpo(folder: DemoFolder, settings: DemoSettings) -> dict[str, Any]:
    """Train the warmed-up model on the pairs with `mpo train experiment=demo`. Resumes from the newest checkpoint."""
    return train_on_pairs(folder, settings, folder.mpo)


def train_sft(folder: DemoFolder, settings: DemoSettings) -> dict[str, Any]:
    """Train the warmed-up model on the same pairs, in the same way, with SFT on the chosen completions as the only loss."""
    return train_on_pairs(folder, settings, folder.sft, "loss=sft")


def train_on_pairs(folder: DemoFolder, settings: DemoSettings, run_dir: Path, *overrides: str) -> dict[str, Any]:
    """Train the warmed-up model on the pairs with the demo's recipe and changes to it; returns the number of steps."""
    with initialize_config_module("mpo.recipes", version_base="1.3"):
        config = compose("train", overrides=["experiment=demo", *settings.mpo_overrides, *overrides])
    config.run_dir, config.seed = str(run_dir), settings.seed
    config.model.name_or_path, config.data.path = map(str, (folder.warm, folder.pairs))
    with logs_to(run_dir / "train.log"):
        trainer = run_train_job(TrainJob.from_config(OmegaConf.to_container(config, resolve=True)))
    return {"steps": int(trainer.state.global_step)}


def measure(folder: DemoFolder, model: Path, when: str, *compared: str) -> dict[str, Any]:
    """Evaluate a model on the evaluation questions, and compare two evaluations with each other, if they are given."""
    lines = read_json_lines(folder.lines("eval"))
    asked = [folder.question(line) for line in lines]
    sampled = _generator(model, f"measuring {when}").generate(asked, temperature=0.0, max_new_tokens=MAX_NEW_TOKENS)
    rows = [
        (line, text, verify(text, Question(request.messages, ground_truths=[line["ground_truth"]])))
        for line, request, text in zip(lines, asked, (one[0].text for one in sampled), strict=True)
    ]
    read = [reads_digits(text, line["digits"]) for line, text, _ in rows]
    write_json_lines(
        folder.responses(when), ({"id": line["id"], "response": text, "correct": found.correct} for line, text, found in rows)
    )
    of_kind = {name: [found.correct for line, _, found in rows if line["question"] == kind.text] for name, kind in KINDS.items()}
    pair = ([line["correct"] for line in read_json_lines(folder.responses(one))] for one in compared)
    return {
        "correct": (correct := sum(found.correct for *_, found in rows)),
        "total": len(lines),
        "interval": list(wilson_interval(correct, len(lines))),
        "unparsable": sum(found.method == "none" for *_, found in rows),
        "read": sum(read),
        "kinds": {name: [sum(results), len(results)] for name, results in of_kind.items()},
        **({"paired": asdict(compare_paired(*pair))} if compared else {}),
    }


def reads_digits(response: str, digits: Sequence[int]) -> bool:
    r"""Whether the first line of a response names the image's digits.

    >>> reads_digits("The digits are 3 8 1\n...", [3, 8, 1])
    True
    """
    return response.split("\n", 1)[0] == KINDS["sum"].worked_example(digits).split("\n", 1)[0]


def _generator(model: Path, progress: str) -> LocalGenerator:
    loaded = load_model(str(model), dtype="float32")
    return LocalGenerator(loaded.model, loaded.processor, responses_per_batch=RESPONSES_PER_BATCH, progress=progress)


def train_on_examples(
    model: Any, processor: Any, rows: Iterable[Mapping[str, str]], output: Path, **settings: Any
) -> PackedSFTTrainer:
    """Train a model with PackedSFTTrainer, on the CPU in float32, and save it with its processor.

    Args:
        model: the model, trained in place.
        processor: its processor.
        rows: `{"image", "question", "text"}`: the path of an image, the question and the completion.
        output: folder of the model, and of `train.log`.
        settings: further arguments of `PackedSFTConfig`.
    """

    def turn(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    conversations = [
        {"images": [row["image"]], "prompt": turn("user", row["question"]), "completion": turn("assistant", row["text"])}
        for row in rows
    ]
    fixed: dict[str, Any] = {"lr_scheduler_type": "cosine", "warmup_steps": 0.05, "weight_decay": 0.05}
    fixed |= {"batching": "conversations", "loss_average": "token"}
    checkpointing = "activation_checkpointing"  # the name since transformers 5.24, where the other one warns
    fixed[checkpointing if checkpointing in PackedSFTConfig.__dataclass_fields__ else "gradient_checkpointing"] = False
    fixed |= {"use_cpu": True, "bf16": False, "dataloader_pin_memory": False}
    fixed |= {"logging_steps": 20, "save_strategy": "no", "report_to": "none"}
    trainer = PackedSFTTrainer(
        model=model,
        args=PackedSFTConfig(output_dir=str(output), **fixed, **settings),
        train_dataset=Dataset.from_list(conversations, features=_FEATURES),
        processing_class=processor,
    )
    with logs_to(output / "train.log"):
        trainer.train()
    trainer.save_model()
    processor.save_pretrained(output)
    return trainer


@contextmanager
def logs_to(path: Path) -> Iterator[None]:
    """Append everything printed to stdout to a file. Progress bars and warnings go to stderr and stay visible."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", buffering=1) as file, redirect_stdout(file):
        yield

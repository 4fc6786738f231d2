"""Stage 2: train a new model on the worked examples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, List, Value
from trl import SFTConfig, SFTTrainer

from mpo.demo.folder import DemoFolder
from mpo.demo.logs import logs_to
from mpo.demo.settings import DemoSettings
from mpo.io import read_json_lines
from mpo.models.small import small_internvl, small_processor

_MESSAGES = List({"role": Value("string"), "content": Value("string")})
_FEATURES = Features({"images": List(Image()), "prompt": _MESSAGES, "completion": _MESSAGES})


def warm_up(folder: DemoFolder, settings: DemoSettings) -> dict[str, Any]:
    """Build the model and train it on the worked examples with TRL's SFTTrainer.

    Returns:
        The numbers of parameters, tokens and steps, and the last loss.
    """
    lines = read_json_lines(folder.lines("worked"))
    processor = small_processor(
        [line["question"] for line in lines] + [line["worked_example"] for line in lines],
        image_size=settings.tile_size,
        patch_size=settings.patch_size,
        max_patches=settings.digits_per_image,
    )
    model = small_internvl(
        processor,
        hidden_size=settings.hidden_size,
        layers=settings.layers,
        vision_hidden_size=settings.hidden_size,
        vision_layers=settings.layers,
        # A small tower trained from scratch learns faster with a large initial layer scale.
        layer_scale_init_value=1.0,
        seed=settings.seed,
    )
    rows = [
        {"image": str(folder.data / line["image"]), "question": line["question"], "text": line["worked_example"]} for line in lines
    ]
    trainer = train_on_examples(
        model,
        processor,
        rows,
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


def train_on_examples(model: Any, processor: Any, rows: Iterable[Mapping[str, str]], output: Path, **settings: Any) -> SFTTrainer:
    """Train a model with TRL's SFTTrainer, on the CPU in float32, and save it with its processor.

    Args:
        model: the model, trained in place.
        processor: its processor.
        rows: `{"image", "question", "text"}`: the path of an image, the question and the completion.
        output: folder of the model, and of `train.log`.
        settings: further arguments of `SFTConfig`.
    """
    conversations = [
        {
            "images": [row["image"]],
            "prompt": [{"role": "user", "content": row["question"]}],
            "completion": [{"role": "assistant", "content": row["text"]}],
        }
        for row in rows
    ]
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(output),
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            weight_decay=0.05,
            max_length=None,
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            dataloader_pin_memory=False,
            logging_steps=20,
            save_strategy="no",
            report_to="none",
            **settings,
        ),
        train_dataset=Dataset.from_list(conversations, features=_FEATURES),
        processing_class=processor,
    )
    with logs_to(output / "train.log"):
        trainer.train()
    trainer.save_model()
    processor.save_pretrained(output)
    return trainer

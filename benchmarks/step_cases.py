"""The shapes, cases and trainers that benchmarks compare with TRL's DPOTrainer: the same records and settings for both sides."""

import contextlib
import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config
from transformers.utils import logging as transformers_logging
from trl import DPOConfig, DPOTrainer

from mpo import MPOConfig, MPOTrainer
from mpo.models.small import small_processor
from mpo.models.tower import find_tower

SIDES = ("trl", "live", "cached", "cached features")


@dataclass(frozen=True)
class Shape:
    """Sizes of an InternVL; vision and text are (hidden, MLP, layers, heads).

    ``scale`` divides the tokens of question and completions, so that a smaller shape keeps the proportions.
    """

    vision: tuple[int, int, int, int]
    text: tuple[int, int, int, int]
    kv_heads: int
    vocabulary: int = 151_674
    image_size: int = 448
    patch_size: int = 14
    scale: int = 1

    def build(
        self, image_token_id: int, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> InternVLForConditionalGeneration:
        """A model with random weights, drawn on the target device in the target dtype: on a GPU 8 billion take a second or two."""
        usual = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                return InternVLForConditionalGeneration(self.config(image_token_id))
        finally:
            torch.set_default_dtype(usual)

    def config(self, image_token_id: int) -> InternVLConfig:
        """The config of the model."""
        hidden, mlp, layers, heads = self.vision
        vision = InternVLVisionConfig(
            hidden_size=hidden,
            intermediate_size=mlp,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            image_size=[self.image_size] * 2,
            patch_size=[self.patch_size] * 2,
        )
        hidden, mlp, layers, heads = self.text
        text = Qwen2Config(
            vocab_size=self.vocabulary,
            hidden_size=hidden,
            intermediate_size=mlp,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=self.kv_heads,
        )
        tokens = (self.image_size // self.patch_size) ** 2 // 4
        return InternVLConfig(vision_config=vision, text_config=text, image_token_id=image_token_id, image_seq_length=tokens)


SHAPES = {  # InternViT-300M with Qwen2.5-0.5B, -1.5B and -7B; "small": the 1B shape with a quarter of each size
    "1B": Shape((1024, 4096, 24, 16), (896, 4864, 24, 14), 2),
    "2B": Shape((1024, 4096, 24, 16), (1536, 8960, 28, 12), 2),
    "8B": Shape((1024, 4096, 24, 16), (3584, 18944, 28, 28), 4),
    "small": Shape((256, 1024, 6, 4), (224, 1216, 6, 7), 1, vocabulary=9_480, image_size=224, scale=4),
    "tiny": Shape((32, 64, 2, 2), (32, 64, 2, 2), 1, vocabulary=512, image_size=56, scale=20),
}


@dataclass(frozen=True)
class Case:
    """The settings of a step.

    ``tiles``: of the image, thumbnail included; ``answer``: tokens per completion, before the shape's scale; ``pairs`` of one
    question; ``tower``: frozen or trained; ``tune``: full or lora; ``checkpointing`` on both sides.
    """

    shape: str
    tiles: int = 7
    answer: int = 300
    pairs: int = 1
    tower: str = "frozen"
    tune: str = "full"
    checkpointing: bool = False


def records(case: Case, shape: Shape) -> list[dict[str, Any]]:
    """Pairs of one question. Digits are one token each, so lengths are exact; completions differ in their first token."""
    across, down = {1: (1, 1), 7: (3, 2), 13: (4, 3)}[case.tiles]
    size = 2 * shape.image_size  # large enough for all its tiles
    image = Image.effect_noise((across * size, down * size), 80).convert("RGB")
    if 2 * case.pairs > 10:
        raise ValueError(f"Expected at most 5 pairs, since completions differ in their first digit; got pairs={case.pairs}.")

    def said(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    digits = case.answer // shape.scale - 1  # the last token of a completion is the end of turn
    completions = [f"{number}" + "1234567890" * (digits // 10 + 1) for number in range(2 * case.pairs)]
    question = said("user", ("0123456789" * 6)[: max(60 // shape.scale, 1)])
    return [
        {
            "images": [image],
            "prompt": question,
            "chosen": said("assistant", completions[2 * number][:digits]),
            "rejected": said("assistant", completions[2 * number + 1][:digits]),
        }
        for number in range(case.pairs)
    ]


def processor_of(case: Case, shape: Shape) -> Any:
    """A processor that splits the image into the case's number of tiles."""
    return small_processor(
        ["0 1"],
        image_size=shape.image_size,
        patch_size=shape.patch_size,
        max_patches=max(case.tiles - 1, 1),
        vocab_size=300,
    )


def adapter() -> LoraConfig:
    """LoRA for all matrices of the language model."""
    return LoraConfig(r=16, lora_alpha=32, target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj", task_type="CAUSAL_LM")


def make_trainer(side: str, case: Case, shape: Shape, folder: str, device: str = "cpu", dtype: str = "float32") -> tuple[Any, Any]:
    """Create the trainer of one side, ready for a step, and its batch on the device."""
    processor = processor_of(case, shape)
    torch.manual_seed(0)
    model = shape.build(processor.image_token_id, device, getattr(torch, dtype))
    if case.tower == "frozen":
        find_tower(model).requires_grad_(False)
    settings: dict[str, Any] = {
        "use_cpu": device == "cpu",
        "bf16": dtype == "bfloat16" and device != "cpu",
        "report_to": "none",
        "save_strategy": "no",
        "gradient_checkpointing": case.checkpointing,
        "per_device_train_batch_size": case.pairs,
        "loss_type": ["sigmoid", "bco_pair", "sft"],
        "loss_weights": [0.8, 0.2, 1.0],
        "max_length": None,
        "learning_rate": 1e-6,
        "disable_tqdm": True,
    }
    if side.startswith("cached"):
        settings |= {"reference": "cached", "reference_cache": str(Path(folder, "references"))}
    if side == "cached features":
        settings |= {"vision_features": "cached", "vision_feature_cache": str(Path(folder, "features"))}
    trainer_class, config_class = (DPOTrainer, DPOConfig) if side == "trl" else (MPOTrainer, MPOConfig)
    rows = records(case, shape)
    lora = case.tune == "lora"
    trainer = trainer_class(
        model=model,
        # TRL would load the reference by the model's name.
        ref_model=copy.deepcopy(model).requires_grad_(False).eval() if side == "trl" and not lora else None,
        args=config_class(folder, **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
        peft_config=adapter() if lora else None,
    )
    columns = set(trainer._signature_columns or []) or set(rows[0])
    read = [{name: value for name, value in trainer.train_dataset[i].items() if name in columns} for i in range(case.pairs)]
    batch = trainer._prepare_inputs(trainer.data_collator(read))
    trainer.model.train()
    if case.checkpointing:  # as the training loop does before its first step
        trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    return trainer, batch


@contextlib.contextmanager
def head_as_on_gpus() -> Iterator[None]:
    """Make TRL's head skip unlabelled positions on every device; by default it does so on GPUs only."""
    with mock.patch("trl.trainer.utils._use_triton", lambda device: True):
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress warnings about temporary models."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(before)

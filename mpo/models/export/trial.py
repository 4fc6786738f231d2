"""One question about an image, put to the trained model and to what was written: how far apart are their answers?"""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from PIL import Image
from torch import Tensor

from mpo.models.export.float32 import in_float32
from mpo.models.loading import load_internvl, load_processor

QUESTION = "What is shown in the image?"
NEW_TOKENS = 16

TOLERANCE = 1e-4
"""Logits in float32 may differ by this share of the largest one."""

ROUNDINGS = 4
"""Logits in half precision may differ by so many times what rounding does to those of the trained model alone.

All are root mean squares. Let p be how far the trained model's logits are from those it has in float32 arithmetic: the error of
its roundings. A linear layer with an adapter rounds its output once; merged it rounds its output and its weights, each by up to
half a unit in the last place, which are two errors of that size. So the exported model's error is at most about sqrt(2) p, and
as independent errors add as squares, the two models are about sqrt(3) p = 1.7 p from each other. Twice that, and a little, is
allowed.
"""


@dataclass(frozen=True)
class Comparison:
    """How the exported model's answer differs from the trained one's.

    Attributes:
        difference: the largest difference of their logits, as a share of the largest logit.
        roundings: their root mean square difference, as a multiple of what rounding does to the trained model's; None in float32.
        rounding: the largest difference that rounding makes to the trained model's, as a share of the largest; None in float32.
        moved: how far the adapter moves the base's logits, as a share of the largest; None for a whole model, and where the base
            was changed for the adapter (PiSSA, OLoRA).
        answers: of the trained and of the exported model, greedy.
    """

    difference: float
    roundings: float | None
    rounding: float | None
    moved: float | None
    answers: tuple[str, str]


@dataclass(frozen=True)
class Trial:
    """What the trained model answered.

    Attributes:
        inputs: the question and its image, encoded; one row.
        tokens: of the answer, (1, N).
        logits: after every token of question and answer, (tokens, vocabulary), float32.
        exact: the same in float32 arithmetic; of a model in float32 the same tensor.
        moved: as of `Comparison`.
    """

    inputs: dict[str, Tensor]
    tokens: Tensor
    logits: Tensor
    exact: Tensor
    moved: float | None

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, processor: Any, *, moves: bool = True) -> "Trial":
        """Ask the trained model.

        Besides the model, memory holds one layer in float32 and four times the logits: for 272 tokens and a vocabulary of
        150,000 0.7 GB.

        Args:
            model: with its adapter, if it has one, not merged.
            processor: its processor or tokenizer.
            moves: measure how far the adapter moves its base; without the adapter, the model is that base.
        """
        inputs = question(processor)
        tokens = answer(model, inputs)
        logits = logits_of(model, inputs, tokens)
        half = model.dtype != torch.float32
        with in_float32(model) if half else nullcontext():
            exact = logits_of(model, inputs, tokens) if half else logits
            moved = None
            if moves and isinstance(model, PeftModel):
                with model.disable_adapter():
                    moved = distance(logits_of(model, inputs, tokens), exact)
        return cls(inputs, tokens, logits, exact, moved)

    @torch.no_grad()
    def compare(self, folder: Path) -> Comparison:
        """Load a folder of transformers' form, ask the same, and compare.

        Raises:
            ValueError: when its processor encodes the question otherwise, or its logits differ by more than allowed.
        """
        processor = load_processor(str(folder))
        inputs = question(processor)
        if inputs.keys() != self.inputs.keys() or any(not torch.equal(inputs[name], self.inputs[name]) for name in inputs):
            raise ValueError(f"The processor in {folder} encodes a question otherwise than the run's. {BUG}")
        model = load_internvl(str(folder)).eval()
        logits = logits_of(model, inputs, self.tokens)
        difference, apart = distance(logits, self.logits), rms(logits - self.logits)
        roundings = rounding = None
        if model.dtype != torch.float32:
            roundings = apart / rms(self.logits - self.exact) if apart else 0.0
            rounding = distance(self.logits, self.exact)
        if not (difference <= TOLERANCE if roundings is None else roundings <= ROUNDINGS):
            how = f"{TOLERANCE:.0e}" if roundings is None else f"{ROUNDINGS} times what rounding does, not {roundings:.1f} times,"
            raise ValueError(
                f"The logits of what was written to {folder} differ from the trained model's by {difference:.1e} of the largest; "
                f"{how} is allowed. {BUG}"
            )
        tokenizer = getattr(processor, "tokenizer", processor)
        answers = [tokenizer.decode(row[0], skip_special_tokens=True) for row in (self.tokens, answer(model, inputs))]
        return Comparison(difference, roundings, rounding, self.moved, (answers[0], answers[1]))


BUG = "That is a bug of the export: please report it, with both config.json and adapter_config.json."


def question(processor: Any) -> dict[str, Tensor]:
    """The question as the model reads it, with an image where the processor takes one; one row."""
    sees = hasattr(processor, "image_processor")
    content = [*([{"type": "image"}] if sees else []), {"type": "text", "text": QUESTION}]
    turn = [{"role": "user", "content": content if sees else QUESTION}]
    if getattr(processor, "chat_template", None) is None:
        return dict(processor(text=QUESTION, return_tensors="pt"))
    text = processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    images = {"images": [[image()]]} if sees else {}
    return dict(processor(text=text, **images, add_special_tokens=False, return_tensors="pt"))  # the template has put them there


def image(side: int = 224) -> Image.Image:
    """An image of all colours: red grows to the right, green downwards, blue towards the middle."""
    ramp = torch.linspace(0, 255, side)
    red, green = ramp.expand(side, side), ramp.unsqueeze(1).expand(side, side)
    blue = 255 - (red - 127.5).abs() - (green - 127.5).abs()
    return Image.fromarray(torch.stack([red, green, blue], dim=-1).to(torch.uint8).numpy())


def answer(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The greedy answer's tokens, (1, at most `NEW_TOKENS`)."""
    settings = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None, "use_cache": True}
    image = getattr(model.config, "image_token_id", None)
    if image is not None:  # it stands for pixels, of which an answer has none
        settings["suppress_tokens"] = [image]
    whole: Tensor = model.generate(**inputs, **settings, max_new_tokens=NEW_TOKENS)
    return whole[:, inputs["input_ids"].shape[1] :]


def logits_of(model: Any, inputs: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Logits after every token of question and answer, (tokens, vocabulary), float32; nothing is generated."""
    ids = inputs["input_ids"]
    beside = {name: value for name, value in inputs.items() if value.shape == ids.shape and name != "input_ids"}
    longer = {name: torch.cat([value, torch.full_like(tokens, name == "attention_mask")], dim=1) for name, value in beside.items()}
    logits: Tensor = model(**{**inputs, **longer, "input_ids": torch.cat([ids, tokens], dim=1)}, use_cache=False).logits
    return logits[0].float()


def distance(logits: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest of the expected logits."""
    return float((logits - expected).abs().max() / expected.abs().max())


def rms(difference: Tensor) -> float:
    """The root mean square."""
    return float(difference.square().mean().sqrt())

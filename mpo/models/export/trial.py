"""Compare the exported model with the trained one on a question about an image."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from torch import Tensor, nn

from mpo.models.loading import load_internvl, load_processor
from mpo.models.official.convert import TOLERANCE, distance

QUESTION = "What is shown in the image?"
NEW_TOKENS = 16

ROUNDINGS = 4
"""The largest allowed difference of half-precision logits, as a multiple of the rounding error of the trained model's.

All are root mean squares. Let p be how far the trained model's logits are from those it has in float32 arithmetic: the error of
its roundings. A linear layer with an adapter rounds its output once; merged it rounds its output and its weights, each by up to
half a unit in the last place, which are two errors of that size. So the exported model's error is at most about sqrt(2) p, and
as independent errors add as squares, the two models are about sqrt(3) p = 1.7 p from each other. Twice that, and a little, is
allowed.
"""


@dataclass(frozen=True)
class Comparison:
    """The difference between the exported and the trained model; of logits, relative to the largest one."""

    difference: float  # the largest
    roundings: float | None  # root mean square, as a multiple of the trained model's rounding error; None in float32
    rounding: float | None  # the largest rounding error of the trained model's logits; None in float32
    moved: float | None  # the largest change by the adapter; None for a full model, and one initialized with a part of the base
    responses: tuple[str, str]  # greedy ones of the trained and of the exported model


@dataclass(frozen=True)
class Trial:
    """A question and the trained model's response to it."""

    inputs: dict[str, Tensor]  # the question and its image, encoded; one row
    tokens: Tensor  # tokens of the response, (1, N)
    logits: Tensor  # logits after every token of question and response, (tokens, vocabulary), float32
    exact: Tensor  # the logits computed in float32; for a float32 model the same tensor
    moved: float | None  # as in `Comparison`

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, processor: Any, *, moves: bool = True) -> "Trial":
        """Generate the response of a trained model, with its unmerged adapter, if any.

        Memory besides the model: one layer in float32 and four copies of the logits, 0.7 GB for 272 tokens and a vocabulary of
        150,000. `moves`: measure the change by the adapter; only valid if the model without its adapter is the base.
        """
        inputs = question(processor)
        tokens = respond(model, inputs)
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
        """Load a folder in transformers' format and compare its logits for the same question.

        Raises ValueError when its processor encodes the question differently, or its logits differ by more than allowed.
        """
        processor = load_processor(str(folder))
        inputs = question(processor)
        if inputs.keys() != self.inputs.keys() or any(not torch.equal(inputs[name], self.inputs[name]) for name in inputs):
            raise ValueError(f"The processor in {folder} encodes a question differently from the run's. {BUG}")
        model = load_internvl(str(folder)).eval()
        logits = logits_of(model, inputs, self.tokens)
        difference, apart = distance(logits, self.logits), (logits - self.logits).norm()
        roundings = rounding = None
        if model.dtype != torch.float32:
            roundings = float(apart / (self.logits - self.exact).norm()) if apart else 0.0  # of as many numbers
            rounding = distance(self.logits, self.exact)
        if not (difference <= TOLERANCE if roundings is None else roundings <= ROUNDINGS):
            how = f"{TOLERANCE:.0e}" if roundings is None else f"{ROUNDINGS} times the rounding error, not {roundings:.1f} times,"
            raise ValueError(
                f"The logits of the model in {folder} differ from the trained model's by {difference:.1e} of the largest; "
                f"{how} is allowed. {BUG}"
            )
        tokenizer = getattr(processor, "tokenizer", processor)
        responses = [tokenizer.decode(row[0], skip_special_tokens=True) for row in (self.tokens, respond(model, inputs))]
        return Comparison(difference, roundings, rounding, self.moved, (responses[0], responses[1]))


BUG = "This is a bug in the export. Report it with both config.json and adapter_config.json."


def question(processor: Any) -> dict[str, Tensor]:
    """The encoded question, with an image if the processor takes images; one row."""
    multimodal = hasattr(processor, "image_processor")
    content = [*([{"type": "image"}] if multimodal else []), {"type": "text", "text": QUESTION}]
    turn = [{"role": "user", "content": content if multimodal else QUESTION}]
    if getattr(processor, "chat_template", None) is None:
        return dict(processor(text=QUESTION, return_tensors="pt"))
    text = processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    images = {"images": [[image()]]} if multimodal else {}
    return dict(processor(text=text, **images, add_special_tokens=False, return_tensors="pt"))  # the template writes them


def image(side: int = 224) -> Image.Image:
    """A test image: red grows to the right, green downwards, blue towards the middle."""
    ramp = torch.linspace(0, 255, side)
    red, green = ramp.expand(side, side), ramp.unsqueeze(1).expand(side, side)
    blue = 255 - (red - 127.5).abs() - (green - 127.5).abs()
    return Image.fromarray(torch.stack([red, green, blue], dim=-1).to(torch.uint8).numpy())


def respond(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Tokens of the greedy response, (1, at most `NEW_TOKENS`)."""
    settings = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None, "use_cache": True}
    image = getattr(model.config, "image_token_id", None)
    if image is not None:  # it needs pixel values, which a response does not have
        settings["suppress_tokens"] = [image]
    whole: Tensor = model.generate(**inputs, **settings, max_new_tokens=NEW_TOKENS)
    return whole[:, inputs["input_ids"].shape[1] :]


def logits_of(model: Any, inputs: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Logits after every token of question and response, (tokens, vocabulary), float32, in one forward pass."""
    ids = inputs["input_ids"]
    beside = {name: value for name, value in inputs.items() if value.shape == ids.shape and name != "input_ids"}
    longer = {name: torch.cat([value, torch.full_like(tokens, name == "attention_mask")], dim=1) for name, value in beside.items()}
    logits: Tensor = model(**{**inputs, **longer, "input_ids": torch.cat([ids, tokens], dim=1)}, use_cache=False).logits
    return logits[0].float()


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Run every module with temporary float32 copies of its weights.

    The logits are those of ``model.float()``; the extra memory is that of one layer.
    """
    narrow: dict[nn.Module, list[Tensor]] = {}

    def widen(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        narrow[module] = [parameter.data for parameter in _own(module)]
        for parameter in _own(module):
            parameter.data = _wide(parameter.data)
        return tuple(map(_wide, args)), {name: _wide(value) for name, value in kwargs.items()}

    def restore(module: nn.Module, args: Any, output: Any) -> None:
        for parameter, data in zip(_own(module), narrow.pop(module), strict=True):
            parameter.data = data

    owners = [module for module in model.modules() if next(iter(_own(module)), None) is not None]
    hooks = [module.register_forward_pre_hook(widen, with_kwargs=True) for module in owners]
    hooks += [module.register_forward_hook(restore, always_call=True) for module in owners]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _own(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that a module's own forward uses; an adapter layer also reads those of its base layer."""
    return list(module.parameters(recurse=isinstance(module, BaseTunerLayer)))


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

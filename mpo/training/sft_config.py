"""PackedSFTConfig: TRL's SFTConfig with InternVL 2.5's settings, and checks of what does not go together."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from trl import SFTConfig

import mpo.training.config  # noqa: F401  # its docstring is the help of the fields that both have
from mpo.encoding.turns import CONVERSATION, TRAIN_ON
from mpo.generation.generator import whole_number
from mpo.training.loop_config import LoopConfig, choice, described

POWERS = {"token": 1.0, "sample": 0.0, "square": 0.5}
"""The weight of a conversation with n labelled tokens in the loss is n to this power."""
PACKING_BUFFER = 256


@described
@dataclass
class PackedSFTConfig(LoopConfig, SFTConfig):  # type: ignore[misc]
    """Configuration of training on packed conversations: TRL's `SFTConfig` with InternVL 2.5's settings (arXiv 2412.05271).

    Fields that `mpo.MPOConfig` also has mean the same there.

    Args:
        loss_average: the mean that a step's loss is, over all its micro-batches and ranks: over labelled tokens (``"token"``, TRL),
            over conversations, each the mean over its own (``"sample"``), or these weighted by the square root of their number
            (``"square"``, InternVL 2.5's re-weighting).
        train_on: which turns of the assistant are labelled: ``"all"``, the ``"last"``, or the ``"flagged"`` ones, with
            ``"train": true`` in their message. ``"train": false`` always leaves a turn unlabelled.
        batching: ``"tokens"``: a batch holds as many conversations as fit into ``max_tokens_per_batch`` and
            ``max_tiles_per_batch``. ``"conversations"``: it holds ``per_device_train_batch_size`` of them.
        max_tokens_per_batch: maximum tokens of a batch on one device, with ``batching="tokens"``. Default: 16,384.
        max_tiles_per_batch: maximum image tiles of a batch on one device, with ``batching="tokens"``. Default: 48.
        oversized: a conversation that exceeds these limits alone: ``"refuse"`` it, give it its ``"own_row"``, or take
            ``"fewer_frames"`` of its videos, evenly spread, as many as fit (and refuse it if even one of each does not). With
            ``on_bad_record="skip"``, what would be refused is a bad record.
        loss_type: negative log-likelihood (``"nll"``), or Dynamic Fine-Tuning (``"dft"``, arXiv 2508.05629).
        assistant_only_loss: always on: the assistant's turns alone are labelled.
        max_length: not used: a conversation is never truncated.
        packing_buffer: number of conversations of a stream (`IterableDataset`) in memory, from which the fullest rows are taken,
            with ``batching="tokens"``. The rows of a `Dataset` are planned for an epoch.

    Of TRL's fields, ``packing`` and ``padding_free`` demand packed rows, which are used wherever the model allows it anyway.

    Raises:
        ValueError: for a setting that would be ignored, or that does not go together with another.
    """

    by_number: ClassVar[str] = "conversations"
    balance_slots: ClassVar[int] = 1  # the packs of a step are a uniform draw
    disable_dropout: ClassVar[bool] = False
    chosen: ClassVar[tuple[str, ...]] = (*LoopConfig.chosen, "loss_average", "train_on", "oversized", "loss_type")
    without_effect: ClassVar[dict[str, tuple[Any, str]]] = {
        **LoopConfig.without_effect,
        "assistant_only_loss": (True, "the assistant's turns alone are labelled."),
        "chat_template_path": (None, "the chat template is read before it. Set processing_class.chat_template."),
        "dataset_kwargs": (None, "records are encoded by the data loader. Leave it out."),
        "dataset_text_field": ("text", "records are conversations, without a column of plain text. Give 'messages'."),
        "eos_token": (None, "the chat template ends a turn. Set processing_class.eos_token for plain text."),
        "eval_packing": (None, "evaluation has the rows of training. Use `rows`."),
        "label_smoothing_factor": (0.0, "the loss has no label smoothing."),
        "max_length": (None, "no conversation is truncated. Use max_tokens_per_batch and `oversized`."),
        "packing_strategy": ("bfd", "no conversation is cut. Use max_tokens_per_batch and `oversized`."),
        "shuffle_dataset": (False, "records are shuffled in every epoch. Use dataset.shuffle for another order of the data set."),
        "truncation_mode": ("keep_start", "no conversation is truncated."),
    }

    needs: ClassVar[dict[str, tuple[str, Any]]] = {
        **LoopConfig.needs,
        **dict.fromkeys(("oversized", "packing_buffer"), ("batching", "tokens")),
    }

    loss_average: str = choice("square", tuple(POWERS))
    train_on: str = choice("all", TRAIN_ON)
    batching: str = choice("tokens", ("conversations", "tokens"))
    max_tokens_per_batch: int | None = None
    max_tiles_per_batch: int | None = None
    oversized: str = choice("refuse", ("refuse", "own_row", "fewer_frames"))  # type: ignore[misc]
    packing_buffer: int = PACKING_BUFFER  # type: ignore[misc]
    loss_type: str = choice("nll", ("nll", "dft"))
    assistant_only_loss: bool = True
    max_length: int | None = None
    learning_rate: float = 4e-5
    warmup_steps: float = 0.03

    def __post_init__(self) -> None:
        if self.batching == "tokens":
            self.max_tokens_per_batch = 16384 if self.max_tokens_per_batch is None else self.max_tokens_per_batch
            self.max_tiles_per_batch = 48 if self.max_tiles_per_batch is None else self.max_tiles_per_batch
        if self.packing and self.rows == "auto":
            self.rows = "packed"
        super().__post_init__()

    def _check(self) -> None:
        if self.completion_only_loss is False:
            raise ValueError("completion_only_loss=False would be ignored: the assistant's turns alone are labelled. Leave it out.")
        if not any([self.learning_rate, *self.learning_rates().values()]):
            raise ValueError("learning_rate=0 would train nothing. Set it, or that of a part.")
        whole_number("packing_buffer", self.packing_buffer)

    def encoding_rules(self) -> dict[str, Any]:  # noqa: D102
        fits = self.oversized == "fewer_frames" and self.max_tokens_per_batch is not None
        budget = (self.max_tokens_per_batch, self.max_tiles_per_batch) if fits else None
        return {"sides": CONVERSATION, "train_on": self.train_on, "budget": budget}

    def loss_name(self) -> str:  # noqa: D102
        return f"{self.loss_type}, the mean by {self.loss_average}"

    def weights(self, lengths: Tensor) -> Tensor:
        """Weights of conversations in the loss, of their numbers of labelled tokens (FloatTensor): both of shape (N,)."""
        return lengths.pow(POWERS[self.loss_average])

"""PackedSFTTrainer: TRL's SFTTrainer on packed conversations, with the loop of MPOTrainer."""

from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl import SFTTrainer
from trl.trainer import sft_trainer

from mpo.batching.batch import Batch
from mpo.encoding.turns import CONVERSATION, SIDES
from mpo.schema import CONVERSATION_COLUMNS, TRL_COLUMNS, names
from mpo.training.loop import Loop
from mpo.training.model_card import SFT_PAPER
from mpo.training.policy import HasPolicy
from mpo.training.sft_config import PACKING_BUFFER, PackedSFTConfig
from mpo.training.start import checked_arguments, collator_of, load_processing_class


class PackedSFTTrainer(HasPolicy, Loop, SFTTrainer):  # type: ignore[misc]
    """Train a model on conversations, many in one row (InternVL 2.5, arXiv 2412.05271, sections 3.2 and 3.3).

    It takes the arguments of TRL's `SFTTrainer`; the configuration is a `PackedSFTConfig`. A record has ``messages`` (or ``prompt``
    and ``completion``) and optional ``images``, ``videos`` and ``tools``, in TRL's formats, with images in any turn of the user.
    Differences from TRL:

    * Conversations with images are packed: each attends to itself alone, and log-probs and gradients are those of a row each.
    * Every turn of the assistant is labelled, through its end-of-turn token, whatever the chat template.
    * The loss of an optimiser step is the mean over its tokens or conversations (``loss_average``), however they are split over
      micro-batches and ranks.
    * Runs resume bitwise, stop at a value that is not finite, and list bad records, as `mpo.MPOTrainer`'s do.

    Example:
        >>> from mpo import PackedSFTConfig, PackedSFTTrainer  # doctest: +SKIP
        >>> trainer = PackedSFTTrainer(  # doctest: +SKIP
        ...     model="OpenGVLab/InternVL3-1B-Instruct", args=PackedSFTConfig("runs/sft"), train_dataset=conversations
        ... )
        >>> trainer.train()  # doctest: +SKIP

    Raises:
        ValueError: for arguments of `SFTTrainer` that do not apply, and for what `mpo.MPOTrainer` refuses.
    """

    _tag_names = ["trl", "sft", "mpo"]
    _paper = SFT_PAPER
    unit = "conversations"
    in_card = ("train_on", "loss_average", "learning_rate")
    columns = (*(name for name in names(encoded=True) if name not in SIDES), *CONVERSATION_COLUMNS, *TRL_COLUMNS)
    needed = (("messages",), ("prompt", *CONVERSATION))
    _collator_is_ours = True

    def __init__(
        self,
        model: Any,
        args: PackedSFTConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_loss_func: Any = None,
        compute_metrics: Any = None,
        callbacks: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: Any = None,
        preprocess_logits_for_metrics: Any = None,
        quantization_config: Any = None,
        peft_config: Any = None,
        formatting_func: Any = None,
    ) -> None:
        _refuse(data_collator=data_collator, compute_loss_func=compute_loss_func, formatting_func=formatting_func)
        args = checked_arguments(args, model, PackedSFTConfig)
        if processing_class is None:
            processing_class = load_processing_class(model, args)
        train_dataset, eval_dataset = self._checked_data(train_dataset, eval_dataset, processing_class)
        if args.packing_buffer != PACKING_BUFFER and isinstance(train_dataset, Dataset):
            raise ValueError(
                f"packing_buffer={args.packing_buffer} would be ignored: the rows of a Dataset are planned for an epoch, and only "
                "those of a stream are packed from a buffer. Leave it out."
            )
        model, quantization_config = self._loaded(model, args, optimizers[0], quantization_config, peft_config)
        adapters = self._construct(
            model,
            args,
            sft_trainer,
            # Packing and labels are this library's collator's.
            {"packing": False, "padding_free": False, "assistant_only_loss": False},
            data_collator=collator_of(processing_class, args),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        self._check_parallelism()
        self._start_identity = adapters.identity
        self._start_loop()
        self._prepare_policy(without_dropout=False)
        self._choose_rows(router_loss=False, reads_logits=compute_metrics is not None)
        self._open_features()

    def _check_parallelism(self) -> None:
        parallelism = self.accelerator.parallelism_config
        if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
            raise ValueError(
                "Context and sequence parallelism (cp_size, sp_size) split a row over ranks, and packed conversations attend by "
                "segments of one row. Set both to 1."
            )

    def _step_denominator(self, lengths: Tensor) -> Tensor:
        """Return the sum of the weights of a step's conversations over all ranks (`PackedSFTConfig.weights`)."""
        return self._over_ranks(self.args.weights(lengths).sum()).clamp_min(1)  # a step whose records are all bad has a loss of 0

    def _loss(self, outputs: Any, batch: Batch, counted: int, step: Tensor | None) -> Any:
        """Compute the sum of w(n) / n times the negative log-likelihood of each conversation, divided by the sum of w(n).

        w(n) is the weight of a conversation with n labelled tokens (`PackedSFTConfig.weights`).
        """
        counts = (torch.arange(batch.size, device=outputs.log_probs.device) < counted).float()
        lengths = batch.lengths[0].float().clamp_min(1)
        weights = self.args.weights(lengths) * counts
        values = outputs.log_probs
        if self.args.loss_type == "dft":
            values = values * values.detach().exp()
        total, whole = -(batch.sums(values)[0] * weights / lengths).sum(), weights.sum()

        def of_tokens(values: Tensor) -> tuple[Tensor, Tensor]:
            return (batch.sums(values.detach().float())[0] * counts).sum(), (lengths * counts).sum()

        metrics: dict[str, Any] = {
            "loss": (total, whole),
            "mean_token_accuracy": of_tokens(outputs.is_top1),
            "entropy": of_tokens(outputs.entropy),
            "completion_tokens": ((lengths * counts).sum(), counts.sum()),
            "tokens": (float(batch.tokens) if counted else 0.0, counts.sum()),
        }
        share = whole.clamp_min(1) if step is None else step
        loss = total / share
        if self.aux_loss_enabled:
            metrics["aux_loss"] = (outputs.aux_loss * counts.sum(), counts.sum())
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss * whole / share
        return loss, 1.0 if step is None else self.accelerator.num_processes, metrics  # gradients are averaged over ranks

    def _loss_in_card(self) -> str:
        return "The loss is the negative log-likelihood of the labelled turns, of conversations packed into rows."


def _refuse(**given: Any) -> None:
    reasons = {
        "data_collator": "conversations are packed by this library's collator.",
        "compute_loss_func": "the loss is set by loss_type and loss_average.",
        "formatting_func": "the chat template renders conversations. Give 'messages' with dataset.map.",
    }
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name} would be ignored: {reasons[name]} Leave it out.")

"""Evaluation: every metric is the mean over records, and rows of logits keep their records' order.

It relies on transformers' `evaluation_loop` gathering each batch's losses first, then its rows (5.17.0 to 5.24.0).
"""

from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from mpo.batching.batch import Batch


class Evaluates(Trainer):  # type: ignore[misc]
    """Evaluate by records, however they are batched."""

    def evaluation_loop(self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Evaluate. Every metric, including the loss, is the mean over records, independent of batch sizes."""
        self._evaluated = metric_key_prefix
        self._evaluated_records = 0
        self.gather_function = self._gather_rows  # transformers restores its own at the end
        if self._bad_records is not None:
            self._bad_records.seen_again(metric_key_prefix)
        with self._not_counted(), self._attention():
            self._meters["eval"].clear()
            output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
            self._settle_bad_records(metric_key_prefix, dataloader.dataset)
            metrics = self._read_meter("eval")
            if self._bad_records is not None:
                metrics["bad_records"] = self._bad_records.count(metric_key_prefix)
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output._replace(num_samples=self._evaluated_records)

    def prediction_step(self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, *args: Any, **kwargs: Any) -> Any:
        """Evaluate a batch.

        Args:
            inputs: a batch of the collator. Its ``input_ids`` are reordered as the logits are.
            prediction_loss_only: return no logits.
            args: see transformers' `Trainer.prediction_step`.

        Returns:
            the loss, and unless `prediction_loss_only` logits (S P, T, vocabulary) and input ids (S P, T): the S completions of the
            batch's record 0 (of a pair, the chosen and the rejected one), then those of record 1.

        Raises:
            ValueError: when logits of packed rows are needed.
        """
        self._see_bad_records(self._evaluated, inputs, step=self.state.global_step)
        if not prediction_loss_only and "segments" in inputs.model_inputs:
            raise ValueError(
                "Logits of packed rows cannot be attributed to records. Use `evaluate` or `predict`, which pad rows where logits "
                "are needed, or rows='padded'."
            )
        size, counted = inputs.size, self._counted(inputs)
        self._rows, prepared = None, self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            if prediction_loss_only:
                return self.compute_loss(model, prepared), None, None
            loss, outputs = self.compute_loss(model, prepared, return_outputs=True)
        logits, labels = outputs.logits, prepared["input_ids"]
        counts = self.accelerator.gather(torch.tensor([counted], device=self.accelerator.device)).tolist()
        self._rows, self._loss_is_next = (size, inputs.sides, counts), True
        rows = torch.arange(inputs.sides * size, device=logits.device)  # without that of a blank image alone
        order = inputs.by_side(rows).T.flatten()
        inputs.model_inputs["input_ids"] = inputs["input_ids"][order.to(inputs["input_ids"].device)]
        return loss, logits[order], labels[order]

    def _gather_rows(self, values: Any) -> Any:
        """Gather what counts of a batch, losses by record or rows by completion, in record order; transformers counts rows."""
        if self._rows is None:
            return self.accelerator.gather(values)
        size, each, counts = self._rows
        if self._loss_is_next:
            values, self._loss_is_next, each = values[:1].repeat(size), False, 1
        places = [(rank * size + place) * each + row for rank, n in enumerate(counts) for place in range(n) for row in range(each)]
        return recursively_apply(lambda tensor: tensor[places], self.accelerator.gather(values))

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the logits of a data set's rows.

        Args:
            args: see transformers' `Trainer.predict`.

        Returns:
            predictions (rows, T, vocabulary), label_ids (rows, T), the input ids of the same rows, and metrics. Rows 2i and 2i + 1
            are the chosen and the rejected completion of pair i, row i is conversation i; bad records that were skipped have none.

        Raises:
            ValueError: when `dataloader_drop_last` would drop records.
        """
        batch = self.args.eval_batch_size * self.accelerator.num_processes
        if self.args.dataloader_drop_last and hasattr(test_dataset, "__len__") and len(test_dataset) % batch:
            raise ValueError(
                f"dataloader_drop_last=True would drop the last {len(test_dataset) % batch} of {len(test_dataset)} records: "
                f"batches of all ranks take {batch}. Set it to False."
            )
        return super().predict(test_dataset, *args, **kwargs)

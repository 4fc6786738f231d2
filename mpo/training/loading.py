"""What a step is given, and which of its records count."""

import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import datasets
import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import EarlyStoppingCallback

from mpo.batching.batch import Batch
from mpo.batching.collator import PackCollator
from mpo.batching.sampler import PairBatchSampler
from mpo.batching.streams import FEWER_FRAMES, FilledStream, IndexedRecords, PackedStream, RepeatedStream
from mpo.data.encoded import with_encoded_images
from mpo.encoding.costs import RecordMeasure, measure
from mpo.training.features.use import UsesFeatures
from mpo.training.loop_config import LoopConfig

logger = logging.getLogger(__name__)


class LoadsBatches(UsesFeatures):
    """Load batches so that an optimizer step is the mean over its records, each counted once."""

    data_collator: Any
    _collator_is_ours: bool
    _sampler: PairBatchSampler | None

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Keep images encoded and repeat training streams. In evaluation, give every rank the same number of batches.

        Rows are padded where logits are needed, since logits of packed rows cannot be attributed to records.
        """
        if self._collator_is_ours:
            dataset = with_encoded_images(dataset)
        ranks = self.accelerator.num_processes
        if isinstance(dataset, IterableDataset):
            block = kwargs["batch_size"] * ranks
            is_training = kwargs.get("is_training")
            if is_training and self.args.batching == "tokens" and self.args.packing_buffer:
                dataset, kwargs["batch_size"] = self._packed(dataset, ranks), 1
            else:
                dataset = RepeatedStream(dataset, block) if is_training else FilledStream(dataset, block, fill=ranks > 1)

        planned = kwargs.get("is_training") and (self.args.batching == "tokens" or self.args.group_same_prompt > 1)
        if planned and not isinstance(dataset, PackedStream):
            if isinstance(dataset, IterableDataset):
                by_number = f"batching={self.args.by_number!r} and group_same_prompt=1"
                raise ValueError(f"A stream cannot be planned: use {by_number}, or a datasets.Dataset.")
            dataset = self._remove_unused_columns(dataset, description="training")  # otherwise they would be decoded
            self._sampler, counted, beyond = self._plan(dataset)
            dataset = IndexedRecords(dataset, self._sampler, self._epoch, counted if self._collator_is_ours else None, beyond)
            kwargs["sampler_fn"] = lambda _: self._sampler
        elif self._collator_is_ours and not isinstance(dataset, IterableDataset):
            description = kwargs.get("description", "training").lower()
            if isinstance(dataset, datasets.Dataset):
                dataset = self._remove_unused_columns(dataset, description=description)
            dataset = IndexedRecords(dataset, epoch=self._epoch if kwargs.get("is_training") else None)
        if kwargs.get("is_training") and self._sampler is None and self.args.dataloader_drop_last and hasattr(dataset, "__len__"):
            if len(dataset) < (needed := kwargs["batch_size"] * ranks):
                raise ValueError(
                    f"dataloader_drop_last=True drops all {len(dataset)} records: one batch of all ranks takes {needed} "
                    f"({kwargs['batch_size']} x {ranks}). Set it to False, or use smaller batches."
                )
        collator = self._training_collator() if kwargs.get("is_training") else self.data_collator
        if isinstance(dataset, PackedStream):
            collator = PackCollator(collator)
        elif self._collator_is_ours and not kwargs.get("is_training"):
            if self.compute_metrics is not None or kwargs.get("description") == "test":
                collator = replace(collator, layout="padded")
        with patch.object(self, "data_collator", collator):
            return super()._get_dataloader(dataset, *args, **kwargs)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return a data loader. With persistent workers transformers would return the first data set's for every data set."""
        if eval_dataset is None or isinstance(eval_dataset, str) or eval_dataset is self.eval_dataset:
            return super().get_eval_dataloader(eval_dataset)
        options = {"description": "Evaluation", "batch_size": self.args.eval_batch_size, "sampler_fn": self._get_eval_sampler}
        return self._get_dataloader(dataset=eval_dataset, **options)

    def _whole_dataloader(self, dataset: Any) -> Any:
        with patch.object(self.args, "dataloader_drop_last", False):
            return self.get_eval_dataloader(dataset)

    def _plan(self, dataset: Any) -> tuple[PairBatchSampler, Any, dict[int, str]]:
        """Plan the batches of all ranks. Return the sampler, the tokens of each prompt, and what is skipped, with reasons."""
        args = self.args
        with self.accelerator.main_process_first():  # the others find its measurements in the cache of datasets
            rules = {"tile_budget": args.tile_budget, "on_bad_record": args.on_bad_record, **args.encoding_rules()}
            costs = measure(dataset, self.processing_class, **rules, max_length=args.max_length)
        if rules.get("budget") and costs.group.any() and self.is_world_process_zero():
            logger.warning(f"{costs.group.astype(bool).sum():,} of {len(costs):,} conversations {FEWER_FRAMES}")
        beyond: dict[int, str] = {}
        if args.max_tokens_per_batch is not None and args.on_bad_record == "skip" and args.oversized != "own_row":
            costs, beyond = costs.within((args.max_tokens_per_batch, args.max_tiles_per_batch))
        ranks = {"ranks": self.accelerator.num_processes, "rank": self.accelerator.process_index}
        sampler = batch_sampler(costs, args, pairs_per_batch=self._train_batch_size, **ranks)
        if self.is_world_process_zero():
            logger.info(f"Batches: {sampler.report()}.")
        return sampler, costs.prompt, beyond

    def _packed(self, stream: Any, ranks: int) -> PackedStream:
        args = self.args
        one = RecordMeasure(self.processing_class, "end_of_turn", args.tile_budget, args.on_bad_record, **args.encoding_rules())
        limits, own_row = (args.max_tokens_per_batch, args.max_tiles_per_batch), args.oversized == "own_row"
        return PackedStream(stream, one, limits, buffer=args.packing_buffer, own_row=own_row, block=ranks)

    def _prepare_inputs(self, inputs: Batch) -> Batch:
        inputs = self._completed(inputs)
        return replace(inputs.to(self.args.device), model_inputs=super()._prepare_inputs(inputs.model_inputs))

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """Fetch the micro-batches of a step."""
        start = time.perf_counter()
        try:
            samples, pairs = super().get_batch_samples(epoch_iterator, num_batches, device)
            for batch in samples:
                self._see_bad_records("train", batch, step=self.state.global_step + 1, epoch=int(self._epoch))
            return samples, pairs
        except ValueError:
            raise  # its message says what to do
        except Exception as error:
            raise RuntimeError(
                f"Reading the batches of step {self.state.global_step + 1} from the training data failed: "
                f"{type(error).__name__}: {error}. No record was skipped. Fix the data set and resume from the last checkpoint."
            ) from error
        finally:
            self._meters["train"].wait(time.perf_counter() - start)

    def _run_epoch(self, *args: Any, epoch: int, **kwargs: Any) -> Any:
        stopped_early = kwargs["resume_from_checkpoint"] is not None and any(
            isinstance(callback, EarlyStoppingCallback)
            and callback.early_stopping_patience_counter >= callback.early_stopping_patience
            for callback in self.callback_handler.callbacks
        )
        if self.state.global_step >= self.state.max_steps or stopped_early:  # transformers would take one more step
            self.control.should_training_stop = True
            return None
        self._epoch.fill_(epoch)
        if self._sampler is not None:
            resumed = kwargs["resume_from_checkpoint"] is not None and epoch == kwargs["epochs_trained"]
            skipped = resumed and not self.args.ignore_data_skip
            self._sampler.begun = kwargs["steps_trained_in_current_epoch"] if skipped else 0
        return super()._run_epoch(*args, epoch=epoch, **kwargs)

    def _counted(self, batch: Batch) -> int:
        counted = self._counting(batch) if batch.counted is None else batch.counted
        if batch.kept is None:
            return counted
        counting = self._counting(batch)  # bad records were removed: of the others, those in counting places count
        return min(counted, sum(place < counting for place in batch.kept))

    def _counting(self, batch: Batch) -> int:
        """Return how many places of a batch hold records that count: the first ones. The rest hold repeated records."""
        size = batch.size
        state = self.accelerator.gradient_state
        ranks = self.accelerator.num_processes
        if ranks == 1 or not state.end_of_dataloader or isinstance(state.active_dataloader.dataset, IterableDataset):
            return size
        if self.args.dataloader_drop_last:  # the last incomplete batches are dropped, and nothing is repeated
            return size
        # The last batches of all ranks together hold the rest, rank 0's first. (`state.remainder` is lost in a resumed epoch.)
        rest = len(state.active_dataloader.dataset) % (size * ranks)
        return max(0, min(size, rest - int(self.accelerator.process_index) * size)) if rest else size

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> Tensor | None:
        """Return the denominator of a step's loss (`_step_denominator`), over its micro-batches and all ranks."""
        if not batch_samples:
            return None
        # Decided before the batches are used: later the data loader's end would be attributed to the first of them.
        if self._sampler is None:  # otherwise padding pairs have their own flag
            batch_samples[-1] = replace(batch_samples[-1], counted=self._counted(batch_samples[-1]))
        lengths = torch.cat([batch.lengths[0, : batch.counted] for batch in batch_samples]).to(device).float()
        self._before_step()
        return self._step_denominator(lengths)

    def _step_denominator(self, lengths: Tensor) -> Tensor:
        """The denominator of a step's loss: its records on all ranks. `lengths`, (records,): their labelled tokens."""
        step = self._over_ranks(torch.stack([torch.ones_like(lengths).sum(), lengths.sqrt().sum()]))
        records: Tensor = step[0].clamp_min(1)  # a step whose records are all bad has a loss of 0
        self._mean_sqrt_tokens = step[1] / records
        return records

    def _see_bad_records(self, data: str, batch: Batch, **moment: Any) -> None:
        if self._bad_records is not None:
            counted = batch.size if batch.counted is None else batch.counted
            self._bad_records.see(data, counted + len(batch.bad), batch.bad, **moment)

    def _settle_bad_records(self, data: str = "train", dataset: Any = None) -> None:
        """List the bad records of all ranks, and stop the run if there are too many. Every rank must call it."""
        if self._bad_records is not None:
            dataset = self.train_dataset if data == "train" else dataset
            self._bad_records.settle({data: len(dataset) if hasattr(dataset, "__len__") else None})


def batch_sampler(costs: Any, args: LoopConfig, *, pairs_per_batch: int, ranks: int, rank: int = 0) -> PairBatchSampler:
    """Plan the batches of a run, of the costs of the records as they are trained."""
    return PairBatchSampler(
        costs,
        batching="tokens" if args.batching == "tokens" else "pairs",
        pairs_per_batch=None if args.batching == "tokens" else pairs_per_batch,
        max_tokens=args.max_tokens_per_batch,
        max_tiles=args.max_tiles_per_batch,
        group_same_prompt=args.group_same_prompt,
        micro_batches_per_step=args.gradient_accumulation_steps,
        world_size=ranks,
        rank=rank,
        seed=args.order_seed,
        drop_last=args.dataloader_drop_last,
        allow_oversized=args.oversized == "own_row",
        balance_slots=args.balance_slots,
    )

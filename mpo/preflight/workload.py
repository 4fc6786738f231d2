"""Measure a job's data: tokens and tiles of every record, the most expensive micro-batch, and the number of steps."""

from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from mpo.batching.sampler import PairBatchSampler
from mpo.encoding.costs import PairCosts
from mpo.models.packable import find_text_model, fixed_context
from mpo.models.parts import base_model
from mpo.models.tower import find_tower
from mpo.training.loading import batch_sampler
from mpo.training.start import adds_router_loss, choose_layout, collator_of


class Workload:
    """Plan a run over `pairs`, its pairs or conversations, from the `costs` without truncation of all or some `records` of them.

    Raises:
        ValueError: for settings of rows that the trainer refuses for this model.

    Attributes:
        tokens: of each record as it is trained, in rows of ``layout``, shape (N,), without padding; ``tiles`` likewise.
        padded_because: why rows are padded, if they have to be.
        most_expensive: indices of the records of the micro-batch with the highest memory.
        packing: report of the sampler that plans the batches; None without one.
    """

    def __init__(self, pairs: Any, records: Any, costs: PairCosts, model: Any, processor: Any, args: Any, *, ranks: int) -> None:
        self.total, self.records, self.costs = len(pairs), records, costs
        self.layout, self.padded_because = choose_layout(args, model, router_loss=adds_router_loss(model.config, args))
        truncated = costs.truncate(args.max_length, skip=args.on_bad_record == "skip")
        paired = "sides" not in args.encoding_rules()
        twice = (1 + paired) * truncated.prompt + truncated.chosen + truncated.rejected
        self.tokens, self.tiles = truncated.tokens() if self.layout == "packed" else twice, truncated.tiles
        blank_image, context = ranks > 1 and hasattr(model.config, "vision_config"), fixed_context(model)
        self.collator = replace(collator_of(processor, args), layout=self.layout, context=context, blank_image=blank_image)
        size, sampler = args.per_device_train_batch_size, None
        if args.batching == "tokens" or args.group_same_prompt > 1:
            sampler = batch_sampler(truncated, args, pairs_per_batch=size, ranks=ranks)
            micro_batches = round(len(sampler) * self.total / len(costs))
        elif args.dataloader_drop_last:
            micro_batches = self.total // (size * ranks)
        else:
            micro_batches = -(-self.total // (size * ranks))
        per_epoch = max(-(-micro_batches // args.gradient_accumulation_steps), 1)
        self.steps: int = args.max_steps if args.max_steps > 0 else int(np.ceil(args.num_train_epochs * per_epoch))
        self.epochs, self.pairs_per_step = self.steps / per_epoch, self.total / per_epoch
        self.packing = None if sampler is None else sampler.report()
        self.most_expensive = _most_expensive(self.tokens, costs.tiles, sampler, model, args)

    def batch(self, indices: list[int]) -> Any:
        """Collate records as the trainer does."""
        return self.collator([self.records[index] for index in indices])


def _most_expensive(tokens: Any, tiles: Any, sampler: PairBatchSampler | None, model: Any, args: Any) -> list[int]:
    """Return the planned batch with the largest activations, about; without a plan, a batch of the most expensive pairs."""
    base = base_model(model)
    tower: Any = find_tower(base)
    each = tokens * _width(find_text_model(base))
    if tower is not None:
        size, patch = (np.ravel(getattr(tower.config, name, 0))[0] for name in ("image_size", "patch_size"))
        trained = any(parameter.requires_grad for parameter in tower.parameters())
        each = each + tiles * (3 * size**2 + (((size // max(patch, 1)) ** 2) * _width(tower) if trained else 0))
    if sampler is None:
        return np.argsort(-each, kind="stable")[: args.per_device_train_batch_size].tolist()
    batches = [[abs(index) - (index < 0) for index in batch] for batch in sampler]
    return max(batches, key=lambda batch: float(each[batch].sum()))


def _width(model: Any) -> int:
    """Numbers per token that go through the linear layers of a model: a measure of its activations."""
    modules = () if model is None else model.modules()
    return sum(module.in_features + module.out_features for module in modules if isinstance(module, nn.Linear))

"""Batches by a budget of tokens, and pairs of one question together: every pair once, the loss still the mean over pairs."""

import pytest
import torch
from datasets import Dataset
from small_runs import small_run
from support import messages, text_pairs
from transformers import TrainerCallback

from mpo import MPOConfig, MPOTrainer


class Batches(TrainerCallback):
    """Collects what the trainer's steps were made of."""

    def __init__(self, trainer):
        self.seen: list[list[list[str]]] = []
        get = trainer.get_batch_samples

        def collecting(*args):
            samples, count = get(*args)
            self.seen.append([batch.names for batch in samples])
            self.tokens = [*getattr(self, "tokens", []), *(batch.tokens for batch in samples)]
            return samples, count

        trainer.get_batch_samples = collecting


@pytest.mark.parametrize(
    "settings", [{"gradient_accumulation_steps": 2}, {"dataloader_num_workers": 2}, {"max_tiles_per_batch": 4}], ids=str
)
def test_token_budget(tmp_path, settings):
    trainer = small_run(tmp_path, pairs=13, num_train_epochs=2, batching="tokens", max_tokens_per_batch=220, **settings)
    collected = Batches(trainer)
    trainer.train()
    names = [name for step in collected.seen for batch in step for name in batch]
    assert sorted(names) == sorted(2 * [f"record 'pair-{i}'" for i in range(13)])
    assert max(collected.tokens) <= 220
    assert trainer.state.global_step == len(collected.seen)
    assert trainer.mixture.reward_shift.count == 2 * 26
    assert trainer.state.log_history[-1]["train_loss"] > 0


def test_the_step_is_the_mean_over_its_pairs(tmp_path):
    """One step of all pairs, in micro-batches of unlike sizes, moves the weights as one batch of them."""
    ends = []
    common = {"pairs": 7, "max_steps": 1, "reward_shift": "none", "optim": "sgd", "learning_rate": 0.1, "warmup_steps": 0}
    by_tokens = {"batching": "tokens", "max_tokens_per_batch": 200, "gradient_accumulation_steps": 7}
    for settings in ({"per_device_train_batch_size": 7}, by_tokens):
        trainer = small_run(tmp_path, **common, max_grad_norm=0.0, **settings)
        trainer.train()
        ends.append(trainer.model.state_dict())
    assert max((ends[0][name] - ends[1][name]).abs().max().item() for name in ends[0]) < 1e-6


def test_pairs_of_one_question_come_together(tmp_path):
    """Four questions with three pairs each: grouped by three, every batch has one prompt."""
    trainer = small_run(tmp_path)
    questions = [
        {**row, "id": f"{row['prompt'][0]['content']}", "rejected": messages(f"No: {i}.", "assistant")}
        for row in text_pairs(4).to_list()
        for i in range(3)
    ]
    args = MPOConfig(
        str(tmp_path), use_cpu=True, bf16=False, report_to="none", per_device_train_batch_size=3, group_same_prompt=3, max_steps=4
    )
    grouped = MPOTrainer(
        model=trainer.model, args=args, train_dataset=Dataset.from_list(questions), processing_class=trainer.processing_class
    )
    collected = Batches(grouped)
    grouped.train()
    assert all(len(set(batch)) == 1 and len(batch) == 3 for step in collected.seen for batch in step)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batching": "tokens"}, "go together"),
        ({"max_tokens_per_batch": 100}, "go together"),
        ({"max_tiles_per_batch": 3}, "needs batching='tokens'"),
        ({"batching": "tokens", "max_tokens_per_batch": 100, "train_sampling_strategy": "sequential"}, "would be ignored"),
    ],
)
def test_refusals(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        small_run(tmp_path, **settings)


def test_a_record_beyond_the_budget(tmp_path):
    with pytest.raises(ValueError, match="max_tokens=20"):
        small_run(tmp_path, batching="tokens", max_tokens_per_batch=20).train()


def test_streams_have_no_plan(tmp_path):
    with pytest.raises(ValueError, match="batching='pairs' and group_same_prompt=1"):
        small_run(tmp_path, stream=True, max_steps=2, group_same_prompt=2).train()
    assert torch.get_num_threads() == 1

"""Every option that TRL's DPOConfig adds to transformers' works as in TRL or is refused with the reason; none is ignored."""

import copy

import pytest
import torch
from datasets import Dataset
from small_runs import small_run
from support import TEXTS, completion_mask, perturbed, text_pairs
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, TrainingArguments
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from mpo import MPOConfig, MPOTrainer
from mpo.batching.collator import PairCollator
from mpo.models.small import small_internvl, small_processor

TRLS_FORM = {"reward_shift": "none", "sft_average": "token", "completion_end": "template", "tile_budget": "image"}


def log_of(tmp_path, **settings) -> dict:
    """What the first step logs."""
    trainer = small_run(tmp_path, pairs=4, max_steps=1, **settings)
    trainer.train()
    return trainer.state.log_history[0]


def changes_the_loss(**settings):
    def test(tmp_path):
        """Against the same run without, from a reference that is not the policy."""
        ends = []
        for options in ({"loss_type": settings.get("loss_type", ["sigmoid"])}, settings):
            reference = perturbed(copy.deepcopy(small_run(tmp_path).model), scale=0.2)
            trainer = small_run(tmp_path, pairs=4, max_steps=1, ref_model=reference, **options)
            trainer.train()
            ends.append(trainer.state.log_history[0]["loss"])
        assert ends[0] != pytest.approx(ends[1], rel=1e-3)

    return test


def refused(message: str, **settings):
    def test(tmp_path):
        with pytest.raises((ValueError, NotImplementedError), match=message):
            small_run(tmp_path, pairs=4, **settings)

    return test


def max_length(tmp_path):
    """Completions are truncated, and the fraction of truncated ones is logged."""
    full, truncated = log_of(tmp_path, kind="text"), log_of(tmp_path, kind="text", max_length=36)
    assert truncated["completion_tokens/chosen"] < full["completion_tokens/chosen"]
    assert 0 < truncated["completions_truncated"] <= 1
    assert "completions_truncated" not in full


def truncation_mode(tmp_path):
    """Text only: keep_end keeps completions and truncates prompts, as in TRL. With images it is refused."""
    processor = small_processor(TEXTS, image_size=32, patch_size=8, max_patches=4)
    processor.tokenizer.chat_template = processor.chat_template
    records = text_pairs(4).to_list()
    start, end = (PairCollator(processor.tokenizer, 36, mode)(records) for mode in ("keep_start", "keep_end"))
    whole = PairCollator(processor.tokenizer)(records)
    assert completion_mask(end).sum() == completion_mask(whole).sum() > completion_mask(start).sum()
    with pytest.raises(ValueError, match="keep_end"):
        log_of(tmp_path, max_length=36, truncation_mode="keep_end")


def pad_to_multiple_of(tmp_path):
    trainer = small_run(tmp_path, pad_to_multiple_of=64)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].shape[1] % 64 == 0


def padding_free(tmp_path):
    """Rows without padding, which is the default wherever they fit; refused where they do not."""
    assert small_run(tmp_path, padding_free=True).layout == small_run(tmp_path).layout == "packed"
    refused("padding_free=True.*pad_to_multiple_of=8", padding_free=True, pad_to_multiple_of=8)(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reference": "cached", "loss_type": ["orpo", "sft"]}, "reference='cached'.*none of .*orpo"),
        ({"precompute_ref_log_probs": True, "loss_type": ["sft"]}, "precompute_ref_log_probs=True.*none of the losses"),
        ({"rows": "padded", "packed_attention": "segments"}, "packed_attention='segments' .*rows='padded'"),
        ({"rows": "padded", "padding_free": True}, "padding_free=True .*rows='padded'"),
        ({"rows": "padded", "verify_first_batch": True}, "verify_first_batch=True .*rows='padded'"),
        ({"group_same_prompt": 0}, "group_same_prompt.*got 0"),
        ({"truncation_mode": "keep_middle"}, "truncation_mode.*'keep_start'.*'keep_middle'"),
    ],
    ids=str,
)
def test_what_would_be_ignored_is_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        MPOConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)


@pytest.mark.parametrize(
    "setting",
    [{"completion_end": "template"}, {"tile_budget": "image"}, {"packed_attention": "segments"}, {"verify_first_batch": True}],
    ids=str,
)
def test_what_our_collator_does_is_refused_beside_another(tmp_path, setting):
    processor = small_processor(TEXTS, image_size=32, patch_size=8, max_patches=4)
    model = small_internvl(processor, hidden_size=32, layers=2, vision_hidden_size=32, vision_layers=2)
    with pytest.raises(ValueError, match=f"{next(iter(setting))}=.*data_collator"):
        MPOTrainer(
            model=model,
            args=MPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", **setting),
            data_collator=DataCollatorForPreference(pad_token_id=0),
            train_dataset=text_pairs(4),
            processing_class=processor,
        )


def test_null_in_a_recipe_is_not_set(tmp_path):
    unset = dict.fromkeys(("padding_free", "verify_first_batch"))
    assert MPOConfig(str(tmp_path), use_cpu=True, bf16=False, rows="padded", **unset).rows == "padded"


def test_pairs_of_one_question_share_a_padded_batch_too(tmp_path):
    """So group_same_prompt is not refused there."""
    trainer = small_run(tmp_path, kind="text", pairs=8, rows="padded", group_same_prompt=2)
    doubled = trainer.train_dataset.to_list()
    doubled = [{**row, "id": f"{row['id']}-{number}"} for row in doubled for number in (0, 1)]
    trainer.train_dataset = Dataset.from_list(doubled)
    batches = [[str(name).rsplit("-", 1)[0] for name in batch.names] for batch in trainer.get_train_dataloader()]
    assert len(batches) == 8 and all(first == second for first, second in batches)


def pad_token(tmp_path):
    with pytest.warns(FutureWarning):
        trainer = small_run(tmp_path, pad_token="<|endoftext|>")
    assert trainer.data_collator.tokenizer.pad_token == "<|endoftext|>"


def disable_dropout(tmp_path):
    """The model's own dropout; adapters keep theirs (test_training.py)."""
    for disable in (True, False):
        processor = small_processor(TEXTS, image_size=32, patch_size=8, max_patches=4)
        model = small_internvl(processor, hidden_size=32, layers=2, vision_hidden_size=32, vision_layers=2)
        model.extra = torch.nn.Dropout(0.5)
        args = MPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", disable_dropout=disable)
        trainer = MPOTrainer(model=model, args=args, train_dataset=text_pairs(4), processing_class=processor)
        assert [trainer.model.extra.p, trainer.ref_model.extra.p] == ([0.0, 0.0] if disable else [0.5, 0.5])


def router_aux_loss_coef(tmp_path):
    """A mixture of experts: the balancing loss is added with its weight, as TRL adds it."""
    processor = small_processor(TEXTS, image_size=32, patch_size=8, max_patches=4)
    tokenizer = processor.tokenizer
    tokenizer.chat_template = processor.chat_template
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            moe_intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            output_router_logits=True,
        )
    )
    logs = []
    for trainer_class, config_class, form in ((DPOTrainer, DPOConfig, {}), (MPOTrainer, MPOConfig, TRLS_FORM)):
        args = config_class(
            str(tmp_path),
            use_cpu=True,
            bf16=False,
            report_to="none",
            gradient_checkpointing=False,
            loss_type=["sigmoid", "sft"],
            max_length=None,
            max_steps=1,
            logging_steps=1,
            router_aux_loss_coef=0.5,
            **form,
        )
        reference = perturbed(copy.deepcopy(model))
        trainer = trainer_class(
            model=copy.deepcopy(model), ref_model=reference, args=args, train_dataset=text_pairs(4), processing_class=tokenizer
        )
        trainer.train()
        logs.append(trainer.state.log_history[0])
    assert logs[0]["loss"] == pytest.approx(logs[1]["loss"], rel=2e-5)
    assert logs[1]["aux_loss"] > 0.1


def sync_ref_model(tmp_path):
    settings = {"kind": "text", "sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 1.0}
    trainer = small_run(tmp_path, pairs=6, **settings)  # three steps; the reference follows at the second
    trainer.train()
    third = trainer.state.log_history[2]
    assert third["rewards/chosen"] == 0
    refused("none of the losses", sync_ref_model=True, loss_type=["sft"])(tmp_path)
    refused("PEFT", sync_ref_model=True, kind="lora")(tmp_path)


OPTIONS = {
    "activation_offloading": refused("this run has no GPU", activation_offloading=True),
    "beta": changes_the_loss(loss_type=["sigmoid"], beta=0.5),
    "dataset_num_proc": refused("dataset_num_proc=2 would be ignored", dataset_num_proc=2),
    "disable_dropout": disable_dropout,
    "discopop_tau": changes_the_loss(loss_type=["discopop"], discopop_tau=1.0),
    "f_alpha_divergence_coef": refused("has no effect", loss_type=["sigmoid"], f_alpha_divergence_coef=0.7),
    "f_divergence_type": changes_the_loss(loss_type=["sigmoid"], f_divergence_type="js_divergence"),
    "label_smoothing": changes_the_loss(loss_type=["robust"], label_smoothing=0.2),
    "ld_alpha": changes_the_loss(loss_type=["sigmoid"], ld_alpha=0.1),
    "loss_type": changes_the_loss(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 3.0]),
    "loss_weights": refused("1 numbers for the 3 losses", loss_weights=[1.0]),
    "max_length": max_length,
    "model_init_kwargs": refused("loaded already", model_init_kwargs={"dtype": "float32"}),
    "pad_to_multiple_of": pad_to_multiple_of,
    "pad_token": pad_token,
    "padding_free": padding_free,
    "precompute_ref_batch_size": refused("would be ignored", precompute_ref_batch_size=2),
    "precompute_ref_log_probs": None,  # test_references.py
    "ref_model_mixup_alpha": refused("needs sync_ref_model", ref_model_mixup_alpha=0.9),
    "ref_model_sync_steps": refused("needs sync_ref_model", ref_model_sync_steps=3),
    "router_aux_loss_coef": router_aux_loss_coef,
    "sync_ref_model": sync_ref_model,
    "truncation_mode": truncation_mode,
    "trust_remote_code": None,  # of the hub's loading; passed on by the model and processor loaders
    "use_weighting": changes_the_loss(loss_type=["sigmoid"], use_weighting=True),
}


def train_sampling_strategy(tmp_path):
    refused("batch_rebalance", train_sampling_strategy="batch_rebalance")(tmp_path)
    refused("group_by_length.*batching='tokens'", train_sampling_strategy="group_by_length")(tmp_path)


OF_TRANSFORMERS = {
    "label_smoothing_factor": refused("loss_type='cdpo'", label_smoothing_factor=0.1),
    "train_sampling_strategy": train_sampling_strategy,
    "accelerator_config": refused("dispatch_batches", accelerator_config={"dispatch_batches": True}),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", [name for name, test in {**OPTIONS, **OF_TRANSFORMERS}.items() if test])
def test_option(tmp_path, name):
    {**OPTIONS, **OF_TRANSFORMERS}[name](tmp_path)


def test_no_option_is_forgotten():
    assert set(OPTIONS) == set(DPOConfig.__dataclass_fields__) - set(TrainingArguments.__dataclass_fields__)

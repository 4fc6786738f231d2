"""Bad data raises an error with the reason, the record and the fix, before it enters a step."""

import pytest
import torch
from datasets import Dataset, IterableDataset
from small_runs import small_run
from support import TEXTS, completion_mask, image_pairs, make_image, messages, text_pairs
from transformers import Qwen2Config, Qwen2ForCausalLM

from mpo import MPOConfig, MPOTrainer
from mpo.batching.collator import PairCollator
from mpo.models.small import small_internvl, small_processor


def train(tmp_path, processor, records, model=None, processing_class=None, **settings):
    model = model or small_internvl(processor, hidden_size=32, layers=2, vision_hidden_size=32, vision_layers=2)
    defaults = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    trainer = MPOTrainer(
        model=model,
        args=MPOConfig(str(tmp_path), **{**defaults, **settings}),
        train_dataset=records if isinstance(records, IterableDataset) else Dataset.from_list(list(records)),
        processing_class=processing_class or processor,
    )
    trainer.train()


def pair(**changes) -> dict:
    return {**text_pairs(3).to_list()[2], "id": "no-17", **changes}


def image_pair(**changes) -> dict:
    return {**image_pairs(1)[0], "id": "no-17", **changes}


def with_placeholders(count: int) -> list:
    return [{"role": "user", "content": [{"type": "image"}] * count + [{"type": "text", "text": "What is it?"}]}]


RECORDS = {
    "missing column": ([{"prompt": "a", "chosen": "b"}], "train_dataset has no column 'rejected'.*prompt, chosen"),
    "columns of MMPR": (
        [{"question": "a", "good": "b", "bad": "c"}],
        "no column 'chosen' .*'rejected'.*load_preferences",
    ),
    "missing value": ([pair(), pair(rejected=None)], "record 'no-17' has no 'rejected'"),
    "empty chosen": ([pair(chosen=messages("", "assistant"))], "record 'no-17': 'chosen' is empty"),
    "empty rejected": ([pair(rejected=messages("  \n", "assistant"))], "record 'no-17': 'rejected' is empty"),
    "equal completions": ([pair(rejected=pair()["chosen"])], "record 'no-17': 'chosen' and 'rejected' .*same"),
    "more placeholders than images": ([image_pair(prompt=with_placeholders(2))], "record 'no-17'.*[Nn]umber of images"),
    "fewer placeholders than images": (
        [image_pair(prompt=with_placeholders(1), images=[make_image(1), make_image(2)])],
        "record 'no-17'.*[Nn]umber of images",
    ),
    "image column without images": (
        [{**pair(prompt=with_placeholders(1)), "images": []}],
        "record 'no-17'.*[Nn]umber of images",
    ),
}


@pytest.mark.parametrize("case", RECORDS)
def test_records(tmp_path, processor, case):
    records, message = RECORDS[case]
    with pytest.raises(ValueError, match=message):
        train(tmp_path, processor, records)


def test_an_image_that_is_none(tmp_path, processor):
    with pytest.raises(ValueError, match="record 'no-17': image 1 .*None"):
        PairCollator(processor)([image_pair(images=[None])])


LENGTHS = {
    "prompt alone too long": (pair(), {"max_length": 20}, "record 'no-17': .*prompt alone has"),
    "image tokens would be truncated": (image_pair(), {"max_length": 20}, "image tokens included"),
}


@pytest.mark.parametrize("case", LENGTHS)
def test_lengths(tmp_path, processor, case):
    record, settings, message = LENGTHS[case]
    with pytest.raises(ValueError, match=message):
        train(tmp_path, processor, [record], **settings)


def test_completions_that_are_equal_once_truncated(processor):
    record = pair(chosen=messages("The answer is 2.", "assistant"), rejected=messages("The answer is 9, not 2.", "assistant"))
    prompt_tokens = int(completion_mask(PairCollator(processor)([record]))[0].argmax())
    with pytest.raises(ValueError, match=f"record 'no-17': .*max_length={prompt_tokens + 2}.*'chosen' and 'rejected'.* same"):
        PairCollator(processor, max_length=prompt_tokens + 2)([record])


def test_images_for_a_text_model(tmp_path, processor):
    config = Qwen2Config(vocab_size=len(processor.tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1)
    config.num_attention_heads = config.num_key_value_heads = 4
    model = Qwen2ForCausalLM(config)
    with pytest.raises(ValueError, match="Qwen2ForCausalLM has no vision tower"):
        train(tmp_path, processor, [image_pair()], model=model)
    with pytest.raises(ValueError, match="vision"):
        train(tmp_path, processor, [image_pair()], model=model, processing_class=processor.tokenizer)


@pytest.mark.parametrize(
    ("other", "message"),
    [({"image_size": 64}, "tokens per tile .*16, .*4"), ({"patch_size": 16}, "tokens per tile")],
    ids=["other tile", "other patch"],
)
def test_the_processor_of_another_model(tmp_path, processor, other, message):
    foreign = small_processor(TEXTS, **{"image_size": 32, "patch_size": 8, "max_patches": 4, **other})
    with pytest.raises(ValueError, match=message):
        train(tmp_path, processor, [image_pair()], processing_class=foreign)


def test_a_tokenizer_of_another_model(tmp_path, processor):
    model = small_internvl(processor, hidden_size=32, layers=2, vision_hidden_size=32, vision_layers=2)
    model.resize_token_embeddings(len(processor.tokenizer) - 5)
    with pytest.raises(ValueError, match="resize_token_embeddings"):
        train(tmp_path, processor, [image_pair()], model=model)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_generator_that_raises(tmp_path, processor, workers):
    def records():
        yield from text_pairs(4).to_list()
        raise OSError("the disk is gone")

    stream = IterableDataset.from_generator(records)
    with pytest.raises(RuntimeError, match=r"(?s)step \d .*the disk is gone"):
        train(tmp_path, processor, stream, max_steps=5, per_device_train_batch_size=4, dataloader_num_workers=workers)


def test_an_empty_stream(tmp_path, processor):
    with pytest.raises((ValueError, StopIteration)):
        train(tmp_path, processor, IterableDataset.from_generator(lambda: iter(())), max_steps=2)


def test_workers_pass_the_refusal_on(tmp_path, processor):
    with pytest.raises(ValueError, match="record 'no-17': 'chosen' is empty"):
        train(tmp_path, processor, [pair(chosen=messages("", "assistant"))], dataloader_num_workers=1)


def test_a_bad_evaluation_record(tmp_path):
    trainer = small_run(tmp_path)
    with pytest.raises(ValueError, match="record 'no-17': 'rejected' is empty"):
        trainer.evaluate(Dataset.from_list([pair(rejected=messages("", "assistant"))]))
    assert torch.isfinite(next(trainer.model.parameters())).all()

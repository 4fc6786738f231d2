"""A dry run plans the rows that the trainer makes, and needs no weights."""

import json

import pytest
from official_checkpoints import write_official
from support import TEXTS, make_image
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3MoeConfig, SmolVLMConfig

from mpo import MPOTrainer
from mpo.commands import main
from mpo.data import load_preferences
from mpo.encoding.costs import measure
from mpo.models.small import small_processor
from mpo.preflight.dry_run import Workload
from mpo.preflight.structure import build_structure, count_parameters, meta_model
from mpo.training.job import TrainJob

SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
EXPERTS = {"moe_intermediate_size": 16, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    make_image(0, 64, 32).save(folder / "a.png")
    record = {"question": "What is it? " * 5, "chosen": "It is a cat. " * 3, "rejected": "It is a dog, I think."}
    (folder / "text.jsonl").write_text(json.dumps(record))
    (folder / "image.jsonl").write_text(json.dumps({**record, "image": "a.png"}))
    return folder


@pytest.mark.parametrize(
    ("experts", "settings", "layout"),
    [
        (True, {}, "padded"),  # the router loss counts every token
        (True, {"router_aux_loss_coef": 0.0}, "packed"),
        (False, {}, "packed"),
        (False, {"neftune_noise_alpha": 5.0}, "padded"),
        (False, {"pad_to_multiple_of": 16}, "padded"),
        (False, {"rows": "padded"}, "padded"),
    ],
)
def test_planned_tokens_are_those_of_the_trainers_batch(experts, settings, layout, pairs, tmp_path):
    processor = small_processor(TEXTS)
    tokenizer = processor.tokenizer
    tokenizer.chat_template = processor.chat_template
    tokenizer.save_pretrained(tmp_path / "model")
    config = Qwen3MoeConfig(**SIZES, **EXPERTS) if experts else Qwen2Config(**SIZES)
    config.vocab_size = len(tokenizer)
    config.save_pretrained(tmp_path / "model")
    job = TrainJob.from_config(
        {
            "model": {"_target_": "mpo.models.loading.load_model", "name_or_path": str(tmp_path / "model")},
            "data": {"path": str(pairs / "text.jsonl")},
            "trainer": {"use_cpu": True, "bf16": False, "report_to": "none", **settings},
            "run_dir": str(tmp_path / "run"),
        }
    )
    records, args, structure = load_preferences(pairs / "text.jsonl"), job.planned_arguments(), build_structure(job)
    costs = measure(records, structure.processor)
    work = Workload(records, records, costs, structure.model, structure.processor, args, ranks=1)
    model = AutoModelForCausalLM.from_config(config)
    trainer = MPOTrainer(model, args=job.arguments(), train_dataset=records.remove_columns("images"), processing_class=tokenizer)
    planned, trained = work.batch(work.most_expensive), trainer.data_collator([trainer.train_dataset[0]])
    assert (work.layout, trainer.layout) == (layout, layout)
    assert planned["input_ids"].shape == trained["input_ids"].shape
    assert planned.tokens == trained.tokens
    if layout == "padded":
        assert work.tokens.tolist() == [trained.tokens]
    assert (work.padded_because is None) == (layout == "packed" or "rows" in settings)


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
def test_an_official_folder_without_weights(family, pairs, tmp_path, capsys):
    """The router loss that training refuses is refused here too."""
    folder = write_official(tmp_path / "official", family)
    (folder / "model.safetensors").unlink()
    words = ["train", f"model.name_or_path={folder}", f"data.path={pairs / 'image.jsonl'}", f"run_dir={tmp_path / 'run'}"]
    words += ["trainer.global_batch_size=1", "dry_run=true"]
    if family == "qwen3_moe":
        assert main(words) == 2
        assert "router_aux_loss_coef" in capsys.readouterr().err
        words.append("trainer.router_aux_loss_coef=0")
    assert main(words) == 0
    page = capsys.readouterr().out
    assert "activations, vision tower" in page and "NOT included" not in page and "rows: packed" in page
    assert main([*words[:-2], *words[-1:], "dry_run=false"]) == 2  # training needs them
    assert "model.safetensors" in capsys.readouterr().err


def test_parts_of_an_unknown_family_are_one():
    text = {"model_type": "llama", **SIZES, "vocab_size": 64}
    model = meta_model(SmolVLMConfig(text_config=text, vision_config={"hidden_size": 32, "num_hidden_layers": 1}))
    counts = {part: count for part, (count, _) in count_parameters(model).items() if count}
    assert set(counts) <= {"model", "LM head"}
    assert sum(counts.values()) == model.num_parameters()

"""MPOConfig: the paper's defaults, TRL's meanings, refusals, the command line."""

import copy
import dataclasses
import os
import warnings

import pytest
import torch
from small_runs import in_fork, small_run
from support import image_pairs
from torch.distributed.elastic.utils.distributed import get_free_port
from transformers import HfArgumentParser
from transformers.training_args import ParallelMode
from trl import DPOConfig

from mpo import MPOConfig, MPOTrainer, PackedSFTConfig
from mpo.training.loop_config import LoopConfig, _has_bf16


def config(**settings) -> MPOConfig:
    return MPOConfig("out", **{"use_cpu": True, "report_to": "none", **settings})


def test_defaults_are_the_papers():
    """arXiv 2411.10442, section 7 and equation 3."""
    args = config()
    assert repr(args.mixture()) == "Mixture(0.8 sigmoid + 0.2 bco_pair + 1 sft)"
    assert (args.beta, args.learning_rate, args.weight_decay, args.num_train_epochs) == (0.1, 5e-6, 0.05, 1)
    assert (args.lr_scheduler_type, args.warmup_steps, args.adam_beta1, args.adam_beta2) == ("cosine", 0.05, 0.9, 0.999)
    assert (args.reward_shift, args.sft_average, args.completion_end, args.max_length) == (
        "running_mean",
        "completion",
        "end_of_turn",
        None,
    )


def test_loss_type_means_what_it_means_in_trl():
    assert repr(config(loss_type="sigmoid").mixture()) == "Mixture(1 sigmoid)"
    assert config(loss_type=["sigmoid", "bco_pair", "sft"]).loss_weights is None  # 1.0 each, as TRL has it
    assert config(loss_weights=[1.0, 0.5, 0.25]).mixture().weights == [1.0, 0.5, 0.25]


def test_every_field_of_trls_is_there():
    assert set(DPOConfig.__dataclass_fields__) <= set(MPOConfig.__dataclass_fields__)


def test_defaults_do_not_warn(tmp_path):
    """Neither of old names of transformers nor, in the epochs to come, of pinned memory that nothing is copied to."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        args = MPOConfig(str(tmp_path), report_to="none", use_cpu=True)
    assert args.gradient_checkpointing and not args.dataloader_pin_memory


def test_steps_do_not_warn(tmp_path):
    """TRL asks every step by an old name whether checkpointing is on."""
    trainer = small_run(tmp_path, max_steps=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    assert not [one.message for one in caught if "is_gradient_checkpointing" in str(one.message)]


def test_bf16_only_where_the_hardware_has_it():
    assert config().bf16 is False
    assert config(bf16=True).bf16 is True


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "bco"}, "Did you mean 'bco_pair'"),
        ({"loss_weights": [1.0]}, "1 numbers for the 3 losses"),
        ({"label_smoothing": 0.1}, "has no effect"),
        ({"reward_shift": "ema"}, "reward_shift.*'running_mean'.*'ema'"),
        ({"sft_average": "tokens"}, "sft_average.*'tokens'"),
        ({"completion_end": "eos"}, "completion_end.*'eos'"),
        ({"ld_alpha": 1.5}, "ld_alpha.*1.5"),
        ({"max_steps": 0}, "max_steps=0.*trains nothing"),
        ({"num_train_epochs": 0}, "num_train_epochs=0 trains nothing"),
        ({"learning_rate": -1.0}, "learning_rate.*-1.0"),
        ({"vision_learning_rate": float("nan")}, "vision_learning_rate.*nan"),
        ({"loss_type": ["aot"], "use_weighting": True}, "use_weighting.*aot"),
        ({"f_divergence_type": "js_divergence"}, "js_divergence.*'bco_pair'"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)


def test_command_line():
    words = ["--output_dir", "out", "--use_cpu", "true", "--loss_type", "sigmoid", "sft", "--sft_average", "token"]
    (args,) = HfArgumentParser(MPOConfig).parse_args_into_dataclasses(words)
    assert (args.loss_type, args.sft_average) == (["sigmoid", "sft"], "token")


@pytest.mark.parametrize("kind", [MPOConfig, PackedSFTConfig])
def test_every_field_has_its_help_text(kind):
    """It is written once, in the docstring; what the docstring does not name has TRL's or transformers' text."""
    named = {*LoopConfig.__annotations__, *kind.__annotations__}
    found = {one.name: one.metadata["help"] for one in dataclasses.fields(kind) if one.name in named}
    assert len(found) > 25 and all(found.values())
    assert found["tile_budget"].startswith(
        'what the processor\'s tile limit applies to: all images of a prompt together ("prompt",'
    )
    assert found["weight_decay"] == DPOConfig.__dataclass_fields__["weight_decay"].metadata["help"]
    assert "stochastic depth" in HfArgumentParser(kind).format_help()


def test_a_dpo_config_is_refused(internvl, processor, pairs_of_text):
    with pytest.raises(ValueError, match="MPOConfig.*DPOConfig"):
        MPOTrainer(
            internvl,
            args=DPOConfig("out", use_cpu=True, bf16=False, report_to="none"),
            train_dataset=pairs_of_text,
            processing_class=processor,
        )


def test_a_config_built_model_needs_its_processor(internvl, pairs_of_text):
    with pytest.raises(ValueError, match="built from a config.*processing_class"):
        MPOTrainer(internvl, args=config(), train_dataset=pairs_of_text)


def test_a_quantized_model_needs_an_adapter(internvl, processor, pairs_of_text, tmp_path):
    from transformers import BitsAndBytesConfig

    with pytest.raises(ValueError, match="quantization_config.*peft_config"):
        MPOTrainer(
            str(tmp_path),
            args=config(),
            train_dataset=pairs_of_text,
            processing_class=processor,
            quantization_config=BitsAndBytesConfig(load_in_4bit=True),
        )


def test_emulated_bf16_is_not_chosen(tmp_path, monkeypatch):
    """PyTorch reports bfloat16 on a T4 and emulates it."""
    monkeypatch.setattr("mpo.training.loop_config.is_torch_bf16_gpu_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for native in (False, True):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True, native=native: native or including_emulation
        )
        assert _has_bf16() == native


def test_one_gpu_of_several_without_a_launcher(processor, internvl, tmp_path, monkeypatch, caplog):
    """transformers would split a batch over all GPUs with nn.DataParallel, which breaks packed rows."""
    args = MPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_steps=1, save_strategy="no")
    args._n_gpu = 2
    trainer = MPOTrainer(model=internvl, args=args, train_dataset=image_pairs(2), processing_class=processor)
    assert trainer.args.n_gpu == 1 and "1 of 2 GPUs" in caplog.text
    trainer.train()


@pytest.mark.parametrize("kind", ["full", "lora", "tokenizer"])
def test_the_callers_configuration_is_not_changed(tmp_path, monkeypatch, kind):
    """Neither by the constructor nor by training; two trainers may share one."""
    given, before = [], []
    made = MPOConfig.__post_init__

    def kept(self):
        made(self)
        given.append(self)
        before.append(copy.deepcopy({name: value for name, value in vars(self).items() if name in type(self).__dataclass_fields__}))

    monkeypatch.setattr(MPOConfig, "__post_init__", kept)
    trainer = small_run(tmp_path, kind=kind, max_steps=1, eval_pairs=2, eval_strategy="steps", dataloader_drop_last=True)
    trainer.train()
    assert trainer.args is not given[0]
    assert {name: getattr(given[0], name) for name in before[0]} == before[0]


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without an accelerator")
def test_ranks_without_a_gpu_are_joined():
    """Without `use_cpu` accelerate would leave each alone, with a model of its own that it writes to the same folder."""

    def rank():
        os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": port})
        assert config(use_cpu=False, bf16=True).parallel_mode == ParallelMode.DISTRIBUTED

    port = str(get_free_port())
    assert in_fork(rank) == 0

"""Every option of every group, and every model with its method, each kind of adapter and launch, composes and binds."""

from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from composition import composition
from omegaconf import OmegaConf

from mpo.commands.train import GROUPS
from mpo.recipes import EXPERIMENTS, OPTIONS
from mpo.training.job import TrainJob

RECIPES = Path(str(files("mpo.recipes")))
FILES = sorted(path.relative_to(RECIPES).as_posix() for path in RECIPES.rglob("*.yaml") if path.name != "train.yaml")
CHOICES = [tuple(name.removesuffix(".yaml").split("/")) for name in FILES if "/" in name]
CHOICES += [(group, name) for group in GROUPS for name in OPTIONS.get(group, {}) if name not in EXPERIMENTS]
MODELS = sorted({choices["model"] for choices in EXPERIMENTS.values()})
PUBLISHED = {
    "internvl2": (5e-6, 5e-5, 256, 6144),
    "internvl2_5": (1e-6, 2e-5, 256, 8192),
    "internvl3": (2e-7, 2e-5, 256, 12288),
    "internvl3_5": (2e-7, 2e-5, 256, 16384),
}
"""Family -> learning rate of all weights and of adapters, pairs per step, tokens."""
LARGE = {"internvl2_5_38b": (512, 8192), "internvl2_5_78b": (512, 8192), "internvl3_38b": (512, 8192), "internvl3_78b": (512, 8192)}


OF_STAGES = (*(f"internvl2_5_stage{stage}" for stage in ("1", "1_5", "2")), "mmfuser_stage1", "mmfuser_stage2")
OF_SFT = ("data=conversations", "trainer=sft", *(f"method={stage}" for stage in OF_STAGES))


def composed(*overrides, command="train"):
    return composition(overrides, command)


def bound(config, tmp_path):
    """Return the trainer's arguments of a job, and its adapter."""
    plain = OmegaConf.to_container(config, resolve=True)
    plain |= {"run_dir": str(tmp_path), "dry_run": True}  # some shard the model over GPUs, and there are none here
    plain["data"]["path"] = "pairs.jsonl"
    if "name_or_path" in plain["model"]:
        plain["model"]["name_or_path"] = "somewhere"
    plain["trainer"] |= {"use_cpu": True, "bf16": False}
    job = TrainJob.from_config(plain)
    return job.planned_arguments(), job.adapter()


def test_every_folder_and_every_group_of_options_is_a_group():
    folders = {path.name for path in RECIPES.iterdir() if path.is_dir() and not path.name.startswith("__")}
    assert folders | {group.split("/")[0] for group in OPTIONS} == set(GROUPS)


@pytest.mark.parametrize("name", FILES)
def test_every_recipe_says_what_it_is(name):
    text = (RECIPES / name).read_text()
    assert "#" in text
    assert isinstance(yaml.safe_load(text), dict)


@pytest.mark.parametrize(("group", "option"), [pair for pair in CHOICES if pair[1] not in MODELS])
def test_every_option_binds(group, option, tmp_path):
    arguments, _ = bound(composed(choice := f"{group}={option}", command="sft" if choice in OF_SFT else "train"), tmp_path)
    assert arguments.gradient_accumulation_steps >= 1


@pytest.fixture(scope="module")
def adapters():
    """The peft group with each of its options. Its files set nothing else."""
    return {peft: composed(f"peft={peft}").peft for peft in ("none", "lora", "qlora")}


@pytest.mark.parametrize("model", MODELS)
def test_every_model_with_every_adapter(model, adapters, tmp_path):
    """The numbers of the official scripts; drop path and float32 weights for all weights only."""
    family = model.rsplit("b", 1)[0].rsplit("_a", 1)[0].rstrip("b").rsplit("_", 1)[0]
    full, adapted, pairs, tokens = PUBLISHED[family]
    pairs, tokens = LARGE.get(model, (pairs, tokens))
    config = composed(f"model={model}")
    if model in LARGE:  # the same when the method is given
        assert config == composed(f"model={model}", f"method={family}")
    for peft, group in adapters.items():
        config.peft = group
        arguments, adapter = bound(config, tmp_path)
        assert (adapter is None) == (peft == "none")
        assert arguments.learning_rate == (full if peft == "none" else adapted)
        assert (arguments.gradient_accumulation_steps, arguments.max_length) == (pairs, tokens)
        assert (arguments.warmup_steps, arguments.weight_decay, arguments.num_train_epochs) == (0.03, 0.05, 1)
        assert config.model.dtype == ("float32" if peft == "none" else "bfloat16")
        tower = 0.4 if model.endswith(("26b", "38b", "78b", "a28b")) else 0.1
        small = model in ("internvl3_5_1b", "internvl3_5_2b", "internvl3_5_4b")
        assert config.drop_path == (tower if peft == "none" and not small else 0.0)


def test_every_family_is_here():
    sizes = {"internvl2": 1, "internvl2_5": 7, "internvl3": 7, "internvl3_5": 8}
    assert len(MODELS) == sum(sizes.values())
    assert len(EXPERIMENTS) == 3 * len(MODELS) - 2  # QLoRA leaves the experts of a mixture as they are


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("internvl3_2b", ["model=internvl3_2b"]),
        ("internvl3_38b", ["model=internvl3_38b", "launch=fsdp2"]),
        ("internvl3_5_30b_a3b_lora", ["model=internvl3_5_30b_a3b", "peft=lora"]),
        ("internvl3_5_241b_a28b_lora", ["model=internvl3_5_241b_a28b", "peft=lora", "launch=fsdp2"]),
        ("internvl2_5_78b_qlora", ["model=internvl2_5_78b", "peft=qlora"]),
    ],
)
def test_an_experiment_is_its_groups(name, groups):
    assert composed(f"experiment={name}", "run_dir=x") == composed(*groups, "run_dir=x")


@pytest.mark.parametrize("launch", ["ddp", "single", "fsdp2", "zero1", "zero2", "zero3"])
def test_a_launch_replaces_that_of_an_experiment(launch, tmp_path):
    config = composed("experiment=internvl3_8b", f"launch={launch}")
    assert ("fsdp" in config.trainer, "deepspeed" in config.trainer) == (launch == "fsdp2", launch.startswith("zero"))
    bound(config, tmp_path)


def test_precedence():
    """An own value or method replaces the published one, and an own experiment builds on a published one."""
    assert composed("model=internvl3_38b", "method=none").trainer.learning_rate == 5e-6
    config = composed("experiment=internvl3_38b_lora", "method=internvl3_5", "trainer.learning_rate=1e-4")
    assert (config.trainer.learning_rate, config.trainer.max_length) == (1e-4, 16384)
    small = composed("experiment=small_gpu_24gb")
    assert (small.model.name_or_path, small.peft.kind) == ("OpenGVLab/InternVL3-14B-Instruct", "qlora")
    assert (small.trainer.learning_rate, small.trainer.global_batch_size) == (2e-5, 32)


def test_the_default_loss_is_mpo(tmp_path):
    arguments, _ = bound(composed(), tmp_path)
    assert repr(arguments.mixture()) == "Mixture(0.8 sigmoid + 0.2 bco_pair + 1 sft)"

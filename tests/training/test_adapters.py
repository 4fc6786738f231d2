"""Runs with every kind of adapter: the reference is the start, a function of the record; the folder is the trained model."""

import copy

import pytest
import torch
from peft import (
    AdaLoraConfig,
    FourierFTConfig,
    HRAConfig,
    IA3Config,
    LilyConfig,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
)
from support import TEXTS, completion_mask, image_pairs
from transformers import AutoModelForImageTextToText, TrainerCallback

from mpo import MPOConfig, MPOTrainer
from mpo.models.small import small_internvl, small_processor
from mpo.training.reference.adapters import START_FILE

pytestmark = pytest.mark.slow

TARGETS = r".*language_model.*\.(q_proj|v_proj)"
METHODS = {
    "LoRA": LoraConfig(r=4, target_modules=TARGETS, lora_dropout=0.3),
    "LoRA in the tower": LoraConfig(r=4, target_modules=r".*(vision_tower|language_model).*\.(q_proj|v_proj)", lora_dropout=0.3),
    "DoRA": LoraConfig(r=4, target_modules=TARGETS, lora_dropout=0.3, use_dora=True),
    "rsLoRA": LoraConfig(r=4, target_modules=TARGETS, use_rslora=True),
    "PiSSA": LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="pissa"),
    "OLoRA": LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="olora", rank_pattern={"q_proj": 2}),
    "OLoRA, DoRA": LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="olora", use_dora=True, lora_alpha=16),
    "all biases": LoraConfig(r=4, target_modules=TARGETS, bias="all"),
    "biases of its layers": LoraConfig(r=4, target_modules=TARGETS, bias="lora_only", init_lora_weights="pissa"),
    "embeddings": LoraConfig(r=4, target_modules=r".*(embed_tokens|q_proj)"),
    "whole modules": LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["multi_modal_projector", "lm_head"]),
    "new tokens": LoraConfig(r=4, target_modules=TARGETS, trainable_token_indices={"embed_tokens": [5, 6]}),
    "IA3": IA3Config(target_modules=r".*language_model.*\.(k_proj|down_proj)", feedforward_modules=r".*down_proj"),
    "LoHa": LoHaConfig(r=4, target_modules=TARGETS, rank_dropout=0.3),
    "LoKr": LoKrConfig(r=4, target_modules=TARGETS, module_dropout=0.3),
    "VeRA": VeraConfig(r=8, target_modules=TARGETS, vera_dropout=0.3),
    "HRA": HRAConfig(r=4, target_modules=TARGETS),
    "OFT": OFTConfig(r=0, oft_block_size=8, target_modules=TARGETS, module_dropout=0.3),
    "FourierFT": FourierFTConfig(n_frequency=20, target_modules=TARGETS, init_weights=True),
    "LayerNorms": LNTuningConfig(target_modules=["input_layernorm"]),
}
"""Some of every family: factors, scales, orthogonal and spectral ones, norms, biases, and those that change the base."""
STEPS = 6


@pytest.fixture(scope="module")
def processor():
    return small_processor(TEXTS, image_size=32, patch_size=8, max_patches=4)


MADE = {"records": image_pairs(4)}
"""What every test begins with, made once: the base model and the records."""


def base(processor, attention_dropout=0.0):
    if "model" not in MADE:
        MADE["model"] = small_internvl(processor, hidden_size=32, layers=2, vision_hidden_size=32, vision_layers=2)
    model = copy.deepcopy(MADE["model"])
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = attention_dropout
    return model


def trainer_of(tmp_path, processor, model, callbacks=(), **settings) -> MPOTrainer:
    peft_config, ref_model = settings.pop("peft_config", None), settings.pop("ref_model", None)
    args = MPOConfig(
        str(tmp_path / "run"),
        **{
            **{"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "gradient_checkpointing": False},
            **{"learning_rate": 0.05, "lr_scheduler_type": "constant", "warmup_steps": 0, "max_steps": STEPS},
            **{"per_device_train_batch_size": 2, "save_strategy": "no", "logging_steps": 1, "max_grad_norm": 0.1, **settings},
        },
    )
    return MPOTrainer(
        model=model,
        ref_model=ref_model,
        args=args,
        train_dataset=MADE["records"],
        processing_class=processor,
        peft_config=copy.deepcopy(peft_config),
        callbacks=list(callbacks),
    )


def plain_sums(model, trainer) -> torch.Tensor:
    """Log-prob sums of the completions, by a plain forward pass over padded rows in evaluation mode."""
    batch = trainer.data_collator.__class__(trainer.processing_class)([trainer.train_dataset[i] for i in range(4)])
    with torch.no_grad():
        logits = model.eval()(**{n: batch[n] for n in ("input_ids", "attention_mask", "pixel_values")}).logits.float()
    logps = logits[:, :-1].log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
    return (logps * completion_mask(batch)[:, 1:]).sum(1)


class Reference(TrainerCallback):
    """Reference sums of the first four records before the first step, after it and after the last, in training mode."""

    def __init__(self):
        self.sums = []

    def look(self):
        batch = self.trainer.data_collator([self.trainer.train_dataset[i] for i in range(4)])
        model = self.trainer.model if self.trainer.ref_model is None else self.trainer.ref_model
        model.train()
        self.sums.append(self.trainer.compute_ref_log_probs(model, batch).flatten())

    def on_step_begin(self, args, state, *rest, **kwargs):
        if state.global_step == 0:
            self.look()

    def on_step_end(self, args, state, *rest, **kwargs):
        if state.global_step in (1, args.max_steps):
            self.look()


def moved_start(model):
    """The same model with noise on everything trained."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.05)
    return model


def adapted(tmp_path, processor, method, start, attention_dropout=0.0):
    """The model and the peft_config for the trainer, and the true reference."""
    if start == "fresh":
        return base(processor, attention_dropout), METHODS[method], base(processor)
    folder = tmp_path / "begun"
    if not folder.exists():
        torch.manual_seed(1)
        moved_start(get_peft_model(base(processor), copy.deepcopy(METHODS[method]))).save_pretrained(folder)
    policy = PeftModel.from_pretrained(base(processor, attention_dropout), folder, adapter_name="mine", is_trainable=True)
    return policy, None, PeftModel.from_pretrained(base(processor), folder)


NOISES = {
    "off": ({}, 0.0, "packed"),
    "adapter": ({"disable_dropout": False}, 0.0, "packed"),
    "attention, NEFTune": ({"disable_dropout": False, "neftune_noise_alpha": 5.0}, 0.2, "padded"),
}
"""Settings, dropout of the base model's attention, and the rows that follow from them."""


def has_dropout(config) -> bool:
    return any(value for name, value in vars(config).items() if name.endswith("dropout"))


CASES = [(method, noise) for method, config in METHODS.items() for noise in NOISES if noise != "adapter" or has_dropout(config)]
"""Without dropout of an adapter's own, noise of adapters is none."""


@pytest.mark.parametrize("start", ["fresh", "continued"])
@pytest.mark.parametrize(("method", "noise"), CASES)
def test_the_reference_is_the_start_and_the_folder_the_trained_model(tmp_path, processor, method, start, noise, record_property):
    """Live and cached; six steps do not move it; the folder is the trained model for plain peft."""
    settings, attention_dropout, layout = NOISES[noise]
    model, peft_config, truth = adapted(tmp_path, processor, method, start, attention_dropout)
    look = Reference()
    trainer = look.trainer = trainer_of(tmp_path, processor, model, [look], peft_config=peft_config, **settings)
    expected = plain_sums(truth, trainer)
    assert (plain_sums(trainer.model, trainer) - expected).abs().max() < 2e-4
    assert trainer.layout == layout
    trainer.train()
    assert len(look.sums) == 3
    for sums in look.sums:
        assert (sums - expected).abs().max() < 2e-4
    drift = (look.sums[-1] - look.sums[0]).abs().max().item()
    record_property("difference", ("reference of an adapter, after six steps", drift))
    assert drift == 0
    moved = plain_sums(trainer.model, trainer)
    assert (moved - expected).abs().max() > 1e-2

    trainer.save_model()
    loaded = PeftModel.from_pretrained(base(processor), tmp_path / "run" / ("mine" if start == "continued" else ""))
    assert (plain_sums(loaded, trainer) - moved).abs().max() < 1e-3

    model, peft_config, _ = adapted(tmp_path, processor, method, start, attention_dropout)
    settings = {**settings, "reference": "cached", "reference_cache": str(tmp_path / "cache")}
    cached = trainer_of(tmp_path, processor, model, peft_config=peft_config, **settings)
    cached.model.train()
    batch = cached.data_collator([cached.train_dataset[i] for i in range(4)])
    cached.compute_loss(cached.model, batch)
    found = cached._references.get(batch.completion_keys)
    assert found.known.all() and (torch.from_numpy(found.logps) - expected).abs().max() < 2e-4


# The start survives 16 bits, a resume and a sharded model


@pytest.mark.parametrize("method", ["LoRA", "all biases", "PiSSA"])
def test_the_reference_in_bfloat16(tmp_path, processor, method):
    """Autocast keeps 16-bit copies of weights; those of the policy are not taken for the reference's."""
    look = Reference()
    look.trainer = trainer_of(tmp_path, processor, base(processor), [look], peft_config=METHODS[method], bf16=True)
    look.trainer.train()
    assert all(torch.equal(sums, look.sums[0]) for sums in look.sums)


@pytest.mark.parametrize("method", ["all biases", "PiSSA", "OLoRA, DoRA"])
def test_a_resumed_run_is_the_same(tmp_path, processor, method):
    """Bitwise, weights and logs; and a checkpoint is the trained model for plain peft."""
    ends = []
    for resume in (None, str(tmp_path / "run" / "checkpoint-2")):
        trainer = trainer_of(
            tmp_path, processor, base(processor), peft_config=METHODS[method], max_steps=4, save_strategy="steps", save_steps=2
        )
        trainer.train(resume_from_checkpoint=resume)
        ends.append(trainer)
    for first, second in zip(ends[0].model.parameters(), ends[1].model.parameters(), strict=True):
        assert torch.equal(first, second)
    assert [log["loss"] for log in ends[0].state.log_history if "loss" in log][-2:] == [
        log["loss"] for log in ends[1].state.log_history if "loss" in log
    ][-2:]
    loaded = PeftModel.from_pretrained(base(processor), tmp_path / "run" / "checkpoint-4")
    assert (plain_sums(loaded, ends[0]) - plain_sums(ends[0].model, ends[0])).abs().max() < 1e-3


def random_start(processor, seed):
    torch.manual_seed(seed)
    return moved_start(get_peft_model(base(processor), copy.deepcopy(METHODS["LoRA"])))


def test_a_resumed_run_has_the_reference_it_began_with(tmp_path, processor):
    """The script makes another random adapter when it is started again."""
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    look = Reference()
    look.trainer = trainer_of(tmp_path, processor, random_start(processor, 1), [look], **settings)
    look.trainer.train()
    again = Reference()
    again.trainer = trainer_of(tmp_path, processor, random_start(processor, 2), [again], **settings)
    again.trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert torch.equal(again.sums[-1], look.sums[0])

    cached = {**settings, "reference": "cached", "reference_cache": str(tmp_path / "cache")}
    trainer = trainer_of(tmp_path, processor, random_start(processor, 2), **cached)
    with pytest.raises(ValueError, match="started from another .*cached"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))


def test_a_checkpoint_without_the_start_is_refused(tmp_path, processor):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "peft_config": METHODS["all biases"]}
    trainer_of(tmp_path, processor, base(processor), **settings).train()
    (tmp_path / "run" / "checkpoint-2" / START_FILE).unlink()
    with pytest.raises(ValueError, match=START_FILE):
        trainer_of(tmp_path, processor, base(processor), **settings).train(str(tmp_path / "run" / "checkpoint-2"))


@pytest.mark.parametrize("kind", ["the checkpoint, full", "another base, LoRA", "another base, continued"])
def test_a_run_resumed_from_another_start_is_refused(tmp_path, processor, kind):
    """Its reference would silently be another one."""
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    settings |= {"peft_config": METHODS["LoRA"]} if kind.endswith("LoRA") else {}
    first = random_start(processor, 1) if kind.endswith("continued") else base(processor)
    trainer_of(tmp_path, processor, first, **settings).train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    if kind.endswith("full"):
        second = AutoModelForImageTextToText.from_pretrained(checkpoint)
    else:
        second = random_start(processor, 1) if kind.endswith("continued") else base(processor)
        next(
            parameter for parameter in second.parameters() if not (kind.endswith("continued") and parameter.requires_grad)
        ).data += 1
    with pytest.raises(ValueError, match="started from another model"):
        trainer_of(tmp_path, processor, second, **settings).train(resume_from_checkpoint=str(checkpoint))


def test_references_with_adapters_do_not_share_a_cache(tmp_path, processor):
    """Adapters put into the plain model that is passed as `ref_model`: two of them, and none."""
    references = [random_start(processor, seed).get_base_model() for seed in (1, 2)] + [base(processor)]
    losses = []
    for reference in references:
        settings = {"reference": "cached", "reference_cache": str(tmp_path / "cache"), "max_steps": 1}
        trainer = trainer_of(tmp_path, processor, base(processor), ref_model=reference, **settings)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss/sigmoid"])
    assert len(list((tmp_path / "cache").glob("*/meta.json"))) == 3
    assert losses[2] == pytest.approx(0.693147, abs=1e-5)
    assert len({round(loss, 4) for loss in losses}) == 3


def test_wrong_cached_values_stop_the_run(tmp_path, processor):
    """One value of the first batch is 0.2 nats off."""
    settings = {"peft_config": METHODS["LoRA"], "reference": "cached", "reference_cache": str(tmp_path / "cache"), "max_steps": 1}
    trainer = trainer_of(tmp_path, processor, base(processor), **settings)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    sums = trainer.compute_ref_log_probs(trainer.model, batch).flatten()
    trainer._references.add(batch.completion_keys, sums + 0.5, batch.labelled.lengths)
    with pytest.raises(ValueError, match="same log-probs.*mpo cache"):
        trainer.train()


# What is refused


def with_adapter(processor, config, change=lambda model: None, **options):
    model = get_peft_model(base(processor), copy.deepcopy(config), **options)
    change(model)
    return model


REFUSED_CONFIGS = {
    "PREFIX_TUNING": PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    "PROMPT_TUNING": PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    "ADALORA": AdaLoraConfig(target_modules=TARGETS, total_step=10),
    "LILY": LilyConfig(r=4, target_modules=TARGETS),
    "init_lora_weights=False": LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False),
    "init_ia3_weights=False": IA3Config(target_modules=TARGETS, feedforward_modules=[], init_ia3_weights=False),
    "init_weights=False": FourierFTConfig(n_frequency=20, target_modules=TARGETS),
    "pissa_niter_2": LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="pissa_niter_2"),
    "init_lora_weights='eva'": LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="eva"),
    "init_lora_weights='loftq'": LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="loftq", loftq_config={"loftq_bits": 4}),
    "target_modules puts an adapter on the output head": LoraConfig(r=4, target_modules=["q_proj", "lm_head"]),
    "trainable_token_indices": LoraConfig(r=4, target_modules=TARGETS, trainable_token_indices={"lm_head": [5]}),
}


@pytest.mark.parametrize("named", REFUSED_CONFIGS)
def test_refused_methods(tmp_path, processor, named):
    with pytest.raises(ValueError, match=named):
        trainer_of(tmp_path, processor, base(processor), peft_config=REFUSED_CONFIGS[named])


def test_an_adapter_that_starts_elsewhere_stops_before_the_first_step(tmp_path, processor):
    """VB-LoRA begins at a random mixture of its vectors, 0.002 nats from the base: no option says so."""
    config = VBLoRAConfig(num_vectors=32, vector_length=8, r=4, target_modules=TARGETS, init_vector_bank_bound=2.0)
    trainer = trainer_of(tmp_path, processor, base(processor), peft_config=config)
    with pytest.raises(ValueError, match="method does not start"):
        trainer.train()


@pytest.mark.parametrize("tied", ["trainable_token_indices", "ensure_weight_tying"])
def test_adapters_that_reach_a_tied_head(tmp_path, processor, tied):
    options = {"trainable_token_indices": [5]} if tied == "trainable_token_indices" else {"ensure_weight_tying": True}
    config = LoraConfig(r=4, target_modules=r".*(embed_tokens|q_proj)" if tied == "ensure_weight_tying" else TARGETS, **options)
    model = small_internvl(processor, hidden_size=32, vision_hidden_size=32, tie_word_embeddings=True)
    with pytest.raises(ValueError, match=tied):
        trainer_of(tmp_path, processor, model, peft_config=config)


PASSED = {
    "is_trainable=True": lambda model: model.requires_grad_(False),
    "unmerge_adapter": lambda model: model.merge_adapter(),
    "delete_adapter\\('ref'\\)": lambda model: model.add_adapter("ref", copy.deepcopy(METHODS["LoRA"])),
    "no trained parameters": lambda model: model.base_model.disable_adapter_layers(),
}


@pytest.mark.parametrize("named", PASSED)
def test_refused_models_with_adapters(tmp_path, processor, named):
    with pytest.raises(ValueError, match=named):
        trainer_of(tmp_path, processor, with_adapter(processor, METHODS["LoRA"], PASSED[named]))


def test_adapters_come_from_one_place(tmp_path, processor):
    with pytest.raises(ValueError, match="peft_config"):
        trainer_of(tmp_path, processor, with_adapter(processor, METHODS["LoRA"]), peft_config=METHODS["LoRA"])


@pytest.mark.parametrize("again", ["full", "LoRA"])
def test_a_notebook_cell_run_twice(tmp_path, processor, again):
    """The first trainer has put its adapters into the model object; a full run would train 16 of its 82 tensors."""
    model = base(processor)
    trainer_of(tmp_path, processor, model, peft_config=METHODS["LoRA"])
    with pytest.raises(ValueError, match="InternVLForConditionalGeneration .*PeftModel"):
        trainer_of(tmp_path, processor, model, peft_config=METHODS["LoRA"] if again == "LoRA" else None)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_to_train(tmp_path, processor, checkpointing):
    with pytest.raises(ValueError, match="InternVLForConditionalGeneration .*trained parameters"):
        trainer_of(tmp_path, processor, base(processor).requires_grad_(False), gradient_checkpointing=checkpointing)


@pytest.mark.parametrize("start", ["fresh", "continued"])
def test_a_base_weight_unfrozen_after_construction(tmp_path, processor, start):
    """The reference reads it, and would change with it."""

    class Unfreeze(TrainerCallback):
        def on_train_begin(self, *rest, model, **kwargs):
            model.get_output_embeddings().weight.requires_grad_(True)

    model, peft_config, _ = adapted(tmp_path, processor, "LoRA", start)
    trainer = trainer_of(tmp_path, processor, model, [Unfreeze()], peft_config=peft_config)
    with pytest.raises(ValueError, match="lm_head.weight was frozen"):
        trainer.train()


@pytest.mark.parametrize("peft_config", [None, METHODS["LoRA"]])
def test_an_optimizer_of_another_model(tmp_path, processor, peft_config):
    """With an adapter of the trainer's own, one of the base has nothing to train."""
    model = base(processor)
    optimizer = torch.optim.AdamW(base(processor).parameters() if peft_config is None else model.parameters())
    with pytest.raises(ValueError, match="optimizer"):
        MPOTrainer(
            model=model,
            args=MPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none"),
            train_dataset=image_pairs(2),
            processing_class=processor,
            peft_config=peft_config,
            optimizers=(optimizer, None),
        )


@pytest.mark.parametrize("config", ["LoRA", "whole modules"])
def test_new_tokens_of_an_adapter(tmp_path, processor, config):
    """Rows that were added in memory are in neither the checkpoint nor the adapter's folder; saved with the model they are."""
    base(processor).save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    rows = model.get_input_embeddings().num_embeddings
    model.resize_token_embeddings(rows + 2)
    with pytest.raises(ValueError, match=f"{rows + 2} rows.*{rows}"):
        trainer_of(tmp_path, processor, model, peft_config=METHODS[config])
    model.save_pretrained(tmp_path / "grown")
    trainer_of(tmp_path, processor, AutoModelForImageTextToText.from_pretrained(tmp_path / "grown"), peft_config=METHODS[config])


def test_layers_that_were_copied_are_padded(tmp_path, processor):
    """As peft's layer_replication and upscaling in depth do; they have configs of their own, which packed rows do not reach."""
    model = base(processor)
    layers = model.model.language_model.layers
    layers[1] = copy.deepcopy(layers[1])
    with pytest.raises(ValueError, match="layer 1 .*own config"):
        trainer_of(tmp_path, processor, model, rows="packed")


@pytest.mark.parametrize("shared", ["all", "embeddings"])
def test_a_reference_that_shares_weights_with_the_policy(tmp_path, processor, shared):
    model = base(processor)
    reference = copy.copy(model) if shared == "all" else copy.deepcopy(model)
    if shared == "embeddings":
        reference.set_input_embeddings(model.get_input_embeddings())
    with pytest.raises(ValueError, match="shares .* trained weights"):
        trainer_of(tmp_path, processor, model, ref_model=reference)

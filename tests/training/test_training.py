"""Training: what is logged, which reference is used, and that a step is the mean over its pairs."""

import copy
import json
import warnings

import pytest
import torch
from peft import LoraConfig, VeraConfig
from support import image_pairs, perturbed, text_pairs
from transformers import TrainerCallback

from mpo import MPOConfig, MPOTrainer
from mpo.losses import BCO, PairLoss
from mpo.losses.pairs import LOSSES
from mpo.models.small import small_internvl
from mpo.training.start import frozen_copy

LORA = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=r".*language_model.*\.(q_proj|v_proj)", task_type="CAUSAL_LM")


def build(tmp_path, model, processor, dataset, *, peft_config=None, ref_model=None, eval_dataset=None, callbacks=None, **settings):
    defaults = {
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "gradient_checkpointing": False,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "per_device_train_batch_size": 4,
        "disable_tqdm": True,
    }
    return MPOTrainer(
        model=model,
        ref_model=ref_model,
        args=MPOConfig(str(tmp_path), **{**defaults, **settings}),
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
        peft_config=peft_config,
        callbacks=callbacks,
    )


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


@pytest.mark.parametrize(("schedule", "warmup", "moves"), [("linear", 0.05, False), ("linear", 0, True), ("constant", 0.05, True)])
def test_a_run_of_one_step_says_when_it_learns_nothing(processor, internvl, tmp_path, caplog, schedule, warmup, moves):
    model = copy.deepcopy(internvl)
    trainer = build(tmp_path, model, processor, image_pairs(4), lr_scheduler_type=schedule, warmup_steps=warmup)
    before = weights(trainer)
    trainer.train()
    assert any(not torch.equal(before[name], value) for name, value in weights(trainer).items()) == moves
    assert ("whose learning rate is 0" in caplog.text) != moves


def test_a_run_that_ends_in_its_warmup_says_so(tmp_path):
    """The steps of a warm-up of 8 have 0, 1/8, 2/8 ... of the rate: three of them at most 25 %, eight 87.5 %; the ninth has all."""
    args = MPOConfig(str(tmp_path), warmup_steps=8, report_to="none")
    assert "3 steps" in args.only_warms_up(3) and "25%" in args.only_warms_up(3)
    assert "88%" in args.only_warms_up(8)
    assert args.only_warms_up(9) is None
    without_warmup = MPOConfig(str(tmp_path), warmup_steps=8, lr_scheduler_type="constant", report_to="none")
    assert without_warmup.only_warms_up(3) is None


def test_an_adapter_comes_without_warnings_about_what_peft_calls(processor, internvl, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        build(tmp_path, internvl, processor, image_pairs(2), peft_config=LORA)


def test_logs(processor, internvl, tmp_path):
    trainer = build(tmp_path, internvl, processor, image_pairs(8), eval_dataset=image_pairs(3), eval_strategy="epoch")
    trainer.train()
    train, evaluation = trainer.state.log_history[0], next(log for log in trainer.state.log_history if "eval_loss" in log)
    names = {"loss", "loss/sigmoid", "loss/bco_pair", "loss/sft", "reward_shift"}
    names |= {f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")}
    names |= {"logps/chosen", "logps/rejected", "completion_tokens/chosen", "completion_tokens/rejected"}
    names |= {"tokens_per_second", "pairs_per_second"}
    assert names | {"data_wait"} <= set(train)
    assert 0 < train["data_wait"] < 1
    assert {f"eval_{name}" for name in names} <= set(evaluation)
    for log, prefix in ((train, ""), (evaluation, "eval_")):
        terms = [log[f"{prefix}loss/{name}"] for name in ("sigmoid", "bco_pair", "sft")]
        assert log[f"{prefix}loss"] == pytest.approx(0.8 * terms[0] + 0.2 * terms[1] + terms[2], rel=1e-6)


def test_step_zero_identity(processor, internvl, tmp_path, caplog):
    """A run starts as its own reference: L - L_g = 1.2 ln 2 = 0.831777, all rewards 0."""
    trainer = build(tmp_path, internvl, processor, image_pairs(4), max_steps=1)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] - log["loss/sft"] == pytest.approx(0.831777, abs=1e-5)
    assert log["rewards/chosen"] == log["rewards/rejected"] == 0
    assert "policy should give the same log-probs" not in caplog.text


def test_a_start_that_is_not_the_reference_stops_the_run(processor, internvl, tmp_path):
    trainer = build(tmp_path, internvl, processor, image_pairs(4), max_steps=1)
    perturbed(trainer.model, scale=1.0)
    with pytest.raises(ValueError, match="same log-probs"):
        trainer.train()


def test_full_fine_tuning_keeps_a_copy_of_the_start(processor, internvl, tmp_path):
    """Also of a model changed in memory, whose name would lead to other weights."""
    perturbed(internvl)
    start = {name: value.clone() for name, value in internvl.state_dict().items()}
    trainer = build(tmp_path, internvl, processor, image_pairs(4), max_steps=3)
    trainer.train()
    assert all(torch.equal(value, start[name]) for name, value in trainer.ref_model.state_dict().items())
    assert not any(torch.equal(p, start[n]) for n, p in trainer.model.named_parameters() if "language_model" in n and p.dim() > 1)
    assert not any(parameter.requires_grad for parameter in trainer.ref_model.parameters())


def test_model_by_name(processor, internvl, tmp_path):
    """A path is loaded once; its copy is the reference; `model_init_kwargs` are used."""
    folder = tmp_path / "model"
    internvl.save_pretrained(folder)
    processor.save_pretrained(folder)
    trainer = MPOTrainer(
        model=str(folder),
        args=MPOConfig(
            str(tmp_path / "run"), use_cpu=True, bf16=False, report_to="none", model_init_kwargs={"attn_implementation": "eager"}
        ),
        train_dataset=image_pairs(4),
    )
    assert trainer.model.config._attn_implementation == "eager"
    for name, value in internvl.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[name])
        assert torch.equal(value, trainer.ref_model.state_dict()[name])


def test_lora_has_no_second_model(processor, internvl, tmp_path):
    """The reference is the model with the adapter off: rewards are 0 before the first update, and only the adapter moves."""
    base = {name: value.clone() for name, value in internvl.state_dict().items()}
    trainer = build(tmp_path, internvl, processor, image_pairs(8), peft_config=LORA, num_train_epochs=3)
    assert trainer.ref_model is None
    trainer.train()
    first, last = trainer.state.log_history[0], trainer.state.log_history[-2]
    assert abs(first["rewards/margins"]) < 1e-6
    assert last["rewards/margins"] > 0
    for name, parameter in trainer.model.named_parameters():
        if "lora" not in name:
            original = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(parameter, base[original]), name


def test_lora_under_gradient_checkpointing(processor, internvl, tmp_path):
    """The first step's gradient norm is that of a run without checkpointing."""
    norms = []
    for checkpointing in (False, True):
        trainer = build(
            tmp_path,
            copy.deepcopy(internvl),
            processor,
            image_pairs(4),
            peft_config=LoraConfig(r=4, target_modules=LORA.target_modules),
            gradient_checkpointing=checkpointing,
            max_steps=1,
        )
        trainer.train()
        norms.append(trainer.state.log_history[0]["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert norms[0] > 0


def test_several_evaluation_sets(processor, internvl, tmp_path):
    evaluation = {"images": image_pairs(3), "text": text_pairs(2)}
    trainer = build(tmp_path, internvl, processor, image_pairs(4), eval_dataset=evaluation)
    metrics = trainer.evaluate()
    assert {"eval_images_loss/sft", "eval_text_loss/sft"} <= set(metrics)
    assert metrics["eval_images_loss"] != metrics["eval_text_loss"]


def test_disable_dropout_spares_adapters(processor, internvl, tmp_path):
    trainer = build(tmp_path, internvl, processor, image_pairs(4), peft_config=LORA)
    rates = {m.p for n, m in trainer.model.named_modules() if "lora_dropout" in n and isinstance(m, torch.nn.Dropout)}
    assert rates == {0.1}
    assert trainer.args.disable_dropout


def test_disable_dropout_reaches_what_modules_hold_as_numbers(processor, internvl, tmp_path):
    for module in internvl.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.3
    trainer = build(
        tmp_path, internvl, processor, image_pairs(4), peft_config=VeraConfig(vera_dropout=0.2, target_modules=["q_proj"])
    )
    assert {m.attention_dropout for m in trainer.model.modules() if hasattr(m, "attention_dropout")} == {0.0}
    assert {m.p for n, m in trainer.model.named_modules() if "vera_dropout" in n and isinstance(m, torch.nn.Dropout)} == {0.2}
    assert trainer.layout == "packed"


@pytest.mark.parametrize("name", ["bf16_full_eval", "fp16_full_eval"])
def test_weights_that_an_evaluation_has_rounded_are_not_trained(processor, internvl, tmp_path, name):
    trainer = build(tmp_path, internvl, processor, image_pairs(4), eval_dataset=image_pairs(2), max_steps=1, **{name: True})
    trainer.train()
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    trainer.evaluate()
    with pytest.raises(ValueError, match=f"{name}=True"):
        trainer.train()


def test_drop_path_of_an_earlier_trainer_is_gone(processor, internvl, tmp_path):
    """The same model object: once with 0.4, then with 0.2, then without."""
    counts = []
    for rate in (0.4, 0.2, 0.0):
        trainer = build(tmp_path, internvl, processor, image_pairs(4), vision_drop_path=rate)
        counts.append(sum(len(module._forward_hooks) for module in trainer.model.model.vision_tower.modules()))
    assert counts[0] == counts[1] == counts[2] + 2


def test_noise_of_a_run_that_was_stopped_is_gone(processor, internvl, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            raise KeyboardInterrupt

    trainer = build(tmp_path, internvl, processor, image_pairs(4), neftune_noise_alpha=5.0, callbacks=[Stop()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not internvl.get_input_embeddings()._forward_hooks


def test_a_reference_in_training_mode_is_evaluated(processor, internvl, tmp_path):
    """Handed over as `ref_model` with dropout, which `disable_dropout=False` leaves on: two calls give the same."""
    reference = copy.deepcopy(internvl).train()
    for module in reference.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    trainer = build(tmp_path, internvl, processor, image_pairs(4), ref_model=reference, disable_dropout=False)
    batch = trainer.data_collator(image_pairs(2).to_list())
    first, second = (trainer.compute_ref_log_probs(trainer.ref_model, batch)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert trainer.ref_model.training  # as it was


def test_a_pretrained_adapter_is_its_own_reference(processor, internvl, tmp_path):
    from peft import get_peft_model

    adapted = perturbed(get_peft_model(internvl, LORA))
    trainer = build(tmp_path, adapted, processor, image_pairs(4), max_steps=2)
    trainer.train()
    assert trainer.state.log_history[0]["rewards/chosen"] != 0  # its own dropout
    assert set(trainer.model.peft_config) == {"default"}


def test_reference_free_losses_hold_no_reference(processor, internvl, tmp_path):
    trainer = build(tmp_path, internvl, processor, image_pairs(4), loss_type=["orpo", "sft"], max_steps=2)
    assert trainer.ref_model is None
    trainer.train()
    assert trainer.state.log_history[0]["loss/orpo"] > 0
    assert "rewards/chosen" not in trainer.state.log_history[0]


@pytest.mark.parametrize("sft_average", ["completion", "square"])
@pytest.mark.parametrize("pairs", [8, 7])
def test_a_step_is_the_mean_over_its_pairs(processor, internvl, tmp_path, pairs, sft_average):
    """Eight (or seven) pairs at once, by fours, by threes and one by one give the same weights, though micro-batches are unequal.

    delta is left out: it follows the order of micro-batches.
    """
    ends = []
    for size in (8, 4, 3, 1):
        trainer = build(
            tmp_path,
            copy.deepcopy(internvl),
            processor,
            text_pairs(pairs),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=-(-pairs // size),
            max_steps=2,
            reward_shift="none",
            sft_average=sft_average,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0.0,
        )
        trainer.train()
        ends.append(weights(trainer))
    for end in ends[1:]:
        assert max((end[name] - ends[0][name]).abs().max().item() for name in end) < 1e-6
    assert max((ends[0][n] - v).abs().max().item() for n, v in internvl.state_dict().items()) > 1e-3


def test_evaluation_is_the_mean_over_pairs(processor, internvl, tmp_path):
    """Seven pairs in batches of 3, 3 and 1 as in one batch of 7."""
    reference = perturbed(copy.deepcopy(internvl))
    losses = []
    for size in (3, 7):
        trainer = build(
            tmp_path, copy.deepcopy(internvl), processor, text_pairs(4), ref_model=reference, per_device_eval_batch_size=size
        )
        losses.append(trainer.evaluate(text_pairs(7)))
    assert losses[0]["eval_loss"] == pytest.approx(losses[1]["eval_loss"], rel=1e-6)
    assert losses[0]["eval_rewards/margins"] == pytest.approx(losses[1]["eval_rewards/margins"], rel=1e-4)


def test_evaluation_leaves_delta(processor, internvl, tmp_path):
    trainer = build(tmp_path, internvl, processor, text_pairs(8), eval_dataset=text_pairs(3), num_train_epochs=2)
    trainer.train()
    shift = trainer.mixture.reward_shift.value.item()
    first, second = trainer.evaluate(), trainer.evaluate()
    assert shift != 0
    assert trainer.mixture.reward_shift.value.item() == shift
    assert first["eval_loss"] == second["eval_loss"]
    assert first["eval_reward_shift"] == shift


class StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize("kind", ["full", "lora", "text"])
def test_resume_is_bitwise(processor, internvl, tmp_path, kind):
    """Weights, delta and logs of six steps are those of three steps and, in a new trainer, three more from the checkpoint."""
    dataset = text_pairs(8) if kind == "text" else image_pairs(8)
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 3}
    settings |= {"peft_config": LORA if kind == "lora" else None}
    straight = build(tmp_path / "a", copy.deepcopy(internvl), processor, dataset, **settings)
    straight.train()
    stopped = build(tmp_path / "b", copy.deepcopy(internvl), processor, dataset, **settings, callbacks=[StopAt(3)])
    stopped.train()
    resumed = build(tmp_path / "b", copy.deepcopy(internvl), processor, dataset, **settings)
    resumed.train(resume_from_checkpoint=True)
    expected, got = weights(straight), weights(resumed)
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert torch.equal(straight.mixture.reward_shift.value, resumed.mixture.reward_shift.value)
    logs = [
        {name: value for name, value in trainer.state.log_history[5].items() if "per_second" not in name and name != "data_wait"}
        for trainer in (straight, resumed)
    ]
    assert logs[0] == logs[1]


def test_checkpoint_holds_delta(processor, internvl, tmp_path):
    trainer = build(tmp_path, internvl, processor, text_pairs(8), save_strategy="steps", save_steps=2, num_train_epochs=2)
    trainer.train()
    state = json.loads((tmp_path / "checkpoint-4" / "mpo_state.json").read_text())
    shift = state["reward_shift"]
    assert shift["0.total"] / shift["0.count"] == trainer.mixture.reward_shift.value.item() != 0
    assert shift["0.count"] == 2 * 16  # two rewards a pair


class SecondBCO(BCO):
    name = "second_bco"


def test_a_checkpoint_holds_the_delta_of_every_loss(processor, internvl, tmp_path):
    """Two losses with a delta, of one beta: both deltas are the mean of the same rewards, and both are resumed from."""
    settings = {"loss_type": ["bco_pair", "second_bco"], "save_strategy": "steps", "save_steps": 2}
    build(tmp_path, copy.deepcopy(internvl), processor, text_pairs(8), **settings).train()
    resumed = build(tmp_path, copy.deepcopy(internvl), processor, text_pairs(8), **settings, num_train_epochs=2)
    resumed.train(resume_from_checkpoint=True)
    first, second = resumed.mixture.reward_shifts
    assert first.count == second.count == 2 * 16
    assert first.value == second.value != 0
    earlier = json.loads((tmp_path / "checkpoint-2" / "mpo_state.json").read_text())
    earlier["reward_shift"] = {"total": 3.0, "count": 4.0}  # of the first loss alone, as an earlier version saved it
    one = build(tmp_path, copy.deepcopy(internvl), processor, text_pairs(8), loss_type=["bco_pair"])
    one._restore_state(earlier | {"order": one._order()}, str(tmp_path / "checkpoint-2"))
    assert one.mixture.reward_shift.value == 0.75


def test_best_model_is_loaded_for_real(processor, internvl, tmp_path):
    """Full fine-tuning of InternVL: transformers alone would keep the last weights."""
    trainer = build(
        tmp_path,
        internvl,
        processor,
        image_pairs(8),
        eval_dataset=image_pairs(4),
        num_train_epochs=3,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="rewards/margins",
        greater_is_better=False,  # the first epoch's
    )
    trainer.train()
    best = type(internvl).from_pretrained(tmp_path / "checkpoint-2")
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert all(torch.equal(value, trainer.model.state_dict()[name]) for name, value in best.state_dict().items())


def test_a_checkpoint_of_another_model_is_refused(processor, internvl, tmp_path):
    trainer = build(tmp_path, internvl, processor, text_pairs(4), save_strategy="steps", save_steps=1, max_steps=1)
    trainer.train()
    wider = small_internvl(processor, hidden_size=64, layers=2, vision_hidden_size=32, vision_layers=2)
    other = build(tmp_path, wider, processor, text_pairs(4), max_steps=2)
    with pytest.raises(ValueError, match="hidden_size = 32 .now 64"):
        other.train(resume_from_checkpoint=True)


def test_saved_model_loads_and_generates(processor, internvl, tmp_path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    trainer = build(tmp_path, internvl, processor, image_pairs(4), max_steps=1)
    trainer.train()
    trainer.save_model()
    loaded, loaded_processor = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in trainer.model.state_dict().items())
    inputs = loaded_processor(text="What is it?", return_tensors="pt")
    assert loaded.generate(**inputs, max_new_tokens=3).shape[1] > inputs["input_ids"].shape[1]


def test_streaming(processor, internvl, tmp_path):
    trainer = build(tmp_path, internvl, processor, image_pairs(8).to_iterable_dataset(), max_steps=3)
    trainer.train()
    assert trainer.state.global_step == 3


def test_sync_ref_model(processor, internvl, tmp_path):
    trainer = build(
        tmp_path,
        internvl,
        processor,
        text_pairs(4),
        sync_ref_model=True,
        ref_model_sync_steps=1,
        ref_model_mixup_alpha=1.0,
        max_steps=2,
    )
    trainer.train()
    name, value = next((n, p) for n, p in trainer.model.named_parameters() if "language_model" in n and p.dim() > 1)
    assert torch.equal(trainer.ref_model.state_dict()[name], value)


def test_compute_metrics_gets_logits(processor, internvl, tmp_path):
    shapes = []
    trainer = build(tmp_path, internvl, processor, text_pairs(4), eval_dataset=text_pairs(4))
    trainer.compute_metrics = lambda prediction: shapes.append(prediction.predictions.shape) or {"seen": 1.0}
    assert trainer.evaluate()["eval_seen"] == 1.0
    assert shapes[0][-1] == internvl.config.text_config.vocab_size


def test_frozen_copy_does_not_run_the_original(processor, internvl, tmp_path):
    """A model that an earlier trainer patched is copied without its patch."""
    build(tmp_path, internvl, processor, text_pairs(4))
    copied = frozen_copy(internvl)
    inputs = processor(text="What is it?", return_tensors="pt")
    before = copied(**inputs).logits
    perturbed(internvl, scale=1.0)
    assert torch.equal(copied(**inputs).logits, before)


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_what_a_user_passes_stays_as_it_was(processor, internvl, tmp_path, peft_config):
    """Configurations, with what they hold, processor and data set; transformers' Trainer would leave use_cache in the model's."""
    data, settings = (
        image_pairs(4),
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {}, "model_init_kwargs": None},
    )
    args = MPOConfig(str(tmp_path), use_cpu=True, report_to=[], max_steps=1, save_strategy="no", warmup_steps=0, **settings)
    peft_config = copy.deepcopy(peft_config)

    def seen():
        configs = [
            vars(args),
            vars(internvl.config),
            internvl.generation_config.to_dict(),
            vars(peft_config) if peft_config else None,
        ]
        return [*map(repr, configs), repr(processor), processor.chat_template, data.column_names, data.to_dict()]

    before = seen()
    trainer = MPOTrainer(internvl, args=args, train_dataset=data, processing_class=processor, peft_config=peft_config)
    assert seen() == before
    trainer.train()
    assert seen() == before


def test_a_loss_with_state_is_refused(processor, internvl, tmp_path, monkeypatch):
    """No optimizer would train its parameters, and a resumed run would begin with other values of its buffers."""
    monkeypatch.setattr("mpo.losses.pairs.LOSSES", {})

    class Learned(PairLoss):
        name = "learned"

        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

    monkeypatch.setattr("mpo.losses.mixture.LOSSES", {**LOSSES, "learned": Learned})
    with pytest.raises(ValueError, match="learned has parameters or buffers"):
        build(tmp_path, internvl, processor, text_pairs(4), loss_type=["learned", "bco_pair"])

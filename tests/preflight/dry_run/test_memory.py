"""The components of the memory estimate against real allocations and numbers derived by hand."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from real_shapes import config_of, real_processor
from support import TEXTS, make_image, messages
from transformers import Adafactor

from mpo import MPOConfig
from mpo.batching.collator import PairCollator
from mpo.models.small import small_internvl, small_processor
from mpo.preflight.memory import Sharding, estimate_memory, optimiser_bytes, trained_bytes, weight_bytes
from mpo.preflight.structure import meta_model


@pytest.fixture(scope="module")
def model():
    return small_internvl(small_processor(TEXTS), hidden_size=64, layers=2)


@pytest.fixture(scope="module")
def processor():
    return real_processor()


@pytest.fixture(scope="module")
def batch(processor):
    """A pair with an image of 12 tiles and a thumbnail."""
    record = {
        "prompt": messages("What is it?", "user"),
        "chosen": messages("It is a cat. " * 20, "assistant"),
        "rejected": messages("It is a dog. " * 20, "assistant"),
        "images": [make_image(0, 40, 30)],
    }
    return PairCollator(processor, layout="packed")([record])


@pytest.fixture(scope="module")
def one_billion(processor):
    return meta_model(config_of("InternVL3-1B", processor.image_token_id), "float32")


def arguments(**settings):
    return MPOConfig("unused", use_cpu=True, report_to="none", **{"bf16": False, "gradient_checkpointing": False, **settings})


def parts(estimate):
    return {component.name: component.size for component in (*estimate.fixed, *estimate.passing)}


def state_of(optimiser, model):
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimiser.step()
    optimiser.zero_grad()
    tensors = [value for state in optimiser.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    return sum(tensor.nbytes for tensor in tensors if tensor.numel() > 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optim", ["adamw_torch_fused", "sgd", "adafactor"])
def test_optimiser_state_is_what_is_allocated(model, optim, dtype):
    model = copy.deepcopy(model).to(dtype)
    made = {
        "adamw_torch_fused": lambda: torch.optim.AdamW(model.parameters(), fused=True),
        "sgd": lambda: torch.optim.SGD(model.parameters(), lr=0.1),
        "adafactor": lambda: Adafactor(model.parameters(), lr=0.1, relative_step=False, scale_parameter=False),
    }[optim]()
    assert optimiser_bytes(model, optim, Sharding())[0] == pytest.approx(state_of(made, model), rel=0.01)


def test_eight_bit_state_is_what_is_allocated(model):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = copy.deepcopy(model)
    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    optimiser = bitsandbytes.optim.AdamW8bit(model.parameters())
    manager.register_module_override(model.get_input_embeddings(), "weight", {"optim_bits": 32})
    try:
        allocated = state_of(optimiser, model)
    finally:
        manager.reset() if hasattr(manager, "reset") else None
    codes = sum(  # a table of 256 values, shared by all tensors of a moment; the sum above counts it for each tensor
        state[name].nbytes for state in optimiser.state.values() for name in ("qmap1", "qmap2") if name in state
    )
    assert optimiser_bytes(model, "adamw_bnb_8bit", Sharding())[0] == pytest.approx(allocated - codes, rel=0.05)


def test_weights_and_gradients_are_what_is_allocated(model):
    model = copy.deepcopy(model)
    assert weight_bytes(model, four_bits=False) == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    assert trained_bytes(model) == sum(parameter.grad.nbytes for parameter in model.parameters())


def test_four_bits_are_what_bitsandbytes_allocates():
    """One matrix of 256 x 512 in NF4 with double quantization, without the offset and the shared tables."""
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(torch.randn(256, 512), quant_type="nf4", compress_statistics=True)
    allocated = packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    model = torch.nn.ModuleDict({"language_model": torch.nn.Linear(512, 256, bias=False)})
    assert weight_bytes(model, four_bits=True) == pytest.approx(allocated, rel=0.001)


def test_full_fine_tuning_by_hand(one_billion, batch):
    """938.2 M float32 weights: 3.495 GiB; the same for the reference and the gradients, twice that for AdamW."""
    found = parts(estimate_memory(one_billion, batch, arguments(), gpu=True))
    weights = 938_193_024 * 4
    assert found["weights"] == pytest.approx(weights, rel=1e-3)
    assert found["reference model"] == found["gradients"] == weights
    assert found["optimiser state"] == 2 * weights


@pytest.mark.parametrize(
    ("kind", "weights", "gradients", "state", "reference"),
    [
        ("ddp", 2, 2, 4, 2),
        ("fsdp2", 4 / 8, 4 / 8, 8 / 8, 2 / 8),
        ("zero1", 2, 2, 12 / 8, 2),
        ("zero2", 2, 2 / 8, 12 / 8, 2),
        ("zero3", 2 / 8, 2 / 8, 12 / 8, 2 / 8),
    ],
)
def test_bytes_a_weight_on_each_of_eight_ranks(kind, weights, gradients, state, reference, processor, batch):
    """bfloat16 weights under bf16: DDP keeps all in bfloat16; accelerate casts trained weights to float32 under FSDP2; ZeRO
    keeps float32 master weights and two moments, 12 bytes (arXiv 1910.02054, figure 1)."""
    model = meta_model(config_of("InternVL3-1B", processor.image_token_id), "bfloat16")
    found = parts(estimate_memory(model, batch, arguments(bf16=True), gpu=True, sharding=Sharding(kind, 8)))
    each = {name: found[name] / 938_193_024 for name in ("weights", "gradients", "optimiser state", "reference model")}
    assert list(each.values()) == pytest.approx([weights, gradients, state, reference], rel=1e-3)
    assert ("DDP's buckets" in found) == (kind == "ddp")
    assert ("gathered weights" in found) == (kind in ("fsdp2", "zero3"))


def test_what_needs_no_second_model(one_billion, batch):
    assert parts(estimate_memory(one_billion, batch, arguments(reference="cached"), gpu=True))["reference model"] == 0
    without = arguments(loss_type=["orpo", "sft"])
    assert parts(estimate_memory(one_billion, batch, without, gpu=True))["reference model"] == 0
    with torch.device("meta"):
        adapted = get_peft_model(copy.deepcopy(one_billion), LoraConfig(target_modules=r".*language_model.*q_proj"))
    found = parts(estimate_memory(adapted, batch, arguments(), gpu=True, with_adapters=True))
    assert found["reference model"] == 0
    assert found["gradients"] == trained_bytes(adapted) < 2**24


def test_gradients_are_always_there_when_they_are_accumulated(one_billion, batch):
    once = estimate_memory(one_billion, batch, arguments(), gpu=True)
    over = estimate_memory(one_billion, batch, arguments(gradient_accumulation_steps=4), gpu=True)
    assert "gradients" in {component.name for component in over.fixed} - {component.name for component in once.fixed}
    assert over.total > once.total


def test_checkpointing_and_eight_bits_save(one_billion, batch):
    plain = estimate_memory(one_billion, batch, arguments(), gpu=True)
    checkpointed = estimate_memory(one_billion, batch, arguments(gradient_checkpointing=True), gpu=True)
    kept = [sum(size for name, size in parts(one).items() if "activations" in name) for one in (checkpointed, plain)]
    assert kept[0] < kept[1] / 6
    small = estimate_memory(one_billion, batch, arguments(optim="paged_adamw_8bit"), gpu=True)
    assert parts(small)["optimiser state"] == 0
    assert "CPU memory" in next(c.why for c in small.fixed if c.name == "optimiser state")


def test_sharding_is_read_from_the_configuration(tmp_path):
    assert str(Sharding.of({})) == "one process"
    assert str(Sharding.of({}, 4)) == "DDP, 4 ranks"
    stage = tmp_path / "zero2.json"
    stage.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    assert Sharding.of({"deepspeed": str(stage)}, 8) == Sharding("zero2", 8)
    assert Sharding.of({"fsdp": True, "deepspeed": None}, 8) == Sharding("fsdp2", 8)

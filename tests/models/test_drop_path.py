"""Stochastic depth of the vision tower: its effect on a layer, and where it is off."""

import pytest
import torch
from small_runs import difference, small_run
from support import TEXTS

from mpo.models.small import small_internvl, small_processor
from mpo.models.tower import DropPath


@pytest.fixture
def model():
    processor = small_processor(TEXTS, image_size=32, patch_size=8)
    return small_internvl(processor, hidden_size=32, layers=1, vision_hidden_size=32, vision_layers=3)


def test_branches_are_dropped_tile_by_tile(model):
    """The last of three layers at rate 0.5: a tile's branch is dropped or doubled; the first layer's rate is 0."""
    DropPath(model, 0.5)
    first, _, last = model.train().model.vision_tower.encoder.layer
    tiles = torch.randn(64, 17, 32)
    for branch in (lambda layer: layer.attention(tiles)[0], lambda layer: layer.mlp(tiles)):
        model.eval()
        whole = branch(last)
        assert torch.equal(branch(last), whole)
        model.train()
        dropped = branch(last)
        zero = [not tile.any() for tile in dropped]
        assert 10 < sum(zero) < 54
        assert all(g or torch.allclose(d, 2 * w, atol=1e-6) for g, d, w in zip(zero, dropped, whole, strict=True))
        assert torch.equal(branch(first), branch(first))


def test_rates_grow_with_depth(model):
    """0, 0.2 and 0.4 for three layers; over many tiles the dropped fraction is close."""
    DropPath(model.train(), 0.4)
    tiles = torch.randn(4000, 1, 32)
    shares = [(layer.mlp(tiles).flatten(1) == 0).all(1).float().mean().item() for layer in model.model.vision_tower.encoder.layer]
    assert shares == pytest.approx([0, 0.2, 0.4], abs=0.03)


def test_it_can_be_switched_off_and_removed(model):
    drop = DropPath(model.train(), 0.9)
    tower, tiles = model.model.vision_tower, torch.randn(8, 3, 32, 32)
    with drop.off():
        whole = tower(tiles).last_hidden_state
        assert torch.equal(tower(tiles).last_hidden_state, whole)
    assert not torch.equal(tower(tiles).last_hidden_state, whole)
    drop.remove_from(model)
    assert torch.equal(tower(tiles).last_hidden_state, whole)


@pytest.mark.parametrize("rows", ["packed", "padded"])
def test_a_run(tmp_path, rows):
    """Policy and reference differ in training but not in evaluation, and the run is reproducible."""
    settings = {"rows": rows, "eval_pairs": 2, "vision_drop_path": 0.5, "max_steps": 2, "learning_rate": 0.0}
    ends = []
    for _ in range(2):
        ends.append(small_run(tmp_path, **settings))
        ends[-1].train()
    logs = [[log["loss"] for log in end.state.log_history if "loss" in log] for end in ends]
    assert logs[0] == logs[1]
    assert ends[0].evaluate()["eval_rewards/margins"] == 0
    assert any(abs(log["rewards/margins"]) > 1e-6 for log in ends[0].state.log_history if "rewards/margins" in log)


def test_checkpointing_drops_the_same(tmp_path):
    ends = []
    for checkpointing in (False, True):
        trainer = small_run(tmp_path, vision_drop_path=0.5, max_steps=2, gradient_checkpointing=checkpointing)
        trainer.train()
        ends.append(trainer.model.state_dict())
    assert difference(*ends) < 1e-6


def test_the_reference_of_adapters_is_whole(tmp_path):
    """With adapters in the tower, the reference is the same model, and drops nothing."""
    trainer = small_run(tmp_path, kind="lora", vision_drop_path=0.9, lora_targets=r".*\.(q_proj|v_proj)")
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    sums = [trainer.compute_ref_log_probs(trainer.model, batch)[0] for _ in range(2)]
    assert torch.equal(*sums)

"""delta: the running mean of rewards."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mpo.losses import BCO, Mixture, PairLogps, RewardShift


def pairs_with_rewards(*rewards: float) -> PairLogps:
    """One pair per number, both of its rewards that number (beta 1)."""
    values, zeros = torch.tensor(rewards), torch.zeros(len(rewards))
    return PairLogps(values, values, zeros, zeros, zeros + 1, zeros + 1)


def test_cumulative_mean():
    """Mean rewards 1, 3, 5 give delta 1, (1+3)/2 = 2, (1+3+5)/3 = 3, each micro-batch included before use."""
    loss = BCO(beta=1.0)
    deltas = []
    for reward in (1.0, 3.0, 5.0):
        loss(pairs_with_rewards(reward))
        deltas.append(loss.shift.value.item())
    assert deltas == [1.0, 2.0, 3.0]


def test_weighted_by_pairs():
    """One pair of reward 4, then three of reward 0: delta 4, then 4 / 4 = 1 (not 2, the mean of the two batches)."""
    loss = BCO(beta=1.0)
    loss(pairs_with_rewards(4.0))
    loss(pairs_with_rewards(0.0, 0.0, 0.0))
    assert loss.shift.value.item() == 1.0


def test_delta_includes_the_micro_batch_in_hand():
    """All rewards are 2: delta is 2 when used, so both terms are ln 2."""
    assert BCO(beta=1.0)(pairs_with_rewards(2.0)).item() == pytest.approx(2 * 0.693147, abs=1e-6)


def test_evaluation_uses_delta_and_leaves_it():
    loss = BCO(beta=1.0)
    loss(pairs_with_rewards(2.0))
    loss.eval()
    first, second = (loss(pairs_with_rewards(5.0)).item() for _ in range(2))
    assert first == second
    assert loss.shift.value.item() == 2.0


def test_state_dict_round_trip_is_exact():
    torch.manual_seed(0)
    mixture = Mixture.from_trl(["sigmoid", "bco_pair"])
    for _ in range(7):
        mixture(pairs_with_rewards(*torch.randn(3).tolist()))
    other = Mixture.from_trl(["sigmoid", "bco_pair"])
    other.load_state_dict(mixture.state_dict())
    assert torch.equal(other.reward_shift.value, mixture.reward_shift.value)
    assert other.reward_shift.value != 0


def test_casting_the_mixture_keeps_float64():
    shift = RewardShift()
    shift(torch.full((3,), 1 / 3))
    before = shift.value.item()
    assert shift.to(torch.bfloat16).value.item() == before
    assert shift.half().value.dtype == torch.float64


def _rank(rank: int, address: str, deltas: list[float]) -> None:
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    loss = BCO(beta=1.0)
    # Rank 0 has one pair of reward 6, rank 1 two of reward 0; then 1 and 3.
    loss(pairs_with_rewards(6.0) if rank == 0 else pairs_with_rewards(0.0, 0.0))
    first = loss.shift.value.item()
    loss(pairs_with_rewards(1.0 if rank == 0 else 3.0))
    deltas[rank] = (first, loss.shift.value.item())
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_share_one_delta(tmp_path):
    """Over both ranks: 6 / 3 pairs = 2, then (6 + 1 + 3) / 5 pairs = 2."""
    with mp.Manager() as manager:
        deltas = manager.list([None, None])
        mp.spawn(_rank, args=(f"file://{tmp_path}/rendezvous", deltas), nprocs=2)
        assert list(deltas) == [(2.0, 2.0), (2.0, 2.0)]

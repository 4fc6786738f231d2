"""Preference losses as pure functions of log-probabilities. Depends on torch only, not on a model, batch or configuration.

>>> import torch
>>> from mpo.losses import Mixture, PairLogps
>>> sums, tokens = torch.tensor([-8.0]), torch.tensor([4.0])
>>> pairs = PairLogps(sums, sums, sums, sums, tokens, tokens)  # a policy that equals its reference
>>> output = Mixture.from_trl(["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0])(pairs)
>>> {name: round(term.item(), 4) for name, term in output.terms.items()}
{'sigmoid': 0.6931, 'bco_pair': 1.3863, 'sft': 2.0}
>>> round(output.loss.item() - output.terms["sft"].item(), 4)
0.8318
"""

if __name__ != "mpo.losses":
    raise ImportError("the losses folder installs as mpo.losses; import it under that name")

from mpo.losses.divergence import Divergence
from mpo.losses.generation import SFT
from mpo.losses.mixture import Mixture, MixtureOutput
from mpo.losses.pairs import PairLogps, PairLoss
from mpo.losses.preference import (
    AOT,
    CDPO,
    DPO,
    EXO,
    IPO,
    NCA,
    ORPO,
    SPPO,
    AOTUnpaired,
    APODown,
    APOZero,
    DiscoPOP,
    Hinge,
    RobustDPO,
    SigmoidNorm,
)
from mpo.losses.quality import BCO, RewardShift

__all__ = [
    "AOT",
    "AOTUnpaired",
    "APODown",
    "APOZero",
    "BCO",
    "CDPO",
    "DPO",
    "DiscoPOP",
    "Divergence",
    "EXO",
    "Hinge",
    "IPO",
    "Mixture",
    "MixtureOutput",
    "NCA",
    "ORPO",
    "PairLogps",
    "PairLoss",
    "RewardShift",
    "RobustDPO",
    "SFT",
    "SPPO",
    "SigmoidNorm",
]

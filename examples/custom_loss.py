"""Train with a loss of your own, here SimPO (arXiv 2405.14734, equation 6), beside SFT.

    python examples/custom_loss.py MODEL PAIRS.jsonl RUN_DIR

A loss gets the log-probs of pairs and returns a value for each pair; under its name it can be mixed with all others.
"""

import sys

from torch.nn.functional import logsigmoid

from mpo import MPOConfig, MPOTrainer
from mpo.data import load_preferences
from mpo.losses import PairLoss


class SimPO(PairLoss):
    """-log sigmoid(beta (log pi(y_c|x) / |y_c| - log pi(y_r|x) / |y_r|) - gamma)."""

    name = "simpo"
    takes = ("beta",)  # of the configuration
    needs_reference = False  # so none is loaded

    def __init__(self, beta, gamma=1.0):
        super().__init__()
        self.beta, self.gamma = beta, gamma

    def forward(self, pairs):
        """Shape (pairs,)."""
        margin = pairs.chosen / pairs.chosen_length - pairs.rejected / pairs.rejected_length
        return -logsigmoid(self.beta * margin - self.gamma)


model, pairs, run_dir = sys.argv[1:] if len(sys.argv) == 4 else sys.exit(__doc__)
args = MPOConfig(run_dir, loss_type=["simpo", "sft"], loss_weights=[1.0, 0.1], beta=2.0, report_to="none")
trainer = MPOTrainer(model=model, args=args, train_dataset=load_preferences(pairs))
trainer.train()
trainer.save_model()

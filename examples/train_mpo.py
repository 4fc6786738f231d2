"""Train with MPO in ten lines, as with TRL's DPOTrainer.

    python examples/train_mpo.py MODEL PAIRS.jsonl RUN_DIR

MODEL is a folder or a name on the Hub (OpenGVLab/InternVL3-1B-Instruct). A line of PAIRS.jsonl:
{"image": "a.png", "question": "...", "chosen": "...", "rejected": "..."}
"""

import sys

from mpo import MPOConfig, MPOTrainer
from mpo.data import load_preferences

model, pairs, run_dir = sys.argv[1:] if len(sys.argv) == 4 else sys.exit(__doc__)
trainer = MPOTrainer(
    model=model,
    args=MPOConfig(run_dir, per_device_train_batch_size=2, report_to="none"),
    train_dataset=load_preferences(pairs),
)
trainer.train()
trainer.save_model()

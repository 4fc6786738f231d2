"""Sample responses to a few fixed prompts during training, so that a degenerating model is noticed early."""

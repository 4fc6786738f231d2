"""How pairs become batches of tokens. Knows tensors and records, not trainers."""

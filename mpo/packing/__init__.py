"""Turn preference pairs into batches of tokens. Works on tensors and records, independent of the trainer."""

"""Batches -> log-probs -> loss -> a trained model: the trainer, its loop, its reference, checkpoints and jobs."""

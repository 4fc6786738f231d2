"""Preference data: judge sampled responses and pair correct with incorrect ones, as for MMPR (arXiv 2411.10442)."""

"""Preference data: sample responses, judge them, pair correct with incorrect ones, as for MMPR (arXiv 2411.10442)."""

"""Preference data as in MMPR (arXiv 2411.10442, section 3): sample responses, judge them, pair correct with incorrect ones."""

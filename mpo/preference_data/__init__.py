"""Preference data: sampled answers -> right and wrong -> pairs, as MMPR was made (arXiv 2411.10442)."""

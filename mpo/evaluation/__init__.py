"""Evaluation: accuracy and its confidence intervals."""

"""Evaluation: how often answers are right, and how sure that is."""

"""Encoded records -> batches: which records share one, rows of a prompt and its completions, attention over them."""

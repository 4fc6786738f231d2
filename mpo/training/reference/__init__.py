"""Reference log-probs of a run: start values of adapters, and a cache on disk."""

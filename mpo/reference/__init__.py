"""Where reference log-probs come from when they are not computed anew: a cache on disk."""

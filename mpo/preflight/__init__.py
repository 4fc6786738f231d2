"""Checks before training: of the environment (mpo doctor) and of a run (dry_run=true)."""

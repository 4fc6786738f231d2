"""The report of `mpo train ... dry_run=true`: parameters, memory, steps, lengths, one record as the model sees it."""

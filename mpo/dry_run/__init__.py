"""What `mpo train ... dry_run=true` shows: parameters, memory, steps, lengths, and one record as the model sees it."""

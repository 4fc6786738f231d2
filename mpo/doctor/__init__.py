"""What `mpo doctor` looks at: packages, machine, GPUs, disk, hub, and one real training step.

A check yields findings (`finding.py`) and knows nothing of pages; `checks.py` lists them; `examine.py` runs them in a Python of
their own, which may crash; `page.py` writes what was found.
"""

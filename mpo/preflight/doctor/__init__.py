"""The checks of `mpo doctor`: packages, system, GPUs, disks, the Hub, and one training step.

A check yields findings (`finding.py`). `checks.py` lists the checks, `examine.py` runs them in a separate process, which may crash,
and `page.py` formats the report.
"""

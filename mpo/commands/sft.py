"""Train a model on conversations with a recipe.

Many conversations share a row, each isolated exactly (InternVL 2.5, arXiv 2412.05271); `mpo sft --help` is Hydra's.
"""

from collections.abc import Sequence


def run(arguments: Sequence[str]) -> int:
    """Run `mpo sft`; see `mpo.commands.train.run`."""
    from mpo.commands import train

    return train.run(arguments, "sft")

"""Look at records in a browser and correct them, without losing a correction."""

from mpo.review.corrections import Corrected, apply

__all__ = ["Corrected", "apply"]

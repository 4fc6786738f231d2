"""Inspect parts of a model."""

EXAMPLES = """\
mpo inspect fuser runs/first photo.jpg --output looks
"""

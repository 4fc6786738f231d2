"""Inference: where generated text comes from. Import from the files below; this package loads nothing by itself."""

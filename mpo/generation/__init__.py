"""Inference: text generation. Import from the files below; this package loads nothing by itself."""

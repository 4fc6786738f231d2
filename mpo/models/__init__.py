"""Models: InternVL of any size. Import from the files below; this package loads nothing by itself."""

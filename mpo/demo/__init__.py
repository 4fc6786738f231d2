"""The demo: a small InternVL learns to read handwriting from a few worked examples and many checked responses."""

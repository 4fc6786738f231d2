"""The demo: a small InternVL learns to read handwriting from few worked examples and many checked responses."""

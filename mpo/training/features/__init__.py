"""Features of a frozen vision tower, kept on disk: every image is encoded once."""

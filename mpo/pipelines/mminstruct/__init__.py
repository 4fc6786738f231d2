"""MMInstruct (arXiv 2407.15838): visual instructions from images. Collect, caption, seed, generate, expand."""

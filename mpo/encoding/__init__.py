"""One record -> token ids, loss masks and tiles; what it costs comes from the same code. Knows no batches and no trainers."""

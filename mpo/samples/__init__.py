"""What a model in training answers to the same few prompts, again and again: one that degenerates is seen at once."""

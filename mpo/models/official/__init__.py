"""The official format of InternVL checkpoints (`InternVLChatModel`): names, configs, tokenizers, conversion in both directions."""

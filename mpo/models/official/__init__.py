"""The official form of InternVL checkpoints (`InternVLChatModel`): names, configs, tokenizers, conversion both ways."""

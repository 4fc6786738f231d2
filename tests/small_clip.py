"""A CLIP of some thousand parameters, trained until it tells four colours apart."""

from pathlib import Path

import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

COLOURS = ("red", "green", "blue", "white")


def write_clip(folder: Path) -> str:
    """Write the CLIP into a folder, which is returned."""
    words = ["<|startoftext|>", "<|endoftext|>", *(f"{word}</w>" for word in (*COLOURS, "a", "image", "square"))]
    letters = sorted({letter for word in (*COLOURS, "a", "image", "square") for letter in word})
    merges = []
    for word in (*COLOURS, "image", "square"):
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts = ["".join(parts[:2]), *parts[2:]]
            words.append(parts[0])
    names = dict.fromkeys([*words, *letters, *(f"{letter}</w>" for letter in letters)])
    tokenizer = CLIPTokenizer({name: number for number, name in enumerate(names)}, list(dict.fromkeys(merges)), model_max_length=8)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text = CLIPTextConfig(vocab_size=len(names), max_position_embeddings=8, **size, **ends)
    vision = CLIPVisionConfig(image_size=16, patch_size=8, **size)
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8))
    processor = CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}), tokenizer)
    images = [Image.new("RGB", (32, 32), colour) for colour in COLOURS]
    inputs = processor(text=list(COLOURS), images=images, padding="max_length", return_tensors="pt")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(**inputs, return_loss=True).loss
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)

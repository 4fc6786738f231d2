"""An official LLaVA-1.5 of a few thousand parameters, with an MMFuser or without."""

import json

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mpo.models.llava import SYSTEM
from mpo.models.mmfuser import MMFuser

WIDTH = 32


class Parts:
    """An official LLaVA: its parts as transformers' own models, and its state dict with the official names.

    Written to `folder`: with/, the checkpoint, and clip/, its vision tower alone.
    """

    def __init__(self, folder, layers=5, fused=True):
        torch.manual_seed(0)
        sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "num_attention_heads": 2}
        clip = CLIPVisionConfig(**sizes, num_hidden_layers=layers, image_size=28, patch_size=7)
        text = "a cat and a dog . ? USER: ASSISTANT: " + SYSTEM
        bpe = Tokenizer(models.BPE(unk_token="<unk>"))
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.train_from_iterator([text] * 3, trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"]))
        bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        self.words = bpe.get_vocab_size()
        self.text = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=self.words, num_key_value_heads=2)).eval()
        self.tower, self.fuser = CLIPVisionModel(clip).eval(), MMFuser(WIDTH, num_levels=2)
        self.linear = [torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, WIDTH)]
        for parameter in self.fuser.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
        # Buffers that older versions of transformers saved are in it too.
        tower = {f"vision_model.{name.removeprefix('vision_model.')}": value for name, value in self.tower.state_dict().items()}
        tower["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
        self.tensors = {
            **self.text.state_dict(),
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
            **{f"model.mm_projector.0.{name}": value for name, value in self.fuser.state_dict().items() if fused},
            **{
                f"model.mm_projector.{fused + 2 * i}.{n}": v
                for i, layer in enumerate(self.linear)
                for n, v in layer.state_dict().items()
            },
        }
        self.config = {
            **{name: value for name, value in self.text.config.to_dict().items() if name != "transformers_version"},
            **{"model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"], "mm_vision_tower": "clip"},
            **{"mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": [-5, -3, -2] if fused else -2},
            **{"mm_vision_select_feature": "patch"},
            **{"mm_hidden_size": WIDTH, "mm_use_im_start_end": False, "image_aspect_ratio": "pad", "use_mm_proj": True},
        }
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
        for name, tensors, config in (("with", self.tensors, self.config), ("clip", tower, clip.to_dict())):
            (folder / name).mkdir()
            if name == "with":
                tensors = tensors | {f"model.vision_tower.vision_tower.{key}": value for key, value in tower.items()}
            save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name / "model.safetensors")
            (folder / name / "config.json").write_text(json.dumps(config))
        PreTrainedTokenizerFast(tokenizer_object=bpe, **names).save_pretrained(folder / "with")

    @torch.no_grad()
    def logits(self, before, pixels, after):
        """As the official code: hidden states 1, 3 and 4 of 5 layers without class token, the block, two linear layers."""
        states = self.tower(pixels, output_hidden_states=True).hidden_states
        fused = self.fuser([states[index][:, 1:] for index in (1, 3, 4)], (4, 4))
        image = self.linear[1](torch.nn.functional.gelu(self.linear[0](fused)))
        embed = self.text.get_input_embeddings()
        return self.text(inputs_embeds=torch.cat([embed(before), image, embed(after)], dim=1)).logits

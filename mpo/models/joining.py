"""Join a vision tower and a language model into an InternVL, as InternVL 2.5's training begins (arXiv 2412.05271, section 3.3)."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionModel,
    LlamaForCausalLM,
)
from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector

from mpo.io import atomic_folder
from mpo.models.family import INTERNVL
from mpo.models.loading import LoadedModel, as_dtype, load_internvl, opening
from mpo.models.official.config import tensor_names, transformers_config
from mpo.models.official.processor import TURN, read_tokenizer, templated_processor
from mpo.models.official.schema import TEXT_MODELS, Chat, parse
from mpo.models.official.tensors import TensorFiles
from mpo.models.small import DOWNSAMPLE_RATIO, IMAGE_TOKENS, INTERNVL_TOKENS, token_names
from mpo.models.strict import check_shapes, load_strictly, read_config_json, read_hf_config, refuse_adapter

INTERNLM = ("internlm2", "internlm3")
LANGUAGE_MODELS = tuple(sorted({*INTERNLM, *(ours for _, ours, _ in TEXT_MODELS.values())}))
"""Language models that InternVL has in both formats, by ``model_type``. Qwen2.5 is a qwen2."""


def join(
    vision: str | Path, language: str | Path, *, dtype: str | torch.dtype = "auto", max_tiles: int = 12, seed: int = 0
) -> LoadedModel:
    """Join a vision tower and a language model with a new projector.

    As in the official code, the projector has PyTorch's initial values, the tokenizer gets InternVL's nine tokens, whose rows in
    the output head are the mean of the others, and the head is not tied to the embeddings (except in Qwen3).

    Args:
        vision: name or folder of an InternViT (official, or transformers' `InternVLVisionModel`), or of an InternVL in either
            format, whose tower is taken: a tower trained beside a small language model serves a large one.
        language: name or folder of a chat model with ChatML turns: Qwen2, Qwen2.5, Qwen3, InternLM2, InternLM3 or Llama.
        dtype: dtype of all weights; ``"auto"``: the language model's.
        max_tiles: the largest number of tiles per image.
        seed: random seed of the projector and of new rows of the embeddings. The caller's random state is restored.

    Returns:
        the model and its processor. `save_pretrained` of both gives a checkpoint that transformers loads.

    Raises:
        ValueError: for another kind of model, a tokenizer without ChatML's tokens, a tile that pixel shuffle cannot halve, and
            files that are missing or contradict each other.
    """
    if max_tiles < 1:
        raise ValueError(f"max_tiles must be 1 or more; got {max_tiles}.")
    asked = as_dtype(dtype)
    folder, kind = _found(language, LANGUAGE_MODELS, "language model")
    tower, layer = _tower(vision)
    tokens = _tokens_per_tile(tower.config, str(vision))
    text, tokenizer = _language(folder, kind, asked)
    lacking = [token for token in TURN if token not in tokenizer.get_vocab()]
    if lacking:
        raise ValueError(
            f"The tokenizer of {language} has no {' and no '.join(lacking)}, with which InternVL's turns begin and end. Give a "
            "chat model with ChatML, such as Qwen2.5-7B-Instruct or internlm2_5-7b-chat."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer, words, added = _with_tokens(tokenizer)
        _resize(text, words, added, keep=kind.startswith("qwen3"))
        end = tokenizer.convert_tokens_to_ids(TURN[1])
        text.config.eos_token_id = end
        config = InternVLConfig(
            vision_config=tower.config,
            text_config=text.config,
            image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKENS["context_image_token"]),
            image_seq_length=tokens,
            downsample_ratio=DOWNSAMPLE_RATIO,
            vision_feature_layer=layer,
            tie_word_embeddings=text.config.tie_word_embeddings,
        )
        projector = InternVLMultiModalProjector(config)
    model = _put_together(config, tower, projector, text)
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=tokenizer.pad_token_id)
    sizes = {"image_size": tower.config.image_size[0], "image_seq_length": tokens}
    return LoadedModel(model.eval(), templated_processor(tokenizer, "internvl2_5", (1, max_tiles), True, **sizes))


def _put_together(config: InternVLConfig, tower: Any, projector: Any, text: Any) -> InternVLForConditionalGeneration:
    with torch.device("meta"):
        model = InternVLForConditionalGeneration(config)
    for name, part in ((INTERNVL.vision, tower), (INTERNVL.projector[0], projector), (INTERNVL.language, text.model)):
        setattr(model.model, name, part)
    model.lm_head = text.lm_head
    model.to(text.dtype)
    model.config.dtype = text.dtype
    model.tie_weights()
    return model


def save_joined(vision: str | Path, language: str | Path, folder: Path, **settings: Any) -> LoadedModel:
    """Join, and write a folder that appears only when it is complete; arguments and errors as of `join`."""
    joined = join(vision, language, **settings)
    with atomic_folder(folder) as partial:
        joined.model.save_pretrained(partial)
        joined.processor.save_pretrained(partial)
    return joined


def _found(name: str | Path, kinds: tuple[str, ...], what: str) -> tuple[Path, str]:
    """The folder of a checkpoint, downloaded if it is a name on the Hub, and the kind of its model, one of `kinds`."""
    refuse_adapter(name)
    with opening(str(name)):
        folder = Path(name).expanduser()
        if not folder.is_dir():
            folder = Path(snapshot_download(str(name), allow_patterns=["*.json", "*.model", "*.txt", "*.safetensors"]))
        if not (folder / "config.json").is_file():
            raise OSError(f"{folder} has no config.json")
    kind = read_config_json(folder / "config.json").get("model_type")
    if kind not in kinds:
        raise ValueError(f"Expected {name} to be a {what} of the type {', '.join(kinds)}; its model_type is {kind!r}.")
    return folder, str(kind)


def _tower(name: str | Path) -> tuple[Any, int]:
    folder, kind = _found(name, ("intern_vit_6b", "internvl_vision", "internvl_chat", "internvl"), "vision tower or InternVL")
    if kind == "internvl_vision":
        return load_strictly(InternVLVisionModel.from_pretrained, str(folder)), -1
    if kind != "intern_vit_6b":
        whole = load_internvl(str(folder))
        return getattr(whole.model, INTERNVL.vision), whole.config.vision_feature_layer
    given = read_config_json(folder / "config.json")
    # In a whole checkpoint the rest would be there; here any language model completes the config that is parsed.
    size = {"vocab_size": 1, "hidden_size": 1, "intermediate_size": 1, "num_hidden_layers": 1, "num_attention_heads": 1}
    language = {"architectures": ["LlamaForCausalLM"], **size, "num_key_value_heads": 1}
    official = _parsed(folder, vision_config=given, llm_config=language)
    config = transformers_config(official, image_token_id=0).vision_config
    state = _renamed(TensorFiles(folder), official, "vision_model.", f"{INTERNVL.vision}.")
    return _filled(InternVLVisionModel, config, state, folder), -1


def _language(folder: Path, kind: str, dtype: Any) -> tuple[Any, Any]:
    if kind not in INTERNLM:
        read_hf_config(folder)  # an error names the file
        text = load_strictly(AutoModelForCausalLM.from_pretrained, str(folder), dtype=dtype)
        with opening(str(folder)):
            return text, AutoTokenizer.from_pretrained(folder)
    official = _parsed(folder, vision_config={}, llm_config=read_config_json(folder / "config.json"))
    config = transformers_config(official, image_token_id=0).text_config
    state = _renamed(TensorFiles(folder), official, f"{INTERNVL.language}.", f"{INTERNVL.language}.")
    text = _filled(LlamaForCausalLM, config, state, folder)
    return text if dtype == "auto" else text.to(dtype), read_tokenizer(folder)


def _parsed(folder: Path, **parts: Any) -> "Chat[Any]":
    return parse({**parts, "ps_version": "v2", "template": "internvl2_5"}, str(folder / "config.json"))


def _renamed(files: TensorFiles, official: "Chat[Any]", theirs: str, ours: str) -> dict[str, Tensor]:
    names = tensor_names(official)
    state: dict[str, Tensor] = {}
    for name in files.names():
        whole = theirs + name
        found = (new.removeprefix(ours) for new in names.ours(whole))
        state |= dict(zip(found, names.split(whole, files[name]), strict=True))
    return state


def _filled(cls: Any, config: Any, state: dict[str, Tensor], folder: Path) -> Any:
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in cls(config).state_dict().items()}
    check_shapes({name: tuple(tensor.shape) for name, tensor in state.items()}, expected, str(folder))
    return cls.from_pretrained(None, config=config, state_dict=state, dtype=next(iter(state.values())).dtype)


def _tokens_per_tile(config: Any, name: str) -> int:
    (size, *_), (patch, *_) = config.image_size, config.patch_size
    if len({*config.image_size}) > 1 or size % patch or size // patch % 2:
        raise ValueError(
            f"The tiles of {name} have {config.image_size} pixels in patches of {config.patch_size}: pixel shuffle joins 2 x 2 "
            "patches and needs an even number of them in each row of a square."
        )
    return int((size // patch * DOWNSAMPLE_RATIO) ** 2)


def _with_tokens(tokenizer: Any) -> tuple[Any, int, list[int]]:
    """The tokenizer with InternVL's tokens and their names, its number of tokens without that of videos, and the ids of new ones.

    The processor replaces the video token by frames, so it needs no row in the embeddings.
    """
    new = [token for token in INTERNVL_TOKENS if token not in tokenizer.get_vocab()]
    tokenizer.add_tokens(INTERNVL_TOKENS, special_tokens=True)
    words = len(tokenizer)
    named = token_names(tokenizer.get_vocab())
    with tempfile.TemporaryDirectory() as folder:  # names are given when a tokenizer is loaded
        tokenizer.save_pretrained(folder)
        found = AutoTokenizer.from_pretrained(folder, padding_side="left", extra_special_tokens=named)
    return found, words, found.convert_tokens_to_ids(new)


def _resize(text: Any, words: int, added: list[int], *, keep: bool) -> None:
    """Give the model a row for each of `words` tokens; as in the official code, `added` rows of the head are the others' mean.

    With `keep`, as InternVL3.5 does, spare rows stay, and a head that is tied to the embeddings; otherwise neither.
    """
    rows = text.get_input_embeddings().num_embeddings
    text.resize_token_embeddings(max(rows, words) if keep else words, mean_resizing=False)
    others = torch.ones(words, dtype=torch.bool)
    others[added] = False
    head = text.lm_head.weight.data
    head[added] = head[:words][others].float().mean(0).to(head.dtype)
    if text.config.tie_word_embeddings and not keep:
        text.lm_head.weight = torch.nn.Parameter(head.clone())
        text.config.tie_word_embeddings = False

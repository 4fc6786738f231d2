"""The official format of checkpoints: loaded in memory, converted in both directions, refused where it does not fit."""

import json
import random
import re
from pathlib import Path

import pytest
import torch
from official_checkpoints import write_official
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from mpo.commands import main
from mpo.encoding.encoder import Encoder
from mpo.models.fit import check_fit
from mpo.models.loading import load_internvl, load_model, load_processor
from mpo.models.official.checkpoint import IMAGE_TOKEN_IDS, open_official
from mpo.models.official.convert import convert, largest_difference
from mpo.models.official.forward import official_logits
from mpo.models.official.processor import OLD_SYSTEM
from mpo.models.official.spm import read_sentencepiece
from mpo.models.official.tensors import TensorFiles

FAMILIES = ["qwen2", "internlm2", "internlm3", "llama", "qwen3", "qwen3_moe"]


@pytest.mark.parametrize("large", [False, True], ids=["300M", "6B"])
@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back(tmp_path, family, large, record_property):
    """Loaded by transformers it computes what the official definition does; back in the official form every bit is the same."""
    official = write_official(tmp_path / "official", family, large=large)
    there = convert(official, tmp_path / "ours", compare=True, progress=False)
    assert there.difference < 1e-5
    record_property("largest difference", f"logits of the official form and transformers', {family}: {there.difference:.1e}")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "ours")
    check_fit(model, AutoProcessor.from_pretrained(tmp_path / "ours"))
    back = convert(tmp_path / "ours", tmp_path / "back", compare=True, progress=False)
    assert back.difference < 1e-5
    before, after = (load_file(folder / "model.safetensors") for folder in (official, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((official / "config.json").read_text()) == json.loads((tmp_path / "back" / "config.json").read_text())


@pytest.mark.parametrize("family", FAMILIES)
def test_loaded_in_memory(tmp_path, family):
    official = write_official(tmp_path / "official", family, dtype=torch.bfloat16)
    convert(official, tmp_path / "ours", compare=False, progress=False)
    loaded = load_model(str(official))
    saved = AutoModelForImageTextToText.from_pretrained(tmp_path / "ours")
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
    states = loaded.model.state_dict(), saved.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert loaded.model.generation_config.eos_token_id == loaded.processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    check_fit(loaded.model, loaded.processor)


def test_another_place_of_the_queries_is_seen(tmp_path):
    """The check uses the official tensors only: a wrongly split one is detected."""
    official = write_official(tmp_path / "official", "internlm2")
    convert(official, tmp_path / "ours", compare=False, progress=False)
    tensors = load_file(tmp_path / "ours" / "model.safetensors")
    name = "language_model.model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].flip(0)
    save_file(tensors, tmp_path / "ours" / "model.safetensors", metadata={"format": "pt"})
    assert largest_difference(official, tmp_path / "ours") > 1e-3
    checkpoint = open_official(official)
    ids = torch.tensor([[1, 2, *[checkpoint.config.image_token_id] * 4, 3]])
    pixels = torch.randn(1, 3, 32, 32)
    logits = official_logits(TensorFiles(official), checkpoint.official, checkpoint.config, ids, pixels)
    assert logits.shape == (1, 7, checkpoint.config.text_config.vocab_size)


def test_many_shards(tmp_path):
    official = write_official(tmp_path / "official", "qwen3")
    convert(official, tmp_path / "ours", shard_gb=1e-5, compare=False, progress=False)
    files = sorted(path.name for path in (tmp_path / "ours").glob("*.safetensors"))
    assert len(files) > 3 and files[0].startswith("model-00001-of-")
    convert(tmp_path / "ours", tmp_path / "back", shard_gb=1e-5, compare=True, progress=False)
    before, after = TensorFiles(official), TensorFiles(tmp_path / "back")
    assert sorted(before.names()) == sorted(after.names())
    assert all(torch.equal(before[name], after[name]) for name in before.names())


def test_without_a_tokenizer_it_loads_as_a_model(tmp_path, monkeypatch):
    official = write_official(tmp_path / "official", "qwen2", tokenizer=False)
    with pytest.raises(ValueError, match=f"{official} has no tokenizer"):
        load_internvl(str(official))
    words = json.loads((official / "config.json").read_text())["llm_config"]["vocab_size"]
    monkeypatch.setitem(IMAGE_TOKEN_IDS, ("qwen2", words), 5)
    assert load_internvl(str(official)).config.image_token_id == 5
    with pytest.raises(ValueError, match=f"{official} has no tokenizer"):
        load_processor(str(official))


@pytest.mark.parametrize(
    "template, expected",
    [
        ("internvl2_5", "<|im_start|>system\n你是书生·万象，"),
        ("Hermes-2", "<|im_start|>system\n你是由上海人工智能实验室联合商汤科技"),
    ],
)
def test_chat_template(tmp_path, template, expected):
    official = write_official(tmp_path / "official", "qwen2", template=template)
    processor = load_processor(str(official), max_tiles=3)
    assert processor.image_processor.max_patches == 3
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]}
    text = processor.apply_chat_template([question], add_generation_prompt=True, tokenize=False)
    end = "<|im_end|>\n" if template == "internvl2_5" else "<|im_end|>"
    assert text.startswith(expected)
    assert text.endswith(f"{end}<|im_start|>user\n<IMG_CONTEXT>\nHow many?{end}<|im_start|>assistant\n")
    own = processor.apply_chat_template([{"role": "system", "content": "Be brief."}, question], tokenize=False)
    assert own.startswith("<|im_start|>system\nBe brief.")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.update(ps_version="v1"), "ps_version='v1'"),
        (lambda c: c["llm_config"].update(architectures=["Phi3ForCausalLM"], model_type="phi3"), "Phi3ForCausalLM.*InternLM2"),
        (lambda c: c["llm_config"].update(num_hidden_layers=1), r"\(language_model.model.layers.1"),
        (lambda c: c["llm_config"].update(num_hidden_layers=3), r"missing \(language_model.model.layers.2"),
        (
            lambda c: c["llm_config"].update(intermediate_size=40),
            r": \(32, 48\), expected \(32, 40\)",
        ),
        (lambda c: c.update(template="vicuna_v1.1"), "template='vicuna_v1.1'"),
    ],
)
def test_refusals(tmp_path, change, message):
    official = write_official(tmp_path / "official", "qwen2")
    config = json.loads((official / "config.json").read_text())
    change(config)
    (official / "config.json").write_text(json.dumps(config))
    for refused in (
        lambda: load_model(str(official)),
        lambda: convert(official, tmp_path / "ours", compare=False, progress=False),
    ):
        with pytest.raises(ValueError, match=message):
            refused()
    assert not (tmp_path / "ours").exists()


def test_a_pickle_is_not_read(tmp_path):
    official = write_official(tmp_path / "official", "qwen2")
    (official / "model.safetensors").rename(official / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin"):
        load_model(str(official))


def test_a_truncated_file(tmp_path):
    official = write_official(tmp_path / "official", "qwen2")
    whole = (official / "model.safetensors").read_bytes()
    (official / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=str(official / "model.safetensors")):
        load_model(str(official))


def test_a_model_made_here_gets_an_official_config(tmp_path, capsys):
    """Without the original config one is created, and the converted checkpoint loads."""
    official = write_official(tmp_path / "official", "qwen3", large=True)
    convert(official, tmp_path / "ours", compare=False, progress=False)
    (tmp_path / "ours" / "official_config.json").unlink()
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "back")]) == 0
    said = capsys.readouterr().out
    assert "61 tensors" in said and "Logits of both" in said and "--like" in said
    before, after = load_internvl(str(official)), load_internvl(str(tmp_path / "back"))
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


def test_like(tmp_path):
    official = write_official(tmp_path / "official", "qwen2")
    (official / "modeling_internvl_chat.py").write_text("# code\n")
    convert(official, tmp_path / "ours", compare=False, progress=False)
    convert(tmp_path / "ours", tmp_path / "back", like=official, compare=False, progress=False)
    assert (tmp_path / "back" / "modeling_internvl_chat.py").exists()
    with pytest.raises(ValueError, match=str(tmp_path / "back")):
        convert(tmp_path / "ours", tmp_path / "back", progress=False)


ADDED = (
    "<|im_start|>",
    "<|im_end|>",
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<quad>",
    "</quad>",
    "<ref>",
    "</ref>",
    "<box>",
    "</box>",
)


def train_sentencepiece(folder, lines, **options):
    """Write tokenizer.model, and read it with SentencePiece."""
    sentencepiece = pytest.importorskip("sentencepiece")
    (folder / "texts.txt").write_text("\n".join(lines))
    settings = {"vocab_size": 360, "model_type": "bpe", "byte_fallback": True, "remove_extra_whitespaces": False}
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "texts.txt"),
        model_prefix=str(folder / "tokenizer"),
        minloglevel=2,
        **{**settings, "normalization_rule_name": "identity", **options},
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def write_sentencepiece(tmp_path, *, prefix, family="internlm2", **more):
    """An official folder with a SentencePiece model of InternLM2's kind; also that model, as it reads text."""
    folder = write_official(tmp_path / "official", family, tokenizer=False, template="internlm2-chat")
    lines = [f"What is {n} and {n + 1}? A red house, 这是一只猫。" for n in range(200)]
    original = train_sentencepiece(folder, lines, add_dummy_prefix=prefix)
    count = original.get_piece_size()
    special = {"0": "<unk>", "1": "<s>", "2": "</s>"} | {str(count + n): token for n, token in enumerate(ADDED)}
    settings = {
        "tokenizer_class": "InternLM2Tokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "unk_token": "<unk>",
        "added_tokens_decoder": {number: {"content": token, "special": True} for number, token in special.items()},
        **more,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder, original


@pytest.mark.parametrize(
    "options",
    [
        {"add_dummy_prefix": True},
        {"add_dummy_prefix": False, "byte_fallback": False},
        {"add_dummy_prefix": False, "remove_extra_whitespaces": True},
        {"add_dummy_prefix": True, "remove_extra_whitespaces": True, "normalization_rule_name": "nmt_nfkc"},
    ],
    ids=["Llama", "no bytes", "spaces", "nmt_nfkc"],
)
def test_a_sentencepiece_model_merges_by_score(tmp_path, options):
    """Thousands of texts as SentencePiece itself encodes them, also when the order of pieces is not that of their scores."""
    code = Path(__file__).read_text().splitlines()
    lines = [*code, *[f"这是第{n}只红猫，图中显示了{n}个人。" for n in range(99)], "naïve café ∑ 😀🎉 👩‍👧"]
    train_sentencepiece(tmp_path, lines, vocab_size=800, character_coverage=0.995, allow_whitespace_only_pieces=True, **options)
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((tmp_path / "tokenizer.model").read_bytes())
    choose = random.Random(0)
    places = [place for place, piece in enumerate(proto.pieces) if piece.type == 1]
    moved = [(proto.pieces[place].piece, proto.pieces[place].score) for place in choose.sample(places, len(places))]
    for place, (piece, score) in zip(places, moved, strict=True):
        proto.pieces[place].piece, proto.pieces[place].score = piece, score
    (tmp_path / "moved.model").write_bytes(proto.SerializeToString())
    parts = [
        "the",
        "图",
        "像",
        "12",
        "x=",
        "()",
        "{}",
        "==",
        "😀",
        "é",
        "▁",
        "ab",
        "\u3000",
        " ",
        "  ",
        "    ",
        "\t",
        "\n",
        "a",
        "b",
    ]
    texts = [line[: choose.randint(1, 200)] for line in lines]
    texts += ["".join(choose.choices(parts, k=choose.randint(0, 14))) for _ in range(2000)]
    for name in ("tokenizer.model", "moved.model"):
        expected = SentencePieceProcessor(model_file=str(tmp_path / name)).encode(texts)
        found, _ = read_sentencepiece(tmp_path / name, {})
        assert [one.ids for one in found.encode_batch(texts, add_special_tokens=False)] == expected


def test_a_unigram_model_is_refused(tmp_path):
    lines = [f"What is {n} and {n + 1}? A red house." for n in range(200)]
    train_sentencepiece(tmp_path, lines, model_type="unigram", vocab_size=300)
    with pytest.raises(ValueError, match="type BPE .*tokenizer.model has type 1"):
        read_sentencepiece(tmp_path / "tokenizer.model", {})


@pytest.mark.parametrize("legacy", [None, True, False])
@pytest.mark.parametrize("prefix", [True, False])
def test_llamas_tokenizer_model_alone(tmp_path, prefix, legacy):
    """As in InternVL2-40B: LlamaTokenizer, added tokens in their own file. `legacy` prefixes each text between added tokens."""
    flags = {"add_bos_token": False} | ({} if legacy is None else {"legacy": legacy})
    folder, original = write_sentencepiece(tmp_path, prefix=prefix, family="llama", tokenizer_class="LlamaTokenizer", **flags)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    added = {token["content"]: int(number) for number, token in settings.pop("added_tokens_decoder").items()}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": None}))
    tokenizer = load_processor(str(folder)).tokenizer
    first, second = "What is 7?", " A red house"
    ids = tokenizer(f"{first}<|im_end|>{second}", add_special_tokens=False)["input_ids"]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    later = original.encode(second) if legacy is not False or not prefix else original.encode(second[1:])
    assert ids == [*original.encode(first), end, *later]
    assert tokenizer.eos_token == "</s>" and tokenizer.unk_token == "<unk>"
    (folder / "added_tokens.json").write_text(json.dumps({**added, "<late>": 5000}))
    with pytest.raises(ValueError, match=f"'<late>' has id 5000 in {folder}"):
        load_processor(str(folder))
    (folder / "added_tokens.json").unlink()
    with pytest.raises(ValueError, match=f"{folder} has no <img>.*added_tokens.json"):
        load_processor(str(folder))


@pytest.mark.parametrize("prefix", [True, False])
def test_internlm2s_tokenizer(tmp_path, prefix):
    """A SentencePiece model is read as it is, with the official tokenizer's additions after it."""
    folder, original = write_sentencepiece(tmp_path, prefix=prefix)
    count = original.get_piece_size()
    processor = load_processor(str(folder))
    tokenizer = processor.tokenizer
    assert tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>") == count + 4
    for text in ("What is 7 and 9? A house", "这是一只红猫 é ∑", "two  spaces", "\n lines\n"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == original.encode(text)
        assert tokenizer.decode(ids) == text
    text = processor.apply_chat_template([{"role": "user", "content": "A house"}], tokenize=False)
    assert text.startswith("<s><|im_start|>system\n")
    processor.save_pretrained(tmp_path / "saved")
    again = AutoProcessor.from_pretrained(tmp_path / "saved").tokenizer
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


PAIR = {
    "prompt": [{"role": "user", "content": "What is 7 and 9?"}],
    "chosen": [{"role": "assistant", "content": "A red house"}],
    "rejected": [{"role": "assistant", "content": "9"}],
}


def official_tokens(processor, original, bos, tiles):
    """As InternLM2Tokenizer makes them of the conversation's text: SentencePiece encodes the text between special tokens."""
    image = "<img>" + "<IMG_CONTEXT>" * 4 * tiles + "</img>\n" if tiles else ""
    text = (
        f"<|im_start|>system\n{OLD_SYSTEM}<|im_end|><|im_start|>user\n{image}What is 7 and 9?<|im_end|>"
        "<|im_start|>assistant\nA red house<|im_end|>"
    )
    ids = [1] if bos else []
    for piece in re.split("(" + "|".join(map(re.escape, ADDED)) + ")", text):
        ids += [processor.tokenizer.convert_tokens_to_ids(piece)] if piece in ADDED else original.encode(piece)
    return ids


@pytest.mark.parametrize("add_bos", [None, True, False])
@pytest.mark.parametrize("prefix", [True, False])
def test_internlm2s_conversations_have_the_official_tokens(tmp_path, prefix, add_bos):
    """BOS where tokenizer_config.json says so, once, by default too; a completion's tokens are those of the whole text."""
    flags = {} if add_bos is None else {"add_bos_token": add_bos}
    folder, original = write_sentencepiece(tmp_path, prefix=prefix, **flags)
    processor = load_processor(str(folder))
    assert processor.tokenizer("9")["input_ids"] == [*([] if add_bos is False else [1]), *original.encode("9")]
    for images, tiles in (([], 0), ([Image.new("RGB", (32, 32))], 1)):
        (pair,), _, _ = Encoder(processor)([{**PAIR, "images": images}])
        expected = official_tokens(processor, original, add_bos is not False, tiles)
        assert pair.prompt_ids + pair.completions[0].ids == expected
    processor.save_pretrained(tmp_path / "saved")
    again = AutoProcessor.from_pretrained(tmp_path / "saved")
    assert Encoder(again)([PAIR])[0][0].prompt_ids == Encoder(processor)([PAIR])[0][0].prompt_ids


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "Qwen2Tokenizer", None])
def test_the_tokenizers_default_special_tokens_are_trained_with(tmp_path, family, bos, name):
    """The official code tokenizes with the tokenizer's default special tokens: Llama-3's tokenizer.json adds BOS."""
    folder = write_official(tmp_path / "official", family, template="internlm2-chat")
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"bos_token": "<|endoftext|>"}
    settings.pop("tokenizer_class", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | ({"tokenizer_class": name} if name else {})))
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if bos:
        special = [("<|endoftext|>", backend.token_to_id("<|endoftext|>"))]
        backend.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=special)
        backend.save(str(folder / "tokenizer.json"))
    text = (
        f"<|im_start|>system\n{OLD_SYSTEM}<|im_end|><|im_start|>user\nWhat is 7 and 9?<|im_end|>"
        "<|im_start|>assistant\nA red house<|im_end|>"
    )
    (pair,), _, _ = Encoder(load_processor(str(folder)))([PAIR])
    assert pair.prompt_ids + pair.completions[0].ids == backend.encode(text).ids
    (pair,), _, _ = Encoder(load_processor(str(folder)))([{**PAIR, "images": [Image.new("RGB", (32, 32))]}])
    image = "<img>" + "<IMG_CONTEXT>" * 4 + "</img>\n"
    assert pair.prompt_ids + pair.completions[0].ids == backend.encode(text.replace("user\n", f"user\n{image}")).ids


def test_it_ends_a_turn(tmp_path):
    official = write_official(tmp_path / "official", "internlm2")
    convert(official, tmp_path / "ours", compare=False, progress=False)
    processor = AutoProcessor.from_pretrained(tmp_path / "ours")
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert GenerationConfig.from_pretrained(tmp_path / "ours").eos_token_id == end

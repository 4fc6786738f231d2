"""Read a SentencePiece model as a fast tokenizer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

NORMAL, UNKNOWN, USER_DEFINED = 1, 2, 4
"""Types of pieces in sentencepiece_model.proto; others are control pieces, bytes and unused ones."""


def read_sentencepiece(
    path: Path, added: Mapping[str, Mapping[str, Any]], *, prefix_every_text: bool = True
) -> tuple[Tokenizer, dict[str, str]]:
    """Read a tokenizer.model of type BPE, as InternLM2's and Llama's; and its special tokens by name (``bos_token``, ...).

    `added` is ``added_tokens_decoder`` of tokenizer_config.json, id -> content and flags; those within the vocabulary replace the
    piece with that id. `prefix_every_text`: put the model's leading space before each text between added tokens, as SentencePiece
    does when it gets them one by one (``legacy`` of Llama's tokenizer); otherwise before the first one only.

    Raises ValueError when the sentencepiece package is missing, the file cannot be read, the model is of another type, or the ids
    of added tokens leave a gap.
    """
    proto = _parsed(path)
    trained, rules = proto.trainer_spec, proto.normalizer_spec
    pieces = [piece.piece for piece in proto.pieces]
    for number, token in added.items():
        if int(number) < len(pieces):
            pieces[int(number)] = token["content"]
    special = {
        name: pieces[place]
        for name, place in (("unk_token", trained.unk_id), ("bos_token", trained.bos_id), ("eos_token", trained.eos_id))
        if 0 <= place < len(pieces)
    }
    kinds = [piece.type for piece in proto.pieces]
    ids = {piece: number for number, piece in enumerate(pieces)}
    mergeable = [piece if kind in (NORMAL, USER_DEFINED) else "" for piece, kind in zip(pieces, kinds, strict=True)]
    merges = _merges(mergeable, [piece.score for piece in proto.pieces])
    unknown = pieces[kinds.index(UNKNOWN)]
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=trained.byte_fallback))
    steps: list[Any] = [normalizers.Precompiled(rules.precompiled_charsmap)] if rules.precompiled_charsmap else []
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" +"), " ")]
    if rules.add_dummy_prefix and prefix_every_text:
        steps.append(normalizers.Prepend("▁"))
    steps.append(normalizers.Replace(" ", "▁"))
    if rules.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(r"▁+\z"), ""))  # written marks too
    tokenizer.normalizer = normalizers.Sequence(steps)
    if rules.add_dummy_prefix and not prefix_every_text:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    end = [decoders.Strip(" ", 1, 0)] if rules.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *end])
    user = [AddedToken(piece, normalized=False) for piece, kind in zip(pieces, kinds, strict=True) if kind == USER_DEFINED]
    tokenizer.add_tokens(user)
    _add_tokens(tokenizer, added, path.parent)
    return tokenizer, special


def _parsed(path: Path) -> Any:
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise ValueError(f"{path} needs SentencePiece, which is not installed: pip install 'mpo-trainer[internlm2]'") from error
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(path.read_bytes())
    except Exception as error:  # protobuf's own class
        raise ValueError(f"{path} cannot be read ({error}). Copy the file from the original again.") from error
    trained = proto.trainer_spec
    if trained.model_type != 2 or trained.treat_whitespace_as_suffix or not proto.normalizer_spec.escape_whitespaces:
        raise ValueError(  # unigram's ties differ
            f"Expected a SentencePiece model of type BPE (2) that marks spaces in front of words; {path} has type "
            f"{trained.model_type}, or other marks. Add the tokenizer.json of the original."
        )
    return proto


def _add_tokens(tokenizer: Tokenizer, added: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    for number, token in sorted(added.items(), key=lambda item: int(item[0])):
        flags = {name: bool(token.get(name)) for name in ("lstrip", "rstrip", "single_word")}
        one = AddedToken(token["content"], special=token.get("special", True), normalized=False, **flags)
        (tokenizer.add_special_tokens if one.special else tokenizer.add_tokens)([one])
        if (place := tokenizer.token_to_id(token["content"])) != int(number):
            raise ValueError(
                f"The added token {token['content']!r} has id {number} in {folder}, and would get {place}: ids before it are "
                "missing. Copy tokenizer_config.json and added_tokens.json from the original."
            )


def _merges(pieces: list[str], scores: list[float]) -> list[tuple[str, str]]:
    rank = {piece: number for number, piece in enumerate(pieces) if piece}
    merges = []
    for piece in sorted(rank, key=lambda piece: (-scores[rank[piece]], rank[piece])):
        parts = [(piece[:at], piece[at:]) for at in range(1, len(piece)) if piece[:at] in rank and piece[at:] in rank]
        merges += sorted(parts, key=lambda pair: (rank[pair[0]], rank[pair[1]]))
    return merges

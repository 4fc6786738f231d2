"""Load InternLM2's tokenizer.model as a fast tokenizer, without running the tokenizer code of the checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers


def read_sentencepiece(path: Path, added: Mapping[str, Mapping[str, Any]]) -> Tokenizer:
    """Read a SentencePiece model of type BPE.

    Args:
        path: path of tokenizer.model.
        added: ``added_tokens_decoder`` of tokenizer_config.json: id -> content and flags. Those within the vocabulary replace the
            piece with that id.

    Raises:
        ValueError: when the sentencepiece package is missing, or the model is of another type.
    """
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise ValueError(f"{path} needs SentencePiece, which is not installed: pip install 'mpo-trainer[internlm2]'") from error
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(path.read_bytes())
    if proto.trainer_spec.model_type != 2:
        raise ValueError(
            f"Expected a SentencePiece model of type BPE (2), as InternLM2's; {path} has type {proto.trainer_spec.model_type}."
        )
    pieces = [piece.piece for piece in proto.pieces]
    pieces[:3] = ["<unk>", "<s>", "</s>"]
    for number, token in added.items():
        if int(number) < len(pieces):
            pieces[int(number)] = token["content"]
    ids = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(ids, _merges(pieces), unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    space = normalizers.Replace(" ", "▁")
    prefix = proto.normalizer_spec.add_dummy_prefix
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space]) if prefix else space
    end = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *end])
    tokenizer.add_special_tokens(
        [
            AddedToken(token["content"], special=token.get("special", True), normalized=False)
            for _, token in sorted(added.items(), key=lambda item: int(item[0]))
        ]
    )
    return tokenizer


def _merges(pieces: list[str]) -> list[tuple[str, str]]:
    """Merges in the order of the pieces that they create."""
    rank = {piece: number for number, piece in enumerate(pieces)}
    merges = []
    for piece in pieces:
        parts = [(piece[:at], piece[at:]) for at in range(1, len(piece)) if piece[:at] in rank and piece[at:] in rank]
        merges += sorted(parts, key=lambda pair: (rank[pair[0]], rank[pair[1]]))
    return merges

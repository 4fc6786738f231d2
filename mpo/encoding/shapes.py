"""Count the tokens of plain conversations fast: the chat template is rendered once per shape, and each word is tokenized once.

A shape is everything of a conversation but its texts: roles, kinds of parts, number of images, labelled turns. Rendered with other
texts, it gives what the template writes around the texts of every conversation of that shape. A tokenizer splits a text at its
added tokens first, so what stands between two of them is tokenized on its own; a byte-level one then splits this into words.
A conversation for which this is not known to be what `mpo.encoding.turns` does has no count here.
"""

from __future__ import annotations

import json
import random
import re
import string
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from os.path import commonprefix
from typing import Any

from PIL import Image
from tokenizers import pre_tokenizers

from mpo.data.messages import IMAGE_PLACEHOLDER
from mpo.encoding.encoder import Encoder
from mpo.encoding.turns import CONVERSATION, Record, render

STAND_IN = Image.new("RGB", (1, 1))
"""Passed to the chat template for each image, for which it only writes a placeholder."""
SHAPED = {"id", "messages", "images", "videos", "frames", "tiles", "augment"}
"""Columns that a conversation with a shape may have."""
_MESSAGE = {"role", "content", "train"}
_PART = {"type", "text"}
_AS_MESSAGES = ("", "{", "[", '"')  # how a text may begin that is blank, or that `mpo.data.messages.checked_text` refuses
_SLOT = re.compile("\0(\\d+)\0")
_ASCII = {r"\p{L}": "a-zA-Z", r"\p{N}": "0-9"}
_MAX_WORDS = 2**19
Units = Sequence[Any]
"""The words of a text, or its token ids."""


@dataclass(frozen=True)
class Chunk:
    """What stands between the added tokens `before` and `after`: in turn fixed texts, and numbers of the conversation's texts."""

    before: str
    items: tuple[str, ...]
    after: str

    def fill(self, texts: Sequence[str]) -> tuple[str, str, str]:
        """The chunk in a conversation with these texts."""
        items = [texts[int(item)] if place % 2 else item for place, item in enumerate(self.items)]
        return self.before, "".join(items), self.after


@dataclass(frozen=True)
class Shape:
    """What conversations have in common that differ in their texts alone.

    ``prompt``, ``completion``: the number of fixed tokens, and the chunks with texts; the completion ends after its last labelled
    token. ``opening``: the prompt's end in the completion's first chunk, as words and as tokens. ``later_images``: of `Rendered`.
    ``keeps_blanks``: whether the template keeps a blank or newline at the ends of texts. ``diverging``: characters by which a text
    would continue the prompt, since a generation prompt goes on with them.
    """

    prompt: tuple[int, list[Chunk]]
    opening: tuple[Units, Units]
    completion: tuple[int, list[Chunk]]
    later_images: int
    keeps_blanks: bool
    diverging: frozenset[str]

    def takes(self, texts: Sequence[str]) -> bool:
        """Whether these texts are known to be written as they are."""
        ends = {end for text in texts for end in (text[0], text[-1]) if end.isspace()}
        return ends <= ({" ", "\n"} if self.keeps_blanks else set()) and not any(text[0] in self.diverging for text in texts)


class Shapes:
    """The shapes of conversations, by the template and the tokenizer of an encoder."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder, self.units = encoder, UnitCounts(encoder.tokenizer)
        processing_class = encoder.processing_class
        template = str(getattr(processing_class, "chat_template", None))
        literals = {text.strip() for pair in re.findall(r"'([^']*)'|\"([^\"]*)\"", template.replace("\\n", "\n")) for text in pair}
        placeholders = {getattr(processing_class, name, None) or "" for name in ("image_token", "video_token")}
        refused = {*encoder.tokenizer.get_added_vocab(), *placeholders, IMAGE_PLACEHOLDER} - {""}
        refused |= {text for text in literals if len(text) > 1 and not text.replace(" ", "").isalnum()}
        # Whether a text has one of the others makes no difference if it makes none that this text has all of them:
        self._rich = f"{' '.join(sorted(literals - refused))} & ' < \\ {{{{ \" \n\n  %"
        self._refused, self._first = _any_of(refused), {text[0] for text in refused}
        self._added = _any_of(encoder.tokenizer.get_added_vocab())

    def outline(self, messages: Any, images: int) -> tuple[Any, list[str]] | None:
        """A key of the shape of a conversation and its texts; None if it may have another rule, or a message is not plain.

        `as_completion` accepts a conversation if it accepts another with the same key.
        """
        kinds: list[tuple[Any, str, Any]] = []
        texts: list[Any] = []
        for message in messages:
            content, flag, kind = message["content"], message.get("train"), "text"
            if flag is not None and type(flag) is not bool:  # 1 has the hash of True
                return None
            if len(message) > 2 and any(value is not None and name not in _MESSAGE for name, value in message.items()):
                return None
            if type(content) is list:
                kind = ""
                for part in content:
                    kind += (what := part["type"])[0]
                    if len(part) > 1 + ("text" in part) and any(part[name] is not None for name in part.keys() - _PART):
                        return None
                    if what == "text":
                        texts.append(part.get("text"))
                    elif what != "image" or part.get("text"):
                        return None
            else:
                texts.append(content)
            kinds.append((message["role"], kind, flag))
        if not all(texts) or any(text.lstrip()[:1] in _AS_MESSAGES for text in texts):
            return None
        whole = "\1".join(texts)
        if any(first in whole for first in self._first) and self._refused.search(whole) or "\0" in whole:
            return None
        if not whole.isascii():
            whole.encode()  # raises an error for half a character
        return (tuple(kinds), images), texts

    def shape(self, record: Record, images: int, texts: Sequence[str]) -> Shape | None:
        """Render the shape of a conversation; None if the template or the tokenizer has other rules than those of `Shape`."""
        end = self.encoder._end_of_turn
        if end is None or not self.encoder.splits_turns or not self.encoder.tokenizer.is_fast:
            return None
        plain = [f"Snow{number}man" for number in range(len(texts))]
        pieces, labelled, later = self._pieces(record, images, plain)
        rich = [f"Q{number}q {self._rich} q{number}Q" for number in range(len(texts))]
        if pieces != self._pieces(record, images, rich)[0] or _SLOT.findall("".join(pieces)) != list(map(str, range(len(texts)))):
            return None
        keeps_blanks = all(pieces == self._pieces(record, images, [c + text + c for text in plain])[0] for c in " \n")
        whole, ends = "".join(pieces), list(accumulate(map(len, pieces)))
        last = max(place for place, flag in enumerate(labelled) if flag)
        added = list(self._added.finditer(whole))
        ids = self.encoder.tokenizer.convert_tokens_to_ids([found[0] for found in added])
        inside = [n for n, found in enumerate(added) if ids[n] == end and ends[last - 1] <= found.start() < ends[last]]
        if not inside or not added or added[0].start() > 0:
            return None
        fixed, opening = [0, 0], None
        chunks: tuple[list[Chunk], list[Chunk]] = ([], [])
        for number in range(inside[-1]):
            begin, stop = added[number].end(), added[number + 1].start()
            side, chunk = int(begin > ends[0]), Chunk(added[number][0], tuple(_SLOT.split(whole[begin:stop])), added[number + 1][0])
            fixed[side] += 1
            if begin <= ends[0] <= stop:
                start, side = whole[begin : ends[0]], 1
                if len(chunk.items) == 1 or _SLOT.search(start):
                    return None
                opening = self.units.of(chunk.before, start, ""), self.encoder.tokenize(chunk.before + start, False)[1:]
            if len(chunk.items) > 1:
                chunks[side].append(chunk)
            else:
                fixed[side] += self.units.count(self.units.of(*chunk.fill(())))
        if opening is None:
            return None
        in_prompt = len(opening[1])
        diverging = self._diverging(record, images, plain, whole)
        prompt, completion = (fixed[0] + in_prompt, chunks[0]), (fixed[1] + 1 - in_prompt, chunks[1])  # 1: the end of turn
        return Shape(prompt, opening, completion, later, keeps_blanks, diverging)

    def lengths(self, plain: Sequence[tuple[Shape, Sequence[str]]]) -> list[tuple[int, int] | None]:
        """Tokens of prompts and completions, each image one token; None where a text merges with the prompt's end."""
        filled = [chunk.fill(texts) for shape, texts in plain for _, chunks in (shape.prompt, shape.completion) for chunk in chunks]
        units = self.units.many(filled)
        found: list[tuple[int, int] | None] = []
        for shape, _ in plain:
            prompt, completion = shape.prompt[0], shape.completion[0]
            for _ in shape.prompt[1]:
                prompt += self.units.count(next(units))
            for place in range(len(shape.completion[1])):
                own = next(units)
                completion += self.units.count(own)
                if place == 0:
                    opening = shape.opening[not isinstance(own[0], str)]
                    is_apart = own[: len(opening)] == opening
            found.append((prompt, completion) if is_apart else None)
        return found

    def _pieces(self, record: Record, images: int, texts: Sequence[str]) -> tuple[list[str], list[bool], int]:
        """Render a conversation with other texts: prompt and pieces, each text replaced by its number; and which are labelled."""
        record = {**record, **_with_texts(record, texts), "images": [STAND_IN] * images}
        rendered = render(record, self.encoder.processing_class, sides=CONVERSATION, split_turns=self.encoder.splits_turns)
        pieces = [rendered.prompt, *(piece.text for piece in rendered.completions[0])]
        for number, text in enumerate(texts):
            pieces = [piece.replace(text, f"\0{number}\0") for piece in pieces]
        return pieces, [False, *(piece.labelled for piece in rendered.completions[0])], rendered.later_images

    def _diverging(self, record: Record, images: int, texts: Sequence[str], whole: str) -> frozenset[str]:
        found = set()
        messages = [message for side in _with_texts(record, texts).values() for message in side]
        anywhere = any("image" in _kinds(message) for message in messages)
        whole = _SLOT.sub(lambda slot: texts[int(slot[1])], whole)
        for place, message in enumerate(messages):
            if message["role"] == "assistant":
                shown = sum(_kinds(before).count("image") for before in messages[:place]) if anywhere else images
                prompt = {"prompt": messages[:place], "images": [STAND_IN] * shown}
                opening = render(prompt, self.encoder.processing_class, sides=()).prompt
                found |= set(opening[len(commonprefix([opening, whole])) :][:1])
        return frozenset(found)


class UnitCounts:
    """The units of texts between added tokens, and how many tokens they are: words where the tokenizer splits a text into words."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._pattern = tokenizer, None
        self._counts: dict[str, int] = {}
        if not tokenizer.is_fast:
            return
        backend = tokenizer.backend_tokenizer
        rules = json.loads(backend.to_str())
        kinds = [rule["type"] for rule in (rules["pre_tokenizer"] or {}).get("pretokenizers", [])]
        split, level = rules["pre_tokenizer"]["pretokenizers"] if kinds == ["Split", "ByteLevel"] else ({}, {})
        plain = not any(token.lstrip or token.rstrip or token.single_word for token in tokenizer.added_tokens_decoder.values())
        plain = plain and (rules["normalizer"] or {}).get("type", "NFC") == "NFC"  # no change of ASCII
        plain = plain and rules["model"]["type"] == "BPE" and not rules["model"].get("dropout")
        if (
            plain
            and split.get("behavior") == "Isolated"
            and not (split["invert"] or level["use_regex"] or level["add_prefix_space"])
        ):
            self._model, self._bytes = backend.model, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            self._pattern = ascii_pattern(split["pattern"].get("Regex", ""), backend.pre_tokenizer)

    def of(self, before: str, text: str, after: str) -> Units:
        """The units of one text, between two added tokens."""
        return next(self.many([(before, text, after)]))

    def many(self, chunks: Sequence[tuple[str, str, str]]) -> Iterator[Units]:
        """The units of texts, each between two added tokens."""
        pattern = self._pattern
        by_words = [pattern is not None and text.isascii() for _, text, _ in chunks]
        others = ["".join(chunk) for chunk, words in zip(chunks, by_words, strict=True) if not words]
        ids = iter(self._tokenizer(others, add_special_tokens=False)["input_ids"] if others else ())
        for (_, text, after), words in zip(chunks, by_words, strict=True):
            yield pattern.findall(text) if pattern is not None and words else next(ids)[1 : -1 if after else None]

    def count(self, units: Units) -> int:
        """How many tokens units are."""
        if not units or not isinstance(units[0], str):
            return len(units)
        counts = self._counts
        try:
            return sum(map(counts.__getitem__, units))
        except KeyError:
            if len(counts) > _MAX_WORDS:
                counts.clear()
            for word in [word for word in units if word not in counts]:
                counts[word] = len(self._model.tokenize(self._bytes.pre_tokenize_str(word)[0][0]))
            return self.count(units)


def ascii_pattern(pattern: str, pre_tokenizer: Any) -> re.Pattern[str] | None:
    """A tokenizer's pattern of words for ASCII texts; None if it splits some of 300 random texts differently."""
    is_class, translated = False, ""
    for part in re.findall(r"\\p\{\w+\}|\\.|.", pattern, re.DOTALL):
        is_class = part == "[" or (is_class and part != "]")
        ascii = _ASCII.get(part, part)
        translated += f"[{ascii}]" if ascii != part and not is_class else ascii
    try:
        found = re.compile(translated, re.ASCII)
    except re.error:
        return None
    rng = random.Random(0)
    words = ["a", "Bc", "1", "23", "'s", "'LL", " ", "  ", "\n", "\r\n", "\t", *string.punctuation, *map(chr, range(128))]
    for _ in range(300):
        text = "".join(rng.choices(words, k=24))
        if [match.span() for match in found.finditer(text)] != [span for _, span in pre_tokenizer.pre_tokenize_str(text)]:
            return None
    return found


def _kinds(message: Mapping[str, Any]) -> list[str]:
    content = message["content"]
    return [] if isinstance(content, str) else [part["type"] for part in content]


def _with_texts(record: Record, texts: Sequence[str]) -> dict[str, list[Any]]:
    others = iter(texts)

    def changed(message: Mapping[str, Any]) -> dict[str, Any]:
        content = message["content"]
        if not isinstance(content, str):
            content = [{**part, "text": next(others)} if part["type"] == "text" else part for part in content]
        return {**message, "content": next(others) if isinstance(content, str) else content}

    return {name: [changed(message) for message in record[name]] for name in ("prompt", "completion")}


def _any_of(texts: Collection[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")

"""Dropout-NTP (arXiv 2411.10442, section 3): a worse response from the start of a good one, gone on with without the image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import regex as re  # type: ignore[import-untyped]

from mpo.generation.generator import Decoding, Generator, Request, Response
from mpo.pipelines.mmpr.pair import pair_of
from mpo.pipelines.mmpr.sample import model_name
from mpo.pipelines.step import Dropped, Record, Step

_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_UNIT = re.compile(rf"\s*(?:(?=[{_UNSPACED}])\X|(?:(?![\s{_UNSPACED}])\X)+)")


def start_of(text: str, ratio: float) -> str:
    """The start of a text: this fraction of its words; characters count as words in scripts that write no spaces.

    It ends with a word, without the white space after it; that before and between words is the text's own.

    >>> start_of("A red  car stands here.", 0.5), start_of("图中有3辆红车。", 0.5)
    ('A red', '图中有3')
    """
    units = _UNIT.findall(text)
    return "".join(units[: int(len(units) * ratio)])


def joined(text: str, start: str, continuation: str, *, exact: bool = True) -> str:
    """Join the start of a text and what a model has gone on with, with neither a double space nor, unless `exact`, a lost one.

    A continuation of a model here has its own white space; servers may strip it, so that words would run together.

    >>> joined("A red car.", "A red", " cat."), joined("A red car.", "A red", "cat.", exact=False)
    ('A red cat.', 'A red cat.')
    """
    if not start:
        return continuation.lstrip() if text[:1].strip() else continuation
    if continuation[:1].isspace():
        own = continuation.lstrip(" ")
        return f"{start} {own}" if continuation.startswith("  ") and own[:1].strip() else start + continuation
    rest = text[len(start) :]
    gap = rest[: len(rest) - len(rest.lstrip())]
    return start + (gap if not exact and continuation[:1].isalnum() else "") + continuation


class Continue(Step):
    """Pair a question's one response with the same start and another end.

    Args:
        generator: the model that gave the response.
        ratio: the fraction of the response that is kept, 0 to below 1; 0 has all of it sampled again.
        with_image: go on with the image, for comparison; MMPR goes on without it.
        name: name of the model in the output; None for the generator's own.
        sampling: settings of `mpo.generation.generator.Generator.generate`, without n.

    Raises:
        ValueError: for an impossible ratio, and settings without a meaning.
    """

    verb = "continue"

    def __init__(
        self, generator: Generator, *, ratio: float = 0.5, with_image: bool = False, name: str | None = None, **sampling: Any
    ) -> None:
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio < 1:
            raise ValueError(f"Expected the ratio to be a number from 0 to below 1; got ratio={ratio!r}.")
        if sampling.get("n", 1) != 1:
            raise ValueError(f"A response is continued once; got n={sampling['n']}. Leave n out.")
        self.generator, self.ratio, self.with_image, self.name = generator, ratio, with_image, name
        self.sampling = asdict(Decoding(**sampling))

    def _start(self, record: Record) -> tuple[dict[str, Any], str]:
        if "asked" not in record or len(record.get("responses", ())) != 1:
            raise ValueError(f"expected one response, and it has {len(record.get('responses', ()))}. Sample one (n=1).")
        (response,) = record["responses"]
        start = start_of(response["text"], self.ratio)
        if response.get("finish_reason") == "length":
            raise Dropped("the response is truncated")
        if not response["text"].strip() or (self.ratio and not start):
            raise Dropped(f"the response is too short to keep {self.ratio} of it")
        return response, start

    def requests(self, record: Record) -> list[Request]:
        """One request: what was asked, without its image, and the start of the response."""
        images, videos = (record.get(name, ()) for name in ("images", "videos"))
        if not (self.with_image or images or videos):
            raise ValueError("it has no image to leave out. Give a question with one, or continue with the image (with_image).")
        start, text = self._start(record)[1] or None, record["asked"]["question"]
        if not self.with_image:
            text, images, videos = re.sub("<(?:image|video)>\n?", "", text).strip(), (), ()
        turns = {"system": record["asked"].get("system"), "user": text}
        return [Request([{"role": role, "content": said} for role, said in turns.items() if said], images, start, videos=videos)]

    def finish(self, record: Record, responses: Sequence[Sequence[Response]]) -> Record:
        """The pair."""
        chosen, start = self._start(record)
        ((found,),) = responses
        text = joined(chosen["text"], start, found.text, exact=hasattr(self.generator, "processor"))
        if not found.text.strip():
            raise Dropped("the continuation ends at once")
        if text.split() == chosen["text"].split():
            raise Dropped("the continuation equals the original")
        how = f"sr{self.ratio:g}_{'with' if self.with_image else 'wo'}_image"
        about = {"model": model_name(self), "method": f"dropout_ntp_{how}", "sample": 0, "seed": self.sampling["seed"]}
        return pair_of(record, chosen, {"text": text, "finish_reason": found.finish_reason, **about}, how)

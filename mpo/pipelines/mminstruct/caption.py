"""Describe images with a vision-language model, with what is known of them beforehand; unusable captions are asked for again."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from PIL import Image

from mpo.data.degenerate import find_degenerate
from mpo.generation.generator import Decoding, GenerationError, Generator, Request, Response
from mpo.pipelines.mminstruct.collect import smaller
from mpo.pipelines.mminstruct.domains import LANGUAGES, load_domains, prompt, without_placeholders
from mpo.pipelines.mminstruct.language import CJK, IDEOGRAPHS, found_in, length, other_language, without_thinking
from mpo.pipelines.step import Dropped, Record, Step

LENGTHS = {"en": 120, "zh": 200, "ocr": 200}
"""Shortest captions: in words in English, in characters in Chinese, and of an image with text (FACTS of the paper's code)."""
REFUSAL = 160
"""Characters at the start of a caption in which a refusal is looked for: later on, it may be text in the image."""
_END = re.compile(r"[.!?。！？][\"'”’」』)）]*(?=\s|$|[^\s\x00-\x7f])")

_QUOTED = re.compile('“[^”]*”|‘[^’]*’|「[^」]*」|『[^』]*』|《[^》]*》|"[^"]*"')
_SENTENCE_ZH = re.compile(f"[{IDEOGRAPHS}，、；：]{{12,}}")


class InLanguages:
    """Records once for each language, with ids ``ID:LANGUAGE``."""

    def __init__(self, records: Iterable[Record], languages: Sequence[str] = ("en",)) -> None:
        if wrong := [one for one in languages if one not in LANGUAGES] or ["none"] * (not languages):
            raise ValueError(f"Expected languages among {', '.join(LANGUAGES)}; got {wrong[0]!r}.")
        self.records, self.languages = records, [*dict.fromkeys(languages)]

    def __iter__(self) -> Iterator[Record]:
        for record in self.records:
            for language in self.languages:
                yield {**record, "id": f"{record['id']}:{language}", "image_id": record["id"], "language": language}


class Caption(Step):
    """Give an image a ``caption`` in its ``language``, unless it has one.

    Several, one after another, ask again where the one before got nothing usable; the last one drops what is left.

    Args:
        generator: the model, which sees images.
        shortest: as `LENGTHS`, where it differs.
        max_side: the image is made smaller to so many pixels of its longer side; None to show it as it is.
        last: drop a record without a usable caption, with the reason; False leaves the reason in ``fault``.
        domains: files of further domains (`load_domains`), whose topics the prompt names.
        sampling: settings of `mpo.generation.generator.Generator.generate`.

    Raises:
        ValueError: for settings without a meaning.
    """

    verb = "caption"

    def __init__(
        self,
        generator: Generator,
        *,
        shortest: Mapping[str, int] | None = None,
        max_side: int | None = 512,
        last: bool = True,
        domains: Sequence[str] = (),
        **sampling: Any,
    ) -> None:
        if wrong := {*(shortest or {})} - {*LENGTHS}:
            raise ValueError(f"Expected lengths of {', '.join(LENGTHS)}; got {min(wrong)!r}.")
        self.generator, self.max_side, self.last, self.domains = generator, max_side, last, [str(one) for one in domains]
        self.shortest = {**LENGTHS, **(shortest or {})}
        self.sampling = asdict(Decoding(**{"temperature": 0.7, **sampling}))
        self._known = load_domains(self.domains)

    def requests(self, record: Record) -> list[Request]:  # noqa: D102
        if record.get("caption"):
            return []
        if not record.get("images"):
            raise ValueError("it has no image. Collect images first (mpo mminstruct collect).")
        language, domain = record.get("language", "en"), self._known.get(record.get("domain", ""))
        given = {"about": domain.about[language] if domain else "", "tags": ", ".join(record.get("tags", ()))}
        asked = prompt("caption", language, shortest=self._shortest(record), ocr=record.get("ocr", ""), **given)
        if fault := record.get("fault"):
            asked = prompt("again", language, asked=asked, fault=fault)
        return [Request.ask(without_placeholders(asked), images=[smaller(record["images"][0], self.max_side)])]

    def finish(self, record: Record, responses: Sequence[Sequence[Response]]) -> Record:  # noqa: D102
        if record.get("caption"):
            return record
        response = responses[0][0]
        text = without_thinking(response.text)
        if response.finish_reason == "length":  # up to the last whole sentence
            ends = [*_END.finditer(text)]
            text = text[: ends[-1].end()] if ends else ""
        fault = self.fault(text, record)
        if fault and self.last:
            raise Dropped(f"{fault}: {response.text.strip()!r:.120}", kind=fault.partition(" (")[0], caption=response.text)
        record.pop("fault", None)
        return {**record, "fault": fault} if fault else {**record, "caption": text}

    def fault(self, text: str, record: Record) -> str | None:
        """Why a caption of a record cannot be used; None if it can."""
        language = record.get("language", "en")
        count, shortest = length(text, language), self._shortest(record)
        if not text:
            return "the caption is empty or has no whole sentence"
        if said := found_in(text[:REFUSAL], "refuses") or found_in(text[:REFUSAL], "no_image"):
            return f"the caption refuses ({said!r})"
        plain = CJK.sub("", text) if language == "en" and len(CJK.findall(text)) < len(text) / 5 else text  # words on a sign
        if other_language(plain, language) or (language == "en" and _sentence_zh(text, record.get("ocr", ""))):
            return f"the caption is not in {'English' if language == 'en' else 'Chinese'}"
        if found := next(find_degenerate(text), None):
            return f"the caption repeats itself ({found.rule})"
        if count < shortest:
            return f"the caption is too short ({count} {'words' if language == 'en' else 'characters'}, of {shortest})"
        return None

    def _shortest(self, record: Record) -> int:
        least = self.shortest[record.get("language", "en")]
        return max(least, self.shortest["ocr"]) if record.get("ocr") else least


def _sentence_zh(text: str, ocr: str) -> bool:
    """Whether a text has a run of Chinese as long as a sentence that is neither in quotation marks nor text in the image."""
    return any(run not in ocr for run in _SENTENCE_ZH.findall(_QUOTED.sub("", text)))


def check_sees(generator: Generator) -> None:
    """Find out whether a model sees images: a prompt with one has more tokens than the same prompt without.

    Raises:
        ValueError: if it has not, or if the server refuses images, with what it says.
        ConnectionError: for a server that cannot be used.
    """
    image = Image.effect_mandelbrot((256, 256), (-2.0, -1.5, 1.0, 1.5), 64).convert("RGB")
    name = getattr(generator, "name", None) or "the model"
    counts = []
    for what, images in (("a question", []), ("an image", [image])):
        try:
            ((response,),) = generator.generate([Request.ask("Describe it.", images=images)], temperature=0.0, max_new_tokens=1)
        except GenerationError as error:
            raise ValueError(f"{name} refuses {what}: {str(error).rstrip('.')}. Captions need a model that sees.") from None
        counts.append(response.prompt_tokens)
    if None not in counts and counts[0] == counts[1]:
        same = f"a prompt has {counts[0]} tokens with one and without"
        raise ValueError(f"{name} does not see images: {same}. Give the address of a vision-language model.")

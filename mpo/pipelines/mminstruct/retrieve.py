"""Find images of a local collection by text, with a CLIP-like model; the index stays on disk and goes on after an interruption."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tqdm.auto import tqdm
from transformers import AutoModel, AutoProcessor

from mpo.data.images import open_image
from mpo.io import append_json_lines, read_json_lines, read_json_object, write_text
from mpo.pipelines.flow import log
from mpo.pipelines.ledger import content_hash
from mpo.pipelines.mminstruct.collect import Images
from mpo.pipelines.mminstruct.domains import load_domains
from mpo.pipelines.part import locked
from mpo.pipelines.step import Record

SETTINGS, VECTORS, NAMES = "index.json", "vectors.f32", "images.jsonl"
BATCH = 32


class Index:
    """Embeddings of images in a folder, each of length 1: ``vectors.f32``, rows of float32; ``images.jsonl``, the file of each row.

    Args:
        folder: the folder, new or of the same model.
        model: folder or name of a model with `get_image_features` and `get_text_features`, such as openai/clip-vit-base-patch32.
        device: where it computes; None for the first accelerator.

    Raises:
        ValueError: for a model that has no such features, a folder of another model, and an index that lacks a part.
    """

    def __init__(self, folder: str | Path, model: str, *, device: str | None = None) -> None:
        from mpo.generation.open import usable_device

        self.folder, self.name = Path(folder), model
        try:
            self._model: Any = AutoModel.from_pretrained(model, dtype=torch.float32).eval().to(usable_device(device))
            self._processor: Any = AutoProcessor.from_pretrained(model)
        except OSError as error:
            why = str(error).splitlines()[0]
            raise ValueError(f"{model} cannot be loaded ({why}). Give a folder or a name on the Hub.") from None
        if not all(hasattr(self._model, f"get_{what}_features") for what in ("image", "text")):
            kind = type(self._model).__name__
            raise ValueError(f"{model} is a {kind}, which embeds no images and texts. Give a CLIP-like model.")
        self.size = int(self._text(["image"]).shape[1])
        own, file = {"model": model, "size": self.size, "probe": self._probe()}, self.folder / SETTINGS
        there: dict[str, Any] = read_json_object(file) if file.is_file() else {}
        if there and not _same_model(there, own):
            changed = "whose weights have changed since" if there.get("model") == model else f"and the model is {model}"
            raise ValueError(f"{self.folder} is the index of {there.get('model')}, {changed}. Remove the folder, or give another.")
        if not there and (self.folder / VECTORS).exists():
            raise ValueError(f"{self.folder} is an index without its {SETTINGS}. Remove the folder: it is made again.")
        write_text(file, json.dumps(own))

    def _probe(self) -> list[float]:
        image = Image.effect_mandelbrot((64, 64), (-2.0, -1.5, 1.0, 1.5), 64).convert("RGB")
        return [float(f"{one:.5f}") for one in np.concatenate([self._images([image])[0], self._text(["an image"])[0]])]

    def add(self, files: Iterable[str]) -> None:
        """Embed the images that are not there yet. Those that cannot be opened are left out, and logged."""
        with locked(self.folder, "index"):
            known = {line["content"] for line in self._lines()}
            waiting: dict[str, str] = {}
            for file in tqdm(files, desc="Embedding images", unit="image", disable=None):
                content = content_hash(file)
                if content not in known and content not in waiting:
                    waiting[content] = file
                if len(waiting) == BATCH:
                    self._embed(waiting)
                    known |= {*waiting}
                    waiting = {}
            self._embed(waiting)

    def _embed(self, waiting: dict[str, str]) -> None:
        opened = []
        for content, file in waiting.items():
            try:
                opened.append((content, file, open_image(file)))
            except ValueError as error:
                log.warning("%s; it is not in the index", error)
        if not opened:
            return
        vectors = self._images([image for *_, image in opened])
        with open(self.folder / VECTORS, "ab") as written:
            written.write(vectors.tobytes())
            written.flush()
            os.fsync(written.fileno())
        append_json_lines(self.folder / NAMES, [{"content": content, "file": file} for content, file, _ in opened])

    def _lines(self) -> list[dict[str, Any]]:
        names, vectors = self.folder / NAMES, self.folder / VECTORS
        text = names.read_bytes() if names.is_file() else b""
        if text and not text.endswith(b"\n"):
            names.write_bytes(text[: text.rfind(b"\n") + 1])
        lines = read_json_lines(names) if names.is_file() else []
        wanted = len(lines) * 4 * self.size
        size = vectors.stat().st_size if vectors.is_file() else 0
        if size < wanted:
            raise ValueError(f"{self.folder} lacks vectors of images that it lists. Remove the folder: it is made again.")
        if size > wanted:
            os.truncate(vectors, wanted)
        return lines

    def search(self, text: str, most: int = 200, among: set[str] | None = None) -> list[tuple[str, float]]:
        """Find images by a text.

        Args:
            text: what they show.
            most: maximum number of images.
            among: hashes of the contents (`content_hash`) of the images to choose from; None for all.

        Returns:
            the hash of each one's content and its cosine similarity, best first.
        """
        lines = self._lines()
        if not lines:
            return []
        vectors = np.memmap(self.folder / VECTORS, np.float32, "r").reshape(-1, self.size)[: len(lines)]
        scores = vectors @ self._text([text])[0]
        found = [(lines[place]["content"], float(scores[place])) for place in np.argsort(-scores, kind="stable")]
        return [one for one in found if among is None or one[0] in among][:most]

    def _images(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        inputs = self._processor(images=list(images), return_tensors="pt").to(self._model.device)
        with torch.inference_mode():
            return _unit(self._model.get_image_features(**inputs))

    def _text(self, texts: Sequence[str]) -> NDArray[np.float32]:
        inputs = self._processor(text=list(texts), padding="max_length", truncation=True, return_tensors="pt")
        with torch.inference_mode():
            return _unit(self._model.get_text_features(**inputs.to(self._model.device)))


def _same_model(there: dict[str, Any], own: dict[str, Any]) -> bool:
    """Whether two probes are the same but for rounding, which differs between devices; an older index has the name alone."""
    if "probe" not in there or there.get("size") != own["size"]:
        return there == {name: value for name, value in own.items() if name != "probe"}
    first, second = (np.reshape(one["probe"], (2, -1)) for one in (there, own))  # of length 1
    return bool(np.all((first * second).sum(1) > 1 - 1e-3))


def _unit(found: Any) -> NDArray[np.float32]:
    features = found if isinstance(found, torch.Tensor) else found.pooler_output
    vectors: NDArray[np.float32] = torch.nn.functional.normalize(features.float(), dim=-1).cpu().numpy()
    return vectors


class Retrieved:
    """The images of a source that queries find, each with ``query`` and ``score`` of the one that fits it best.

    Args:
        source: the images, as files.
        folder: that of the index.
        model: as in `Index`.
        most: maximum number of images of a query.
        queries: the queries; without any, those of the source's domain, or of all domains.
        by_query: an image gets the domain whose query found it.
    """

    def __init__(
        self, source: Images, folder: Path, model: str, *, most: int = 200, queries: Sequence[str] = (), by_query: bool = False
    ) -> None:
        domains = source.domains or load_domains()
        own = {name: one for name, one in domains.items() if source.domain in (None, "folder", name)}
        if by_query and queries:
            raise ValueError(f"{source.path}: domain: query needs the queries of the domains, not others. Leave them out.")
        self.queries: list[tuple[str, str | None]] = [(query, None) for query in queries]
        self.queries = self.queries or [(query, name) for name, one in own.items() for query in one.queries]
        self.source, self.folder, self.model, self.most, self.by_query = source, folder, model, most, by_query
        self._found: list[Record] | None = None

    def __iter__(self) -> Iterator[Record]:
        if self._found is None:
            records = [*self.source]
            if wrong := next((one["id"] for one in records if not isinstance(one["images"][0], str)), None):
                raise ValueError(f"{wrong!r} has its image as bytes, and images are retrieved from files. Write them to a folder.")
            index = Index(self.folder, self.model)
            index.add(one["images"][0] for one in records)
            contents = {content_hash(one["images"][0]): one for one in reversed(records)}
            best: dict[str, tuple[float, Record]] = {}
            for query, domain in self.queries:
                own = {"domain": domain} if self.by_query else {}
                for content, score in index.search(query, self.most, {*contents}):
                    if content not in best or score > best[content][0]:
                        best[content] = score, {**contents[content], **own, "query": query, "score": round(score, 4)}
            self._found = sorted((one for _, one in best.values()), key=lambda one: str(one["id"]))
        yield from self._found

"""Ask a model on an OpenAI-compatible server: vLLM, LMDeploy, SGLang, `transformers serve`, or a paid API."""

from __future__ import annotations

import os
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any
from urllib.parse import urlsplit

from mpo.data.images import open_image
from mpo.generation.before import OnText, Question, Reply, check_decoding


class ServerModel:
    """A model on a server.

    Args:
        url: the server's address up to ``/v1``. The key is that of OPENAI_API_KEY, if it is set.
        name: name of the model; None for the first one of ``/v1/models``.

    Raises:
        ValueError: for an invalid address, and a package that is not installed.
        ConnectionError: for a server that cannot be reached or refuses the request, as in `ask`.
    """

    def __init__(self, url: str, name: str | None = None) -> None:
        try:
            from openai import OpenAI
        except ModuleNotFoundError:
            raise ValueError("A server needs the package openai: pip install 'mpo-trainer[server]'.") from None
        try:
            parts = urlsplit(url)
            valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # of the port, or the brackets of an IPv6 address
            valid = False
        if not valid:
            raise ValueError(f"Expected the address of a server, such as http://localhost:8000/v1; got {url!r}.")
        self.url = url
        self._client = OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY") or "none", max_retries=0)
        self.name = name or self._first()

    def _first(self) -> str:
        with self._errors():
            try:
                names = [model.id for model in self._client.models.list()]
            except (AttributeError, TypeError, ValueError) as error:
                raise ConnectionError(f"{self.url} is no OpenAI-compatible server: it lists no models. Check it.") from error
        if not names:
            raise ConnectionError(f"{self.url} has no model. Give the name of one that it can load.")
        return names[0]

    def ask(
        self,
        question: Question,
        *,
        temperature: float = 0.0,
        max_new_tokens: int = 1024,
        seed: int = 0,
        top_p: float = 1.0,
        on_text: OnText | None = None,
    ) -> Reply:
        """Ask one question; arguments as in `mpo.generation.local.LocalGenerator.ask`. Images are sent upright, as PNG.

        Raises:
            ValueError: for invalid arguments, and for an image that cannot be opened.
            ConnectionError: for a server that cannot be reached or refuses the request, with its reason.
        """
        check_decoding(temperature=temperature, max_new_tokens=max_new_tokens, seed=seed, top_p=top_p)
        sampling: dict[str, Any] = {"seed": seed, "top_p": top_p} if temperature > 0 else {}
        pieces, finish_reason, usage = [], None, None
        messages: Any = _messages(question)
        with self._errors():
            stream = self._client.chat.completions.create(
                model=self.name,
                messages=messages,
                max_tokens=max_new_tokens,
                temperature=temperature,
                stream=True,
                stream_options={"include_usage": True},
                **sampling,
            )
            for chunk in stream:
                usage = chunk.usage or usage
                for choice in chunk.choices:
                    finish_reason = choice.finish_reason or finish_reason
                    if choice.delta.content:
                        pieces.append(choice.delta.content)
                        if on_text is not None:
                            on_text(choice.delta.content)
        tokens = (None, None) if usage is None else (usage.prompt_tokens, usage.completion_tokens)
        return Reply("".join(pieces), finish_reason, *tokens)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        import openai

        try:
            yield
        except openai.NotFoundError as error:
            raise ConnectionError(
                f"{self.url} has no such endpoint or model ({_reason(error)}). The address usually ends in /v1."
            ) from error
        except openai.APIStatusError as error:
            raise ConnectionError(f"{self.url} refuses the request ({_reason(error)}).") from error
        except openai.APIConnectionError as error:
            raise ConnectionError(f"{self.url} cannot be reached ({error.__cause__ or error}). Is the server running?") from error
        except Exception as error:  # a broken stream raises the error of the client's HTTP library, which depends on its version
            if not isinstance(error, openai.OpenAIError) and not type(error).__module__.startswith("http"):
                raise
            raise ConnectionError(f"{self.url} failed while it responded ({error}).") from error


def _reason(error: Any) -> str:
    return str(error.response.text).strip()[:500] or str(error.message)


def _messages(question: Question) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = []
    for image in question.images:
        png = BytesIO()
        open_image(image).save(png, format="PNG")
        url = f"data:image/png;base64,{b64encode(png.getvalue()).decode()}"
        content.append({"type": "image_url", "image_url": {"url": url}})
    content.append({"type": "text", "text": question.text})
    system = [] if question.system is None else [{"role": "system", "content": question.system}]
    return [*system, {"role": "user", "content": content}]

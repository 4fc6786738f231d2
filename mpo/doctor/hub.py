"""Check that the Hugging Face Hub responds and whether a token is set. The token itself is never shown."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from mpo.doctor.finding import Finding, one_line

SECONDS = 2.0
"""Timeout of a request to the Hub."""

FIX = "export HF_ENDPOINT=https://MIRROR, or HTTPS_PROXY=http://PROXY, or with all files at hand HF_HUB_OFFLINE=1"


def hub() -> Iterator[Finding]:
    """Offline mode or an answer of the endpoint, and the token."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        yield Finding("access", "off, by HF_HUB_OFFLINE: only files that are here are used")
    else:
        yield _access(constants.ENDPOINT)
    token = "there" if get_token() else "none, which public models and data do not need"
    yield Finding("token", token)


def _access(endpoint: str) -> Finding:
    from huggingface_hub import get_session

    answers: list[int | BaseException] = []

    def ask() -> None:
        try:
            answers.append(get_session().head(endpoint, timeout=SECONDS).status_code)
        except Exception as error:
            answers.append(error)

    asking = threading.Thread(target=ask, daemon=True)  # the timeout does not hold while a name is looked up
    asking.start()
    asking.join(2 * SECONDS)
    answer = answers[0] if answers else TimeoutError("its name was not found in time")
    if isinstance(answer, BaseException):
        return Finding("access", f"{endpoint} does not answer ({one_line(answer)})", "note", FIX)
    if answer >= 400:
        return Finding("access", f"{endpoint} answers with status {answer}", "note", FIX)
    return Finding("access", f"{endpoint} answers")

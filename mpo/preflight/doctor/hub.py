"""Check that the Hugging Face Hub responds and whether a token is set. The token itself is never shown."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from mpo.preflight.doctor.finding import Finding, one_line

SECONDS = 2.0
"""Timeout of a request to the Hub."""

FIX = "export HF_ENDPOINT=https://MIRROR, or HTTPS_PROXY=http://PROXY, or HF_HUB_OFFLINE=1 if all files are cached"


def hub() -> Iterator[Finding]:
    """Check access to the Hub, or report offline mode, and report whether a token is set."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        yield Finding("access", "offline mode (HF_HUB_OFFLINE): only cached files are used")
    else:
        yield _access(constants.ENDPOINT)
    token = "set" if get_token() else "not set; public models and data do not need one"
    yield Finding("token", token)


def _access(endpoint: str) -> Finding:
    from huggingface_hub import get_session

    results: list[int | BaseException] = []

    def request() -> None:
        try:
            results.append(get_session().head(endpoint, timeout=SECONDS).status_code)
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=request, daemon=True)  # the timeout of a request does not cover the DNS lookup
    thread.start()
    thread.join(2 * SECONDS)
    result = results[0] if results else TimeoutError("the DNS lookup timed out")
    if isinstance(result, BaseException):
        return Finding("access", f"{endpoint} does not respond ({one_line(result)})", "note", FIX)
    if result >= 400:
        return Finding("access", f"{endpoint} responds with status {result}", "note", FIX)
    return Finding("access", f"{endpoint} responds")

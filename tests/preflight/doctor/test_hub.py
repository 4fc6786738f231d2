"""The Hub: offline, responding, silent, refusing; and a token that is never shown."""

import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from huggingface_hub import constants

from mpo.preflight.machine import hub


@pytest.fixture
def online(monkeypatch):
    """Sets the endpoint and disables offline mode."""

    def at(endpoint):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)

    return at


@pytest.fixture
def server():
    """A Hub that responds to HEAD requests and records them."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            requests.append(self.command)
            self.send_response(self.server.status)
            self.end_headers()

        def log_message(self, *args):
            pass

    here = HTTPServer(("127.0.0.1", 0), Handler)
    here.status, here.requests = 200, requests
    threading.Thread(target=here.serve_forever, daemon=True).start()
    yield here
    here.shutdown()
    here.server_close()


def found():
    return {finding.name: finding for finding in hub()}


def test_offline_is_said_and_is_no_error(monkeypatch, online, server):
    online(f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    access = found()["access"]
    assert access.status == "ok" and "HF_HUB_OFFLINE" in access.value and server.requests == []


def test_a_hub_that_answers(online, server):
    online(f"http://127.0.0.1:{server.server_port}")
    access = found()["access"]
    assert access.status == "ok" and access.value.endswith("responds") and server.requests == ["HEAD"]


def test_a_hub_that_refuses(online, server):
    server.status = 403
    online(f"http://127.0.0.1:{server.server_port}")
    access = found()["access"]
    assert access.status == "note" and "status 403" in access.value and "HF_ENDPOINT" in access.fix


def test_a_hub_that_is_not_there_or_says_nothing(online):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        online(f"http://127.0.0.1:{silent.getsockname()[1]}")
        access = found()["access"]
        assert access.status == "note" and "does not respond (" in access.value and "Timeout" in access.value
    access = found()["access"]  # the port is closed now
    assert access.status == "note" and "ConnectError" in access.value


def test_a_token_is_told_of_and_not_told(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnopqrstuvwxyz")
    token = found()["token"]
    assert token.value == "set" and "hf_" not in str(found())

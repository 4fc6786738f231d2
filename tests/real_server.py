"""`transformers serve`, started by the tests that need a real server."""

import socket
import subprocess
import tempfile
import time
import urllib.request
from contextlib import contextmanager

import pytest


@contextmanager
def transformers_serve(folder, python, *, seconds=180):
    """Yield the address of `transformers serve` with the model in `folder`; skip, with the reason, if `python` cannot start it."""
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    words = ["-m", "transformers.cli.transformers", "serve", str(folder), "--device", "cpu", "--port", str(port)]
    with tempfile.TemporaryFile("w+") as said, subprocess.Popen([python, *words], stdout=said, stderr=said) as process:
        try:
            for _ in range(seconds):
                try:
                    urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5)
                    break
                except OSError:
                    if process.poll() is not None:
                        said.seek(0)
                        pytest.skip(f"transformers serve has ended: {said.read()[-500:]}")
                    time.sleep(1)
            else:
                pytest.skip(f"transformers serve has not started in {seconds} s")
            yield f"http://localhost:{port}/v1"
        finally:
            process.terminate()

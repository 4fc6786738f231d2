"""Measure what a request to a server costs the client: CPU time and rate, with JPEG images of 448 x 448, against a stub.

    python benchmarks/generation.py --requests 2000

The stub runs in another process. Prints JSON: CPU milliseconds per request, requests per second of wall time and of CPU time, the
bytes of an image, and the peak memory in MB.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from mpo.generation.generator import GenerationError, Request
from mpo.generation.server import ServerGenerator

STUB = Path(__file__).parents[1] / "tests" / "stub_server.py"


def images(folder: Path, count: int) -> list[Path]:
    """Write smooth images, whose size is that of photographs."""
    rng = np.random.default_rng(0)
    paths = []
    for number in range(count):
        small = Image.fromarray(rng.integers(0, 256, (56, 56, 3), dtype=np.uint8))
        paths.append(folder / f"{number}.jpg")
        small.resize((448, 448), Image.Resampling.BICUBIC).save(paths[-1], quality=90)
    return paths


async def measure(url: str, paths: list[Path], count: int, concurrency: int) -> dict[str, float]:
    """Ask `count` requests, and measure."""
    generator = ServerGenerator(url, concurrency=concurrency)
    requests = (Request.ask(f"What is in image {number}?", images=[paths[number % len(paths)]]) for number in range(count))
    answered = failed = 0
    wall = cpu = 0.0
    async for _, _, response in generator.stream(requests, max_new_tokens=64):
        if not answered:  # imports and the connection come first
            wall, cpu = time.perf_counter(), time.process_time()
        answered += 1
        failed += isinstance(response, GenerationError)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {
        "requests": answered,
        "failed": failed,
        "cpu_ms_per_request": 1000 * cpu / answered,
        "requests_per_cpu_second": answered / cpu,
        "requests_per_second": answered / wall,
        "image_bytes": sum(path.stat().st_size for path in paths) / len(paths),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    """Start the stub and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--concurrency", type=int, default=32)
    args = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen([sys.executable, STUB], stdout=subprocess.PIPE, text=True) as stub,
    ):
        try:
            assert stub.stdout is not None
            url = stub.stdout.readline().strip()
            print(json.dumps(asyncio.run(measure(url, images(Path(folder), 50), args.requests, args.concurrency)), indent=2))
        finally:
            stub.terminate()


if __name__ == "__main__":
    main()

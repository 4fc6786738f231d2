"""Measure an MMFuser of width 1024, forward and backward: its time over that of its parts alone, and the memory of sampled values.

    python benchmarks/fuser_block.py                  # a few minutes of one thread; JSON into results/
    python benchmarks/fuser_block.py --device cuda    # seconds; benchmarks/gpu.py has it as a step

The parts are its linear layers and `grid_sample` on the same shapes, without anything between them; goal: 1.5 times their time.
Both sides take turns, and the CPU's seconds are those of the process, not of the clock. Memory: the largest sum of sampled values
that exist at a time, with the chunks of mpo.models.mmfuser and without.
"""

import argparse
import json
import os
import platform
import statistics
import time
import weakref
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402 (the environment comes first)
from torch import nn  # noqa: E402

from mpo.io import write_text  # noqa: E402
from mpo.models import mmfuser  # noqa: E402

RESULTS = Path(__file__).parent / "results"


def parts_alone(fuser: mmfuser.MMFuser, tiles: int, side: int) -> Callable[[], None]:
    """Forward and backward of the linear layers and of `grid_sample` alone, on the shapes of both attentions."""
    device, width = fuser.gamma1.device, fuser.width
    calls: list[tuple[Callable[..., torch.Tensor], list[torch.Tensor]]] = []

    def tensor(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, device=device, requires_grad=True)

    for attention in (fuser.cross_attn, fuser.self_attn):
        heads, levels, points = attention.num_heads, attention.num_levels, attention.num_points
        for linear in (attention.sampling_offsets, attention.attention_weights, attention.output_proj):
            calls.append((linear, [tensor(tiles, side * side, width)]))
        calls.append((attention.value_proj, [tensor(tiles, levels * side * side, width)]))
        for _ in range(levels):
            maps, places = tensor(tiles * heads, width // heads, side, side), tensor(tiles * heads, points, side * side, 2)
            calls.append(
                (lambda maps, places: nn.functional.grid_sample(maps, 2 * places - 1, align_corners=False), [maps, places])
            )

    def run() -> None:
        for call, inputs in calls:
            output = call(*inputs)
            output.backward(torch.ones((), device=device).expand_as(output))  # type: ignore[no-untyped-call]

    return run


def whole(fuser: mmfuser.MMFuser, tiles: int, side: int) -> Callable[[], None]:
    """Forward and backward of the block."""
    features = [torch.rand(tiles, side * side, fuser.width, device=fuser.gamma1.device) for _ in range(fuser.num_levels + 1)]
    features = [feature.requires_grad_() for feature in features]

    def run() -> None:
        fuser(features, (side, side)).sum().backward()

    return run


def seconds(run: Callable[[], None], device: str) -> float:
    """Of the process on a CPU, of the device on a GPU."""
    if device == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def sampled_bytes(run: Callable[[], None]) -> int:
    """The largest sum of the outputs of `grid_sample` that exist at a time, in a forward and a backward pass."""
    alive = largest = 0
    sample = nn.functional.grid_sample

    def counted(*inputs: Any, **settings: Any) -> torch.Tensor:
        nonlocal alive, largest
        output = sample(*inputs, **settings)
        storage, size = output.untyped_storage(), output.nbytes
        alive += size
        largest = max(largest, alive)

        def gone() -> None:
            nonlocal alive
            alive -= size

        weakref.finalize(storage, gone)
        return output

    nn.functional.grid_sample = counted
    try:
        run()
    finally:
        nn.functional.grid_sample = sample
    return largest


def measure(
    device: str, *, tiles: int, sides: tuple[int, ...] = (24, 32), rounds: int = 5, width: int = 1024
) -> list[dict[str, Any]]:
    """Times and memory for each size of the grid (24: CLIP ViT-L/14-336; 32: a tile of InternVL)."""
    found = []
    for side in sides:
        torch.manual_seed(0)
        fuser = mmfuser.MMFuser(width).to(device)
        nn.init.ones_(fuser.gamma1)
        block, alone = whole(fuser, tiles, side), parts_alone(fuser, tiles, side)
        times = [(seconds(block, device), seconds(alone, device)) for _ in range(rounds + 1)][1:]
        chunk, memory = mmfuser.CHUNK, {}
        for name, size in (("chunks", chunk), ("without", 2**60)):
            mmfuser.CHUNK = size
            memory[name] = sampled_bytes(block) / 1e6
        mmfuser.CHUNK = chunk
        block_s, parts_s = (statistics.median(side) for side in zip(*times, strict=True))
        ratios = [one / other for one, other in times]
        found.append({"grid": side, "tiles": tiles, "block_s": block_s, "parts_s": parts_s, "ratio": statistics.median(ratios)})
        found[-1] |= {"ratios": ratios, "sampled_mb": memory}
    return found


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", metavar="DEVICE", help="device (default: %(default)s)")
    parser.add_argument("--tiles", type=int, default=2, metavar="N", help="images or tiles in a batch (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file (default: results/fuser_block_DEVICE_DATE.json here)")
    options = parser.parse_args()
    found = measure(options.device, tiles=options.tiles)
    about = {
        "date": date.today().isoformat(),
        "device": f"{options.device}, {platform.machine()}",
        "threads": torch.get_num_threads(),
    }
    result = {**about, "versions": {name: version(name) for name in ("torch", "mpo-trainer")}, "cases": found}
    output = options.output or RESULTS / f"fuser_block_{options.device}_{about['date']}.json"
    write_text(output, json.dumps(result, indent=1) + "\n")
    for case in found:
        memory = case["sampled_mb"]
        print(
            f"{case['tiles']} x {case['grid']} x {case['grid']}: {case['block_s']:.3f} s, parts alone {case['parts_s']:.3f} s, "
            f"ratio {case['ratio']:.2f}; sampled values {memory['chunks']:.0f} MB, without chunks {memory['without']:.0f} MB"
        )
    print(f"written to {output}")


if __name__ == "__main__":
    main()

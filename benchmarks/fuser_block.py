"""Measure an MMFuser of width 1024, forward and backward: its time over that of its parts alone, and its memory.

    python benchmarks/fuser_block.py                  # a few minutes of one thread; JSON into results/
    python benchmarks/fuser_block.py --device cuda    # seconds; benchmarks/gpu.py has it as a step

The parts are its linear layers and `grid_sample` on the same shapes, without anything between them; goal: 1.5 times their time.
Both sides take turns, and the CPU's seconds are those of the process, not of the clock. Memory: the largest sum of the sizes of
tensors that the attention over shallow layers makes and that exist at a time, in a forward pass without gradients and in a forward
and a backward pass, for more and larger tiles, with the chunks of mpo.models.mmfuser and without. Sampled values are never stored;
the size that they would have is given beside it.
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
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from mpo.io import write_text  # noqa: E402
from mpo.models import mmfuser  # noqa: E402

RESULTS = Path(__file__).parent / "results"
MEMORY = ((1, 32), (2, 32), (4, 32), (8, 32), (1, 48), (1, 64))
"""Tiles and sides of their grids whose memory is measured."""


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


class Alive(TorchDispatchMode):
    """The largest sum of the sizes of tensors that are made and exist at a time, in bytes."""

    now = largest = 0

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and (key := id(storage := tensor.untyped_storage())) not in self.known:
                self.known.add(key)
                self.now += (size := storage.nbytes())
                self.largest = max(self.largest, self.now)
                weakref.finalize(storage, self._gone, key, size)
        return made

    def _gone(self, key: int, size: int) -> None:
        self.known.remove(key)
        self.now -= size


def made_mb(attention: mmfuser.DeformableAttention, tiles: int, side: int, *, training: bool) -> float:
    """What the attention makes at a time, without its inputs: in a forward pass, or in a forward and a backward pass."""
    device, width = attention.value_proj.weight.device, attention.value_proj.in_features
    query, values = (torch.rand(tiles, count * side * side, width, device=device) for count in (1, attention.num_levels))
    for parameter in attention.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with torch.set_grad_enabled(training), Alive() as alive:
        output = attention(query, values, (side, side))
        if training:
            output.sum().backward()
    return alive.largest / 1e6


def memory(device: str, cases: tuple[tuple[int, int], ...] = MEMORY, width: int = 1024) -> list[dict[str, Any]]:
    """Memory for each number of tiles and size of their grid."""
    attention, chunk, found = mmfuser.MMFuser(width).cross_attn.to(device), mmfuser.CHUNK, []
    for tiles, side in cases:
        sampled = tiles * side * side * attention.num_levels * attention.num_points * width * 4 / 1e6
        found.append({"tiles": tiles, "grid": side, "sampled_values_mb": sampled})
        for name, size in (("chunks", chunk), ("without_chunks", 2**60)):
            mmfuser.CHUNK = size
            made = {kind: made_mb(attention, tiles, side, training=kind == "training") for kind in ("forward", "training")}
            found[-1][f"{name}_mb"] = made
        mmfuser.CHUNK = chunk
    return found


def measure(
    device: str, *, tiles: int, sides: tuple[int, ...] = (24, 32), rounds: int = 5, width: int = 1024
) -> list[dict[str, Any]]:
    """Times for each size of the grid (24: CLIP ViT-L/14-336; 32: a tile of InternVL)."""
    found = []
    for side in sides:
        torch.manual_seed(0)
        fuser = mmfuser.MMFuser(width).to(device)
        nn.init.ones_(fuser.gamma1)
        block, alone = whole(fuser, tiles, side), parts_alone(fuser, tiles, side)
        times = [(seconds(block, device), seconds(alone, device)) for _ in range(rounds + 1)][1:]
        block_s, parts_s = (statistics.median(side) for side in zip(*times, strict=True))
        ratios = [one / other for one, other in times]
        found.append({"grid": side, "tiles": tiles, "block_s": block_s, "parts_s": parts_s, "ratio": statistics.median(ratios)})
        found[-1]["ratios"] = ratios
    return found


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", metavar="DEVICE", help="device (default: %(default)s)")
    parser.add_argument("--tiles", type=int, default=2, metavar="N", help="images or tiles in a batch (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file (default: results/fuser_block_DEVICE_DATE.json here)")
    options = parser.parse_args()
    found, held = measure(options.device, tiles=options.tiles), memory(options.device)
    about = {
        "date": date.today().isoformat(),
        "device": f"{options.device}, {platform.machine()}",
        "threads": torch.get_num_threads(),
    }
    result = {**about, "versions": {name: version(name) for name in ("torch", "mpo-trainer")}, "cases": found, "memory": held}
    output = options.output or RESULTS / f"fuser_block_{options.device}_{about['date']}.json"
    write_text(output, json.dumps(result, indent=1) + "\n")
    for case in found:
        print(
            f"{case['tiles']} x {case['grid']} x {case['grid']}: {case['block_s']:.3f} s, parts alone {case['parts_s']:.3f} s, "
            f"ratio {case['ratio']:.2f}"
        )
    for case in held:
        made = [case[f"{name}_mb"][kind] for kind in ("forward", "training") for name in ("chunks", "without_chunks")]
        print(
            f"{case['tiles']} x {case['grid']} x {case['grid']}: makes {made[0]:.0f} MB forward ({made[1]:.0f} without chunks), "
            f"{made[2]:.0f} MB forward and backward ({made[3]:.0f}); sampled values would be {case['sampled_values_mb']:.0f} MB"
        )
    print(f"written to {output}")


if __name__ == "__main__":
    main()

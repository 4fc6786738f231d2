"""See where an MMFuser looks: its sampling locations, its attention by layer, and what it adds to the tower's features."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mpo.figure import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Looks:
    """What a fuser does with one tile; places are fractions of its width and height, from the left and the top."""

    layers: list[int]  # hidden states of the tower that are sampled, shallow to deep
    grid: tuple[int, int]  # rows and columns of patches
    points: Tensor  # shape (points, 2): x and y of the queries, centres of patches
    locations: Tensor  # shape (points, heads, levels, samples, 2): x and y; some lie outside of the tile and see zeros
    weights: Tensor  # shape (points, heads, levels, samples); the sum of a head's is 1
    attention: Tensor  # shape (levels,): mean attention by level, over all patches and heads; the sum is 1
    added: Tensor  # shape (rows, columns): norm of what is added to a patch's feature
    query: Tensor  # shape (rows, columns): norm of that feature

    def numbers(self) -> dict[str, Any]:
        """For JSON: all but single samples, with the mean norms."""
        return {
            "layers": self.layers,
            "grid": list(self.grid),
            "points": self.points.tolist(),
            "attention": dict(zip(map(str, self.layers), self.attention.tolist(), strict=True)),
            "attention_of_points": self.weights.sum(-1).mean(1).tolist(),
            "added": self.added.tolist(),
            "mean_added": self.added.mean().item(),
            "mean_query": self.query.mean().item(),
        }


@torch.no_grad()
def look(model: Any, pixels: Tensor, points: int | Sequence[Sequence[float]] = 3) -> Looks:
    """Run a model's tower and fuser on one tile, and note where the fuser looks.

    Args:
        model: an `InternVLWithFuser` or `LlavaWithFuser`, or a wrapped one.
        pixels: shape (3, height, width), normalized as for the tower.
        points: (x, y) of each point to look from, fractions of the tile's width and height; or N, for a grid of N x N points.

    Raises:
        ValueError: for a model without an MMFuser, and points outside of the tile.
    """
    holder = next(
        (module for module in model.modules() if hasattr(module, "fuser") and hasattr(module, "get_image_features")), None
    )
    if holder is None:
        kind, fusion = getattr(model.config, "model_type", type(model).__name__), getattr(model.config, "fusion", None)
        why = f"fuses layers by {fusion}, which looks nowhere" if fusion else "has no fuser"
        raise ValueError(f"Expected a model with an MMFuser; this {kind} {why}. mpo.models.add_fuser adds one to a model without.")
    places = _grid(points) if isinstance(points, int) else _points(points)
    seen: list[Any] = []
    hook = holder.fuser.register_forward_hook(lambda module, args, output: seen.extend((args, output)))
    try:
        weight = holder.fuser.gamma1
        holder.get_image_features(pixels.unsqueeze(0).to(weight.device, weight.dtype), return_dict=True)
    finally:
        hook.remove()
    (features, grid), output = seen
    locations, weights = holder.fuser.cross_attn.where(holder.fuser.cross_attention(features, grid)[0], grid)
    size = torch.tensor([grid[1], grid[0]])
    patches = torch.minimum((places * size).long(), size - 1)
    chosen = (patches[:, 1] * grid[1] + patches[:, 0]).to(locations.device)
    return Looks(
        layers=list(holder.config.fuser_layers[:-1]),
        grid=grid,
        points=(patches + 0.5) / size,
        locations=locations[0, chosen].float().cpu(),
        weights=weights[0, chosen].float().cpu(),
        attention=weights[0].float().sum(-1).mean((0, 1)).cpu(),
        added=(output - features[-1])[0].float().norm(dim=-1).view(grid).cpu(),
        query=features[-1][0].float().norm(dim=-1).view(grid).cpu(),
    )


def _grid(count: int) -> Tensor:
    if isinstance(count, bool) or count < 1:
        raise ValueError(f"Expected points to be 1 or more in each direction; got {count}.")
    line = (torch.arange(count) + 0.5) / count
    return torch.cartesian_prod(line, line).flip(-1)


def _points(points: Sequence[Sequence[float]]) -> Tensor:
    found = torch.as_tensor(points, dtype=torch.float32)
    if found.dim() != 2 or found.shape[1] != 2 or not len(found) or not ((found >= 0) & (found <= 1)).all():
        raise ValueError(f"Expected points to be (x, y), fractions of the tile's width and height from 0 to 1; got {points!r}.")
    return found


def tile_of(image: Any, processor: Any, tile: int | None = None) -> tuple[Tensor, Tensor]:
    """One tile of an image (PIL or array), as the tower gets it and as it looks.

    `tile`: its number, from 0; None for the last one, which shows the whole image if the processor adds a thumbnail. Returns
    normalized pixels, shape (3, height, width), and the same from 0 to 1, shape (height, width, 3).
    """
    images = processor.image_processor
    pixels = images(images=image, return_tensors="pt")["pixel_values"].flatten(0, -4)
    if tile is not None and not 0 <= tile < len(pixels):
        raise ValueError(f"Expected the tile to be 0 to {len(pixels) - 1} for this image; got {tile}.")
    chosen = pixels[-1 if tile is None else tile]
    mean, deviation = (torch.tensor(getattr(images, name)).view(3, 1, 1) for name in ("image_mean", "image_std"))
    return chosen, (chosen * deviation + mean).clamp(0, 1).permute(1, 2, 0)


def show(
    model: Any, image: Any, processor: Any, *, points: int | Sequence[Sequence[float]] = 3, tile: int | None = None
) -> "Figure":
    """Draw where a model's MMFuser looks in an image; in a notebook, the value of a cell is shown.

    `points` as in `look`, `image` and `tile` as in `tile_of`; raises ValueError as these do, and when matplotlib is not installed.
    """
    pixels, visible = tile_of(image, processor, tile)
    return draw(look(model, pixels, points), visible)


def draw(looks: Looks, image: Tensor) -> "Figure":
    """Draw one panel per sampled layer, mean attention by layer, and the norm of what is added.

    `image` is the tile, shape (height, width, 3), from 0 to 1.
    """
    levels = len(looks.layers)
    figure = new_figure(3.2 * max(levels, 2), 6.6)
    upper, lower = figure.subfigures(2, 1)  # type: ignore[misc]  # an array
    colours = [f"C{place % 10}" for place in range(len(looks.points))]
    for place, axes in enumerate(upper.subplots(1, levels, squeeze=False)[0]):
        axes.imshow(image, extent=(0, 1, 1, 0), aspect=image.shape[0] / image.shape[1])
        for point, locations, weights, colour in zip(looks.points, looks.locations, looks.weights, colours, strict=True):
            x, y = locations[:, place].reshape(-1, 2).T
            shares = weights[:, place].flatten() * weights[0].numel()  # 1: as much as each gets where all get the same
            axes.scatter(x, y, s=14 * shares, color=colour, alpha=0.6, linewidths=0)
            axes.plot(*point, "+", color="white", markersize=11, markeredgewidth=3)
            axes.plot(*point, "+", color=colour, markersize=9)
        axes.set(title=f"hidden state {looks.layers[place]}", xlim=(0, 1), ylim=(1, 0), xticks=(), yticks=())
    bars, map_ = lower.subplots(1, 2)
    bars.bar([str(layer) for layer in looks.layers], looks.attention)
    bars.set(title="mean attention", xlabel="hidden state", ylabel="share")
    drawn = map_.imshow(looks.added, extent=(0, 1, 1, 0), aspect=image.shape[0] / image.shape[1])
    map_.set(title=f"norm added, mean {looks.added.mean():.2g} to {looks.query.mean():.2g}", xticks=(), yticks=())
    lower.colorbar(drawn, ax=map_)
    return figure

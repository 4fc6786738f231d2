"""MMFuser (arXiv 2410.11829): deep features of a vision tower query its shallow ones by deformable attention (arXiv 2010.04159).

In PyTorch alone, with the official names of modules and parameters. Sampling is in float32, a chunk at a time, by `embedding_bag`.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial, reduce
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init

from mpo.models.looking import show
from mpo.models.strict import misfits

__all__ = ["CHUNK", "DeformableAttention", "MMFuser", "show"]

CHUNK = 2**20
"""Number of patches that are looked up at a time, those of a tile of 32 x 32 in the published models: 4 MiB of their numbers and as
much of their shares. The sampling holds a few times as much."""


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention between maps of one size (arXiv 2010.04159, equation 3).

    Args:
        width: channels of queries and values; a multiple of `num_heads`.
        num_levels: number of maps that every query samples.
        num_heads: attention heads.
        num_points: points that a query samples on each map with each head.
    """

    def __init__(self, width: int, num_levels: int, num_heads: int, num_points: int) -> None:
        super().__init__()
        check_sizes(width=width, num_levels=num_levels, num_heads=num_heads, num_points=num_points)
        self.num_levels, self.num_heads, self.num_points = num_levels, num_heads, num_points
        self.sampling_offsets = nn.Linear(width, num_heads * num_levels * num_points * 2)
        self.attention_weights = nn.Linear(width, num_heads * num_levels * num_points)
        self.value_proj = nn.Linear(width, width)
        self.output_proj = nn.Linear(width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize as Deformable-DETR: head h looks in the direction 2 pi h / heads, point p at a distance of p + 1 patches."""
        for linear in (self.sampling_offsets, self.attention_weights):
            init.zeros_(linear.weight)
        for linear in (self.value_proj, self.output_proj):
            init.xavier_uniform_(linear.weight)
        for linear in (self.attention_weights, self.value_proj, self.output_proj):
            init.zeros_(linear.bias)
        bias = self.sampling_offsets.bias
        angle = torch.arange(self.num_heads, device=bias.device, dtype=torch.float32) * (2 * math.pi / self.num_heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
        direction = direction / direction.abs().amax(dim=-1, keepdim=True)
        distance = torch.arange(1, self.num_points + 1, device=bias.device, dtype=torch.float32)
        offsets = (direction[:, None, None] * distance[:, None]).expand(-1, self.num_levels, -1, -1)
        init.copy_(bias, offsets.reshape(-1).to(bias.dtype))

    def where(self, query: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Where each query looks, and how much it weighs what it sees; arguments as of `forward`.

        Returns:
            locations, shape (batch, queries, heads, levels, points, 2): x and y, in [0, 1] inside of the map; and weights, shape
            (batch, queries, heads, levels, points), whose sum over levels and points is 1. Both at least float32.
        """
        height, width = grid
        shape = (*query.shape[:2], self.num_heads, self.num_levels, self.num_points)
        dtype = torch.promote_types(query.dtype, torch.float32)
        offsets = self.sampling_offsets(query).to(dtype).view(*shape, 2)
        size = torch.tensor([width, height], device=query.device, dtype=offsets.dtype)
        # In the official order of operations: new offsets are whole patches, where rounding decides which side's slope counts.
        rows, columns = ((torch.arange(count, device=query.device, dtype=offsets.dtype) + 0.5) / count for count in grid)
        centres = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1).view(-1, 1, 1, 1, 2)
        weights = self.attention_weights(query).to(dtype).view(*shape[:3], -1).softmax(dim=-1).view(shape)
        return centres + offsets / size, weights

    def forward(self, query: Tensor, values: Tensor, grid: tuple[int, int]) -> Tensor:
        """Attend.

        Args:
            query: shape (batch, height * width of the grid, channels).
            values: shape (batch, levels * height * width, channels): the maps, one after the other.
            grid: height and width of the maps, in patches.

        Returns:
            the shape of `query`, in the dtype of the weights.
        """
        (batch, queries, _), per_query = query.shape, 4 * self.num_heads * self.num_levels * self.num_points
        if not batch:
            return self.output_proj(query)  # type: ignore[no-any-return]
        maps, (locations, weights) = self.value_proj(values), self.where(query, grid)
        rows = max(1, CHUNK // (queries * per_query))
        columns = min(queries, max(1, CHUNK // (rows * per_query)))
        recompute = torch.is_grad_enabled() and any(given.requires_grad for given in (maps, locations, weights))
        how = partial(checkpoint, _sample, use_reentrant=False, preserve_rng_state=False) if recompute else _sample
        found = []
        for one, places, shares in zip(maps.split(rows), locations.split(rows), weights.split(rows), strict=True):  # type: ignore[no-untyped-call]
            chunks = zip(places.split(columns, dim=1), shares.split(columns, dim=1), strict=True)
            found.append(torch.cat([how(one, *chunk, grid) for chunk in chunks], dim=1))
        return self.output_proj(torch.cat(found).to(self.output_proj.weight.dtype))  # type: ignore[no-any-return]


def _sample(values: Tensor, locations: Tensor, weights: Tensor, grid: tuple[int, int]) -> Tensor:
    """The weighted sums of what the locations see; bilinear as `grid_sample`, with zeros outside of the map.

    Every location is between four patches, whose vectors `embedding_bag` looks up and sums: no sampled value is stored. Locations
    and weights are those of some of the queries; the result has shape (batch, queries, channels) and the dtype of the locations.
    """
    (batch, queries, heads, levels, _, _), (height, width) = locations.shape, grid
    channels, device = values.shape[-1], values.device

    def numbers(count: int, *dims: int) -> Tensor:
        return torch.arange(count, device=device, dtype=torch.int32).view(-1, *dims)

    size = torch.tensor([width, height], device=device, dtype=locations.dtype)
    places = ((2 * locations - 1 + 1) * size - 1) / 2  # in patches, rounded as in grid_sample: see `where`
    low = places.detach().floor()
    above, corners = places - low, torch.stack([low, low + 1], dim=-1)
    inside = (corners >= 0) & (corners < size.unsqueeze(-1))
    across, down = (torch.stack([1 - above, above], dim=-1) * inside).unbind(dim=-2)
    column, row = corners.where(inside, 0).int().unbind(dim=-2)  # also of what is not finite
    shares = (weights.unsqueeze(-1) * down).unsqueeze(-1) * across.unsqueeze(-2)
    maps = numbers(batch, 1, 1, 1, 1, 1) * levels + numbers(levels, 1, 1)  # a head's part of a patch is a line of the table
    lines = ((maps * height + row) * width).unsqueeze(-1) + column.unsqueeze(-2)
    lines = lines * heads + numbers(heads, 1, 1, 1, 1)
    table, bags = values.to(shares.dtype).reshape(-1, channels // heads), (batch * queries * heads, -1)
    found = nn.functional.embedding_bag(lines.view(bags), table, mode="sum", per_sample_weights=shares.view(bags))
    return found.view(batch, queries, channels)


class MMFuser(nn.Module):
    """Add to deep features what they find in shallow ones: query + gamma1 * (C + gamma2 * S) (arXiv 2410.11829, section 3).

    C is the deformable attention of the query over the shallow features, S that of C over itself. gamma1 and gamma2 start at 0: the
    output is the query, and the first step changes gamma1 alone.

    Args:
        width: channels of the vision tower; a multiple of `num_heads`.
        num_levels: number of shallow features.
        num_heads: attention heads; 16 in the published models.
        num_points: sampled points per head and level; 4 in the published models.
    """

    def __init__(self, width: int, *, num_levels: int = 4, num_heads: int = 16, num_points: int = 4) -> None:
        super().__init__()
        self.width, self.num_levels = width, num_levels
        self.cross_attn = DeformableAttention(width, num_levels, num_heads, num_points)
        self.self_attn = DeformableAttention(width, 1, num_heads, num_points)
        self.query_norm, self.feat_norm, self.norm1 = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.gamma1, self.gamma2 = (nn.Parameter(torch.zeros(width)) for _ in range(2))

    def reset_parameters(self) -> None:
        """Initialize all parameters; after it the output is the query."""
        self.cross_attn.reset_parameters()
        self.self_attn.reset_parameters()
        for norm in (self.query_norm, self.feat_norm, self.norm1):
            init.ones_(norm.weight)
            init.zeros_(norm.bias)
        init.zeros_(self.gamma1)
        init.zeros_(self.gamma2)

    def cross_attention(self, features: Sequence[Tensor], grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The normalized query and shallow features, which `cross_attn` gets; arguments and errors as of `forward`."""
        if len(features) != self.num_levels + 1:
            raise ValueError(f"Expected {self.num_levels} shallow features and the query; got {len(features)} features.")
        if not isinstance(grid, Sequence) or len(grid) != 2 or not all(is_whole(side) and side > 0 for side in grid):
            raise ValueError(f"Expected grid to be (height, width) in patches; got grid={grid}.")
        if others := [type(feature).__name__ for feature in features if not isinstance(feature, Tensor)]:
            raise ValueError(f"Expected features to be tensors; got {', '.join(others)}.")
        (height, width), batch = grid, len(features[-1]) if features[-1].dim() else 0
        expected = (batch, height * width, self.width)
        for place, feature in enumerate(features):
            if feature.shape != expected:
                raise ValueError(
                    f"Expected features of shape ({batch}, {height} * {width}, {self.width}), by query, grid and width; got "
                    f"{tuple(feature.shape)} for feature {place}. Leave out class tokens."
                )
            if feature.dtype != self.gamma1.dtype and not torch.is_autocast_enabled(feature.device.type):
                raise ValueError(
                    f"Expected features in {self.gamma1.dtype}, as the fuser's weights; got {feature.dtype} for feature {place}. "
                    "Convert one of them, or use torch.autocast."
                )
        return self.query_norm(features[-1]), self.feat_norm(torch.cat(list(features[:-1]), dim=1))

    def forward(self, features: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
        """Fuse.

        Args:
            features: `num_levels` + 1 tensors, each of shape (batch, height * width, channels) without class token, shallow to
                deep; the last one is the query.
            grid: height and width, in patches.

        Returns:
            shape and dtype of the query.

        Raises:
            ValueError: for another number of features, a grid that does not fit them, and another dtype than that of the weights.
        """
        found = self.cross_attn(*self.cross_attention(features, grid), grid)
        normed = self.norm1(found)
        found = found + self.gamma2 * self.self_attn(normed, normed, grid)
        query = features[-1]
        return query + (self.gamma1 * found).to(query.dtype)  # type: ignore[no-any-return]

    @classmethod
    def from_official(cls, state_dict: Mapping[str, Tensor], *, num_heads: int = 16) -> "MMFuser":
        """Build the block from official weights, in their dtype.

        Args:
            state_dict: of the official `MSCrossAttnBlock`, or of a projector or a whole LLaVA that has one; other tensors are
                ignored.
            num_heads: attention heads, which tensors do not tell; all published models have 16.

        Raises:
            ValueError: for no such block, several ones, tensors that are not its own, and heads that do not divide them.
        """
        check_sizes(num_heads=num_heads)
        sign = "cross_attn.value_proj.weight"
        prefixes = [name.removesuffix(sign) for name in state_dict if f".{name}".endswith(f".{sign}")]
        if len(prefixes) != 1:
            found = ", ".join(prefixes) or "none"
            raise ValueError(f"Expected the weights of one MMFuser, with a {sign}; found {len(prefixes)} ({found}).")
        own = {name.removeprefix(prefixes[0]): tensor for name, tensor in state_dict.items() if name.startswith(prefixes[0])}
        shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
        width, cross, alone = (
            (*shapes.get(name, ()), 0)[0] for name in (sign, *(f"{kind}_attn.attention_weights.bias" for kind in ("cross", "self")))
        )
        if not (width and cross and alone) or cross % alone or alone % num_heads or width % num_heads:
            raise ValueError(
                f"The MMFuser {prefixes[0] or 'of these weights'} has width {width}, {cross} attention weights over its levels and "
                f"{alone} over itself, which num_heads={num_heads} does not divide. Give its number of heads."
            )
        with torch.device("meta"):
            fuser = cls(width, num_levels=cross // alone, num_heads=num_heads, num_points=alone // num_heads)
        if problems := misfits(shapes, {name: tuple(tensor.shape) for name, tensor in fuser.state_dict().items()}):
            raise ValueError(f"The weights {prefixes[0]} are not those of an MMFuser of width {width}: {problems}.")
        fuser = fuser.to_empty(device=own[sign].device).to(reduce(torch.promote_types, (each.dtype for each in own.values())))
        fuser.load_state_dict(own)
        return fuser


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number, also NumPy's, and no truth value."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_sizes(*, num_heads: Any, **sizes: Any) -> None:
    """Refuse sizes that are no whole numbers above 0, and heads that do not divide the width."""
    for name, size in {**sizes, "num_heads": num_heads}.items():
        if not is_whole(size) or size < 1:
            raise ValueError(f"Expected {name} to be a whole number above 0; got {name}={size!r}.")
    if (width := sizes.get("width", 0)) % num_heads:
        raise ValueError(f"Expected width to be a multiple of num_heads; got width={width}, num_heads={num_heads}.")

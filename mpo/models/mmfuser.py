"""MMFuser (arXiv 2410.11829): deep features of a vision tower query its shallow ones by deformable attention (arXiv 2010.04159).

In PyTorch alone, with the official names of modules and parameters. Sampling is in float32, a chunk at a time.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init

from mpo.models.looking import show
from mpo.models.strict import misfits

__all__ = ["CHUNK", "DeformableAttention", "MMFuser", "show"]

CHUNK = 2**22
"""Number of sampled values in memory at a time, 16 MiB in float32. The sampling holds a few times as much."""


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
        sizes = {"width": width, "num_levels": num_levels, "num_heads": num_heads, "num_points": num_points}
        for name, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"Expected {name} to be a whole number above 0; got {name}={size!r}.")
        if width % num_heads:
            raise ValueError(f"Expected width to be a multiple of num_heads; got width={width}, num_heads={num_heads}.")
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
        """Where each query looks, and how much it weighs what it sees.

        Args:
            query: shape (batch, height * width of the grid, channels).
            grid: height and width of the maps, in patches.

        Returns:
            locations, shape (batch, queries, heads, levels, points, 2): x and y, in [0, 1] inside of the map; and weights, shape
            (batch, queries, heads, levels, points), whose sum over levels and points is 1. Both at least float32.
        """
        height, width = grid
        shape = (*query.shape[:2], self.num_heads, self.num_levels, self.num_points)
        offsets = _at_least_float32(self.sampling_offsets(query)).view(*shape, 2)
        size = torch.tensor([width, height], device=query.device, dtype=offsets.dtype)
        # In the official order of operations: new offsets are whole patches, where rounding decides which side's slope counts.
        rows, columns = ((torch.arange(count, device=query.device, dtype=offsets.dtype) + 0.5) / count for count in grid)
        centres = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1).view(-1, 1, 1, 1, 2)
        weights = _at_least_float32(self.attention_weights(query)).view(*shape[:3], -1).softmax(dim=-1).view(shape)
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
        (batch, queries, channels), (height, width) = query.shape, grid
        if not batch:
            return self.output_proj(query)  # type: ignore[no-any-return]
        values = self.value_proj(values)
        # One head of one image is a row: each head looks by itself.
        values = values.view(batch, self.num_levels, height, width, self.num_heads, -1).permute(0, 4, 1, 5, 2, 3).flatten(0, 1)
        locations, weights = (
            found.permute(0, 2, 3, 4, 1, *range(5, found.dim())).flatten(0, 1) for found in self.where(query, grid)
        )
        per_query = self.num_levels * self.num_points * values.shape[2]
        rows = max(1, CHUNK // (queries * per_query))
        columns = min(queries, max(1, CHUNK // (rows * per_query)))

        def sample(values: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
            with torch.autocast(values.device.type, enabled=False):
                seen, levels = [], zip(values.unbind(1), (2 * locations - 1).unbind(1), weights.unbind(1), strict=True)
                for maps, places, shares in levels:  # transformers' module stacks them, and sums over the last dimension: slower
                    sampled = nn.functional.grid_sample(maps.to(places.dtype), places, align_corners=False)
                    seen.append((sampled * shares.unsqueeze(1)).sum(dim=2))
                return torch.stack(seen).sum(dim=0)  # (rows, channels, queries)

        recompute = torch.is_grad_enabled() and any(given.requires_grad for given in (values, locations, weights))
        how = partial(checkpoint, sample, use_reentrant=False, preserve_rng_state=False) if recompute else sample
        found = []
        for maps, places, shares in zip(values.split(rows), locations.split(rows), weights.split(rows), strict=True):  # type: ignore[no-untyped-call]
            chunks = zip(places.split(columns, dim=3), shares.split(columns, dim=3), strict=True)
            found.append(torch.cat([how(maps, *chunk) for chunk in chunks], dim=2))
        heads = torch.cat(found).view(batch, channels, queries).transpose(1, 2)
        return self.output_proj(heads.to(self.output_proj.weight.dtype))  # type: ignore[no-any-return]


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
        if not isinstance(grid, Sequence) or len(grid) != 2 or not all(isinstance(side, int) and side > 0 for side in grid):
            raise ValueError(f"Expected grid to be (height, width) in patches; got grid={grid}.")
        (height, width), (batch, *_) = grid, features[-1].shape
        expected = (batch, height * width, self.width)
        for place, feature in enumerate(features):
            if feature.shape != expected:
                raise ValueError(
                    f"Expected features of shape ({batch}, {height} * {width}, {self.width}), by query, grid and width; got "
                    f"{tuple(feature.shape)} for feature {place}. Leave out class tokens."
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
            ValueError: for another number of features, or a grid that does not fit them.
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
            ValueError: for no such block, several ones, and missing, unexpected or differently shaped tensors, which are listed.
        """
        sign = "cross_attn.value_proj.weight"
        prefixes = [name.removesuffix(sign) for name in state_dict if f".{name}".endswith(f".{sign}")]
        if len(prefixes) != 1:
            found = ", ".join(prefixes) or "none"
            raise ValueError(f"Expected the weights of one MMFuser, with a {sign}; found {len(prefixes)} ({found}).")
        own = {name.removeprefix(prefixes[0]): tensor for name, tensor in state_dict.items() if name.startswith(prefixes[0])}
        if not prefixes[0]:  # a bare block
            own = dict(state_dict)
        shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
        width = shapes[sign][0]
        cross, alone = (shapes.get(f"{kind}_attn.attention_weights.bias", (0,))[0] for kind in ("cross", "self"))
        if num_heads < 1 or not alone or cross % alone or alone % num_heads or width % num_heads:
            raise ValueError(
                f"The MMFuser {prefixes[0] or 'of these weights'} has width {width}, {cross} attention weights over its levels and "
                f"{alone} over itself, which num_heads={num_heads} does not divide. Give its number of heads."
            )
        with torch.device("meta"):
            fuser = cls(width, num_levels=cross // alone, num_heads=num_heads, num_points=alone // num_heads)
        if problems := misfits(shapes, {name: tuple(tensor.shape) for name, tensor in fuser.state_dict().items()}):
            raise ValueError(f"The weights {prefixes[0]} are not those of an MMFuser of width {width}: {problems}.")
        fuser = fuser.to_empty(device=own[sign].device).to(own[sign].dtype)
        fuser.load_state_dict(own)
        return fuser


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))

"""The denoiser of DVT's stage 2: a learned position embedding and transformer blocks behind a ViT's final norm."""

from collections.abc import Mapping
from typing import Any, Optional

import numpy as np
import torch
import torch.fx
from timm.layers import resample_abs_pos_embed_nhwc
from timm.models import register_notrace_module
from torch import nn
from torch.utils.checkpoint import checkpoint

from timm_dvt.architectures import ARCHITECTURES, initialize
from timm_dvt.errors import UserError
from timm_dvt.flat import flat_patches, level

SHUT = -10.0  # the bias of a gate that finds no token blank: its sigmoid is 0.00005
torch.fx.wrap("flat_patches")  # both as `check_filled` below
torch.fx.wrap("level")


@register_notrace_module  # torch.fx cannot follow decisions on a traced size; for it a denoiser is one step
class Denoiser(nn.Module):
    """Predicts clean patch tokens from raw ones: F = blocks(y + PE) (paper, Eq. 11).

    Args:
        dim: channels C of the tokens.
        grid_size: rows and columns of the learned position embedding; other grids get it resampled as timm does.
        depth: number of blocks; the paper uses one.
        num_heads: attention heads of a block; default `C // 64`, or the largest smaller count that divides C.
        pos_embed: False leaves a block's position embedding out: the same as `arch="block-no-pe"`.
        arch: one of `ARCHITECTURES`. "block" is the paper's denoiser; "block-no-pe" the same without position
            embedding (Tab. 6 e); "conv1x1" and "conv3x3" three convolutions of C channels with ReLUs between them,
            zero-padded, with neither position embedding nor a path around them (Tab. 6 b, c); "static" a position
            embedding alone, F = y + PE: for PE = -G, the artifact field subtracted; "project" an affine map of each
            token, F = W y + b: for W = I - U U^T, the directions U of position projected out.
        keep_length: bring each clean token to the length of the raw one. A regression shrinks what it is unsure of, so
            lengths of predictions tell where crops disagreed instead of what stands out. Saved as `keeps_length`.
        pos_embed_out: add a second position embedding to the clean tokens, F = blocks(y + PE) + PE_out: for
            PE_out = -G of its predictions, what still shows of position in them (`timm_dvt.calibrate`, "leftover").
            True for one of `grid_size`, or rows and columns of its own: such a rest can be smooth.
        blank_gate: give the tokens of images without content their mean, (1 - s) F + s mean(y), s the sigmoid of a
            linear map of each raw token, times `alike` of an image that is known (`timm_dvt.flat`). New, it is shut.
        flat_below: how far a flat patch, which is leveled where the images are given (`timm_dvt.flat`), may be from a
            plane, in units of the model's input. A saved denoiser has this key; set to None, it levels none.
    """

    def __init__(
        self,
        dim: int,
        grid_size: tuple[int, int],
        depth: int = 1,
        num_heads: int | None = None,
        pos_embed: bool = True,
        arch: str = "block",
        keep_length: bool = False,
        pos_embed_out: bool | tuple[int, int] = False,
        blank_gate: bool = False,
        flat_below: float | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        num_heads = num_heads or default_num_heads(dim)
        if arch not in ARCHITECTURES:
            raise UserError(f"arch is {arch!r}; it must be one of {', '.join(ARCHITECTURES)}")
        for name, grid in (("grid_size", grid_size), ("pos_embed_out", pos_embed_out)):
            if not isinstance(grid, bool) and (len(grid) != 2 or min(grid) < 1):
                raise UserError(f"{name} is {tuple(grid)}; a position embedding has one row and one column at least")
        if depth < 1:
            raise UserError(f"depth is {depth}; a denoiser has at least one block")
        self.arch = "block-no-pe" if arch == "block" and not pos_embed else arch
        row = ARCHITECTURES[self.arch]
        if depth > 1 and not row.deep:
            raise UserError(f"depth is {depth}; only a denoiser of transformer blocks has several, not {arch!r}")
        if num_heads < 1 or dim % num_heads:
            raise UserError(f"num_heads is {num_heads}, which does not divide the {dim} channels")
        self.on_maps = row.on_maps
        self.dim = dim
        self.num_heads = num_heads
        self.grid_size = self.learned_grid = (int(grid_size[0]), int(grid_size[1]))  # `fix_grid` changes the former
        self.grad_checkpointing = False
        self.calibration: Any = None  # what `timm_dvt.calibrate` found, of one that it made
        self.norm: nn.Module = nn.Identity()  # the backbone's final one, where that is pruned away
        self.pos_embed: nn.Parameter | None = None
        if row.pos_embed:
            self.pos_embed = nn.Parameter(torch.empty(1, self.grid_size[0] * self.grid_size[1], dim, **factory))
        self.blocks = row.build(dim, num_heads, depth, factory)
        self.pos_embed_out: nn.Parameter | None = None
        rows, columns = self.grid_size if isinstance(pos_embed_out, bool) else pos_embed_out
        self.out_grid_size = (int(rows), int(columns))
        if pos_embed_out:
            self.pos_embed_out = nn.Parameter(torch.zeros(1, rows * columns, dim, **factory))
        self.blank_gate = nn.Linear(dim, 1, **factory) if blank_gate else None
        self.keep_length = False
        if keep_length:
            self.start_keeping_length()
        self.register_buffer("flat_below", None)
        if flat_below is not None:
            self.start_leveling(flat_below)
        self.init_weights()

    def start_keeping_length(self) -> None:
        """From now on, bring each clean token to the length of the raw one."""
        self.keep_length = True
        like = next(self.parameters())  # a key in the state dict, by which a saved denoiser is known again
        self.register_buffer("keeps_length", torch.ones((), dtype=like.dtype, device=like.device))

    def start_adding(self, pos_embed_out: torch.Tensor) -> None:
        """From now on, add this position embedding (1, H*W, C) of the own grid to the clean tokens."""
        like = next(self.parameters())
        self.out_grid_size = self.grid_size
        self.pos_embed_out = nn.Parameter(pos_embed_out.to(like), requires_grad=like.requires_grad)

    def start_gating(self, weight: torch.Tensor, bias: float) -> None:
        """From now on, give tokens whose product with `weight` (C,) is above -bias what blank images get."""
        like = next(self.parameters())
        self.blank_gate = nn.Linear(self.dim, 1, device=like.device, dtype=like.dtype)
        with torch.no_grad():
            self.blank_gate.weight.copy_(weight[None])
            self.blank_gate.bias.fill_(bias)
        self.blank_gate.requires_grad_(like.requires_grad)

    def start_leveling(self, flat_below: float) -> None:
        """From now on, give flat patches what those like them have in common."""
        like = next(self.parameters())
        self.flat_below = torch.tensor(flat_below, dtype=like.dtype, device=like.device)
        self._flat_below = flat_below

    def init_weights(self) -> None:
        """New weights; "static" and "project" start as the identity, a gate shut."""
        initialize(self.arch, self.blocks, self.pos_embed)
        if self.blank_gate is not None:
            nn.init.zeros_(self.blank_gate.weight)
            nn.init.constant_(self.blank_gate.bias, SHUT)
        if self.flat_below is not None:
            self.flat_below.fill_(self._flat_below)  # where the module was made on the meta device

    def forward(
        self, x: torch.Tensor, grid_size: tuple[int, int], images: Optional[torch.Tensor] = None
    ) -> torch.Tensor:
        """Denoise patch tokens (B, H*W, C) of a grid (H, W); returns (B, H*W, C).

        Args:
            images: (B, channels, h, w), that the model was given. Without them no flat patches are leveled.

        Raises:
            ValueError: the tokens do not fill the grid.
        """
        check_filled(x, grid_size)
        x = self.norm(x)
        flat: Optional[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = None
        if self.flat_below is not None and images is not None:
            flat = flat_patches(images, grid_size, self.flat_below)
        clean = self._clean(x, grid_size)
        if self.pos_embed_out is not None:
            clean = clean + resample(self.pos_embed_out, self.out_grid_size, grid_size)
        if self.keep_length:
            # In float32: the square of a length can be beyond half precision.
            lengths = [torch.linalg.vector_norm(y.float(), dim=-1, keepdim=True) for y in (x, clean)]
            clean = (clean.float() * (lengths[0] / lengths[1].clamp(min=1e-6))).to(x.dtype)
        if self.blank_gate is not None:
            blank = self.blank_gate(x).float().sigmoid()
            if flat is not None:  # tokens alone take a page of text for blank
                blank = blank * flat[2][:, None, None]
            weights = blank / blank.sum(1, keepdim=True).clamp(min=1e-6)
            mean = (weights * x.float()).sum(1, keepdim=True)
            clean = torch.lerp(clean.float(), mean.expand_as(clean), blank).to(x.dtype)
        if flat is not None:
            clean = level(clean, flat[0], flat[1])
        return clean

    def _clean(self, x: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
        """Clean tokens (B, H*W, C) of normed ones, at the length that they are predicted with."""
        if self.pos_embed is not None:
            x = x + self.position(grid_size)
        if self.on_maps:
            maps = x.transpose(1, 2).reshape(x.shape[0], self.dim, grid_size[0], grid_size[1])
            return self.blocks(maps).flatten(2).transpose(1, 2)
        if torch.jit.is_scripting() or not self.grad_checkpointing:
            return self.blocks(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x

    def position(self, grid_size: tuple[int, int]) -> torch.Tensor:
        """The position embedding (1, H*W, C) for a grid (H, W), resampled bicubically where it is not the own one."""
        assert self.pos_embed is not None
        return resample(self.pos_embed, self.grid_size, grid_size)

    @torch.jit.unused
    def fix_grid(self, grid_size: tuple[int, int]) -> None:
        """Resample the position embeddings to a grid (H, W) for good; at it, nothing is resampled in forward any more.

        For images of one size, and for exporters that cannot resample. Other grids still work, resampled from this one;
        an optimizer made before does not know the new parameters.
        """
        rows, columns = int(grid_size[0]), int(grid_size[1])
        for name, grid in (("pos_embed", self.grid_size), ("pos_embed_out", self.out_grid_size)):
            old: nn.Parameter | None = getattr(self, name)
            if old is not None and grid != (rows, columns):
                with torch.no_grad():
                    new = resample(old, grid, (rows, columns))
                setattr(self, name, nn.Parameter(new, requires_grad=old.requires_grad))
        self.grid_size = self.out_grid_size = (rows, columns)


@torch.fx.wrap  # with `resample`, all that torchvision's tracer, which does not stop at a denoiser, cannot follow
def check_filled(x: torch.Tensor, grid_size: tuple[int, int]) -> None:
    """Raise ValueError where tokens (B, N, C) do not fill a grid."""
    if x.shape[1] != grid_size[0] * grid_size[1]:
        raise UserError(
            f"{x.shape[1]} patch tokens do not fill a grid of {grid_size[0]} x {grid_size[1]}; "
            "the denoiser needs every patch (is patch dropout on?)"
        )


@torch.fx.wrap
def resample(pos_embed: torch.Tensor, old_grid: tuple[int, int], grid_size: tuple[int, int]) -> torch.Tensor:
    """A position embedding (1, h*w, C) of a grid of its own at another one, as timm resamples a backbone's.

    Nothing is kept: it takes 0.3% of a forward of one image of a ViT-S/14 at 518 px.
    """
    if not _is_symbolic(grid_size) and grid_size[0] == old_grid[0] and grid_size[1] == old_grid[1]:
        return pos_embed
    if torch.jit.is_tracing():
        return _resample_by_matrices(pos_embed, old_grid, grid_size)
    # timm's resample_abs_pos_embed takes a grid for a square one of as many places, as it stands.
    maps = pos_embed.reshape(1, old_grid[0], old_grid[1], -1)
    return resample_abs_pos_embed_nhwc(maps, [grid_size[0], grid_size[1]]).flatten(1, 2)


def _is_symbolic(grid_size: tuple[int, int]) -> bool:
    """Whether torch.export leaves a grid open; compared with another one, it would be taken for that one for good."""
    if torch.jit.is_scripting():
        return False
    return any(isinstance(places, torch.SymInt) for places in grid_size)


@torch.jit.unused
def _resample_by_matrices(
    pos_embed: torch.Tensor, old_grid: tuple[int, int], grid_size: tuple[int, int]
) -> torch.Tensor:
    """`resample` of products alone, for tracing exporters (ONNX's), which know no antialiased interpolation."""
    rows, columns = (
        torch.from_numpy(_bicubic(old, int(new))).to(pos_embed.device)
        for old, new in zip(old_grid, grid_size, strict=True)
    )
    maps = pos_embed.float().reshape(old_grid[0], old_grid[1], -1)
    maps = torch.einsum("hi,ijc->hjc", rows, maps)
    return torch.einsum("wj,hjc->hwc", columns, maps).flatten(0, 1)[None].to(pos_embed.dtype)


def _bicubic(old: int, new: int) -> np.ndarray:
    """Weights (new, old) of torch's antialiased bicubic interpolation along one side: Keys's cubic with a = -1/2."""
    places = (np.arange(new)[:, None] + 0.5) * old / new - 0.5
    x = np.abs(places - np.arange(old)) / max(old / new, 1)
    weights = np.where(x < 1, (1.5 * x - 2.5) * x**2 + 1, np.where(x < 2, ((2.5 - 0.5 * x) * x - 4) * x + 2, 0))
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


class LayerDenoisers(nn.Module):
    """Denoisers of several blocks of one backbone; called as a `Denoiser`, it is the one of the final features.

    Args:
        denoisers: by block, counted from 0. That of the final block sees normed tokens, others what the block gives.
        final: the backbone's last block. Without a denoiser of its own, the final features stay as they are.
    """

    def __init__(self, denoisers: Mapping[int, Denoiser], final: int):
        super().__init__()
        self.layers = nn.ModuleDict({str(block): denoisers[block] for block in sorted(denoisers)})
        self.final = str(final)

    def forward(
        self, x: torch.Tensor, grid_size: tuple[int, int], images: Optional[torch.Tensor] = None
    ) -> torch.Tensor:
        """Denoise patch tokens (B, H*W, C) of the final features; returns (B, H*W, C)."""
        for block, denoiser in self.layers.items():
            if block == self.final:
                x = denoiser(x, grid_size, images)
        return x

    def fix_grid(self, grid_size: tuple[int, int]) -> None:
        """`Denoiser.fix_grid` of each."""
        denoiser: Any
        for denoiser in self.layers.values():
            denoiser.fix_grid(grid_size)


def combine(denoisers: dict[int, Denoiser], final: int) -> Denoiser | LayerDenoisers:
    """What a model holds for these denoisers by block."""
    return denoisers[final] if set(denoisers) == {final} else LayerDenoisers(denoisers, final)


def default_num_heads(dim: int) -> int:
    """DVT's `C // 64` heads, or the largest smaller count that divides C."""
    return next(heads for heads in range(max(dim // 64, 1), 0, -1) if dim % heads == 0)

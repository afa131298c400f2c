"""BiRefNet: a picture -> how much of every pixel belongs to the object in front.

A Swin transformer looks at the picture in two sizes; a decoder goes from coarse to fine and is shown the picture
itself, cut into tiles, at every level.  Parameter names are those of the published files (ZhengPeng7/BiRefNet and
briaai/RMBG-2.0, which is the same network).  Images and feature maps are (B, C, H, W), tokens (B, H, W, C).
Source: "Bilateral Reference for High-Resolution Dichotomous Image Segmentation", 2024.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from trellis2.layers import LayerNorm32

SIDE = 1024
"""The network sees every picture at this size, in pixels, whatever its shape: it was trained so."""
STRIDE = 64
"""Sides of what ``BiRefNet.forward`` takes are multiples of this: 32 for the half-size look."""
PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)

_PATCH = 4  # pixels to a token's side
_WIDTH = 64  # channels inside a decoder block
_BRANCH = 256  # channels of each of its parallel convolutions
_EDGE = 16  # channels from which the gate of a level is computed
_TABLE = "relative_position_bias_table"
_GATHERED = 2**24  # values that deform_conv2d reads at a time


@dataclass(frozen=True)
class MattingConfig:
    """Facts of a checkpoint; the defaults are those of the published ones (Swin-L).

    embed_dim: channels of the finest of four stages, doubled at each next one. depths, heads: blocks and attention
    heads per stage. window: side of an attention window, in tokens. tiles_by_column: the order in which the tiles of
    the picture become channels, see ``tiles``; it leaves no trace in a file, but its weights are made for one.
    """

    embed_dim: int = 192
    depths: tuple[int, ...] = (2, 2, 18, 2)
    heads: tuple[int, ...] = (6, 12, 24, 48)
    window: int = 12
    tiles_by_column: bool = False

    @classmethod
    def of_file(cls, state: Mapping[str, Tensor], *, tiles_by_column: bool) -> MattingConfig:
        """Read off the tensors of a file.  Raises KeyError naming the one that is missing."""
        blocks = [
            [key for key in state if key.startswith(f"bb.layers.{stage}.") and _TABLE in key] for stage in range(4)
        ]
        tables = [state[f"bb.layers.{stage}.blocks.0.attn.{_TABLE}"] for stage in range(4)]
        return cls(
            embed_dim=len(state["bb.patch_embed.proj.weight"]),
            depths=tuple(len(keys) for keys in blocks),
            heads=tuple(table.shape[1] for table in tables),
            window=(math.isqrt(len(tables[0])) + 1) // 2,
            tiles_by_column=tiles_by_column,
        )


class BatchNorm(nn.Module):
    """Batch norm with the statistics of training, in float32 for input of any dtype."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))
        self.register_buffer("running_mean", torch.empty(channels))
        self.register_buffer("running_var", torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)  # type: ignore[arg-type]


# --- backbone --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Windows:
    """What all blocks of a stage share, with N = size^2 tokens to a window.

    index: (N, N) rows of the bias table. mask: (B * windows, 1, N, N), 0 where two tokens of a shifted window are
    neighbours in the picture and -inf where the shift has brought them together from opposite edges.
    """

    size: int
    index: Tensor
    mask: Tensor

    @classmethod
    def of(cls, x: Tensor, size: int) -> Windows:
        """x: (B, H, W, C) tokens."""
        place = torch.arange(size, device=x.device)
        apart = place[:, None] - place + size - 1
        index = apart[:, None, :, None] * (2 * size - 1) + apart[None, :, None, :]
        rows, columns = (_region(side + -side % size, size, x.device) for side in x.shape[1:3])
        regions = split_windows((3 * rows[:, None] + columns)[None, :, :, None], size)[..., 0]
        separate = regions[:, :, None] != regions[:, None, :]
        mask = torch.zeros(separate.shape, dtype=x.dtype, device=x.device).masked_fill_(separate, float("-inf"))
        return cls(size, index.flatten(2).flatten(0, 1), mask[:, None].repeat(len(x), 1, 1, 1))


def _region(length: int, size: int, device: torch.device) -> Tensor:
    """Which of three stretches each of ``length`` shifted tokens came from: inside, last whole window, wrapped."""
    token = torch.arange(length, device=device)
    return (token >= length - size).int() + (token >= length - size // 2).int()


def split_windows(x: Tensor, size: int) -> Tensor:
    """(B, H, W, C), H and W multiples of ``size`` -> (B * windows, size^2, C)."""
    cells = x.unflatten(2, (-1, size)).unflatten(1, (-1, size)).transpose(2, 3)
    return cells.flatten(3, 4).flatten(0, 2)


def join_windows(windows: Tensor, size: int, height: int, width: int) -> Tensor:
    """The inverse of ``split_windows``; height, width: in tokens."""
    cells = windows.unflatten(1, (size, size)).unflatten(0, (-1, height // size, width // size))
    return cells.transpose(2, 3).flatten(3, 4).flatten(1, 2)


class WindowAttention(nn.Module):
    def __init__(self, channels: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, windows: Windows, shifted: bool) -> Tensor:
        """x: (n, N, C), one window each."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        # Contiguous, or the fused kernels would first copy it for every window.
        bias = self.relative_position_bias_table.to(x.dtype)[windows.index].permute(2, 0, 1).contiguous()[None]
        bias = bias + windows.mask if shifted else bias.expand(len(x), -1, -1, -1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, 4 * channels)
        self.fc2 = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwinBlock(nn.Module):
    """Attention within windows, then a feed-forward; in every second block the windows are shifted by half."""

    def __init__(self, channels: int, heads: int, window: int, shifted: bool) -> None:
        super().__init__()
        self.shifted = shifted
        self.norm1 = LayerNorm32(channels)
        self.attn = WindowAttention(channels, heads, window)
        self.norm2 = LayerNorm32(channels)
        self.mlp = FeedForward(channels)

    def forward(self, x: Tensor, windows: Windows) -> Tensor:
        x = x + self._attend(self.norm1(x), windows)
        return x + self.mlp(self.norm2(x))

    def _attend(self, x: Tensor, windows: Windows) -> Tensor:
        size, (height, width) = windows.size, x.shape[1:3]
        shift = size // 2 if self.shifted else 0
        # The zeros that fill the last windows take part in the attention: the network was trained so.
        padded = F.pad(x, (0, 0, 0, -width % size, 0, -height % size))
        full = padded.shape[1:3]
        tokens = split_windows(padded.roll((-shift, -shift), (1, 2)) if shift else padded, size)
        out = join_windows(self.attn(tokens, windows, self.shifted), size, *full)
        return (out.roll((shift, shift), (1, 2)) if shift else out)[:, :height, :width]


class PatchMerging(nn.Module):
    """Four neighbouring tokens become one of twice the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = LayerNorm32(4 * channels)
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        quads = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # (B, h, dy, w, dx, C)
        return self.reduction(self.norm(quads.permute(0, 1, 3, 4, 2, 5).flatten(3)))


class SwinStage(nn.Module):
    def __init__(self, channels: int, depth: int, heads: int, window: int, last: bool) -> None:
        super().__init__()
        self.window = window
        self.blocks = nn.ModuleList(SwinBlock(channels, heads, window, i % 2 == 1) for i in range(depth))
        self.downsample = None if last else PatchMerging(channels)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the stage's tokens, and what the next stage begins with."""
        windows = Windows.of(x, self.window)
        for block in self.blocks:
            x = block(x, windows)
        return x, x if self.downsample is None else self.downsample(x)


class PatchEmbedding(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, channels, _PATCH, stride=_PATCH)
        self.norm = LayerNorm32(channels)

    def forward(self, image: Tensor) -> Tensor:
        return self.norm(self.proj(image).permute(0, 2, 3, 1))


class Swin(nn.Module):
    """Swin transformer: a picture -> features at 1/4, 1/8, 1/16 and 1/32 of its size."""

    def __init__(self, config: MattingConfig) -> None:
        super().__init__()
        self.patch_embed = PatchEmbedding(config.embed_dim)
        widths = stage_channels(config)
        self.layers = nn.ModuleList(
            SwinStage(channels, depth, heads, config.window, channels == widths[-1])
            for channels, depth, heads in zip(widths, config.depths, config.heads, strict=True)
        )
        for stage, channels in enumerate(widths):
            self.add_module(f"norm{stage}", LayerNorm32(channels))

    def forward(self, image: Tensor) -> list[Tensor]:
        """image: (B, 3, H, W).  Returns four maps, the finest first."""
        x = self.patch_embed(image)
        maps = []
        for stage, layer in enumerate(self.layers):
            seen, x = layer(x)
            maps.append(self.get_submodule(f"norm{stage}")(seen).permute(0, 3, 1, 2).contiguous())
        return maps


def stage_channels(config: MattingConfig) -> list[int]:
    """Channels of the four stages, the finest first."""
    return [config.embed_dim * 2**stage for stage in range(4)]


# --- decoder ---------------------------------------------------------------------------------------------------


class DeformableConv(nn.Module):
    """Convolution that chooses, at each pixel, where it reads and how much each reading counts."""

    def __init__(self, channels: int, out_channels: int, size: int) -> None:
        super().__init__()
        self.padding = size // 2
        self.offset_conv = nn.Conv2d(channels, 2 * size**2, size, padding=self.padding)
        self.modulator_conv = nn.Conv2d(channels, size**2, size, padding=self.padding)
        self.regular_conv = nn.Conv2d(channels, out_channels, size, padding=self.padding, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        mask = 2 * torch.sigmoid(self.modulator_conv(x))
        return deform_conv2d(x, self.offset_conv(x), mask, self.regular_conv.weight, None, self.padding)


class DeformableBranch(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.atrous_conv = DeformableConv(_WIDTH, _BRANCH, size)
        self.bn = BatchNorm(_BRANCH)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(self.bn(self.atrous_conv(x)))


class DeformablePyramid(nn.Module):
    """Deformable convolutions of several sizes and the mean of the picture, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.aspp1 = DeformableBranch(1)
        self.aspp_deforms = nn.ModuleList(DeformableBranch(size) for size in (1, 3, 7))
        mean = nn.Conv2d(_WIDTH, _BRANCH, 1, bias=False)
        self.global_avg_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), mean, BatchNorm(_BRANCH), nn.ReLU())
        self.conv1 = nn.Conv2d(5 * _BRANCH, _WIDTH, 1, bias=False)
        self.bn1 = BatchNorm(_WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        branches = [self.aspp1(x), *(branch(x) for branch in self.aspp_deforms)]
        branches.append(self.global_avg_pool(x).expand_as(branches[0]))
        return F.relu_(self.bn1(self.conv1(torch.cat(branches, dim=1))))


class DecoderBlock(nn.Module):
    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(channels, _WIDTH, 3, padding=1)
        self.bn_in = BatchNorm(_WIDTH)
        self.dec_att = DeformablePyramid()
        self.conv_out = nn.Conv2d(_WIDTH, out_channels, 3, padding=1)
        self.bn_out = BatchNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dec_att(F.relu_(self.bn_in(self.conv_in(x))))
        return self.bn_out(self.conv_out(x))


class LateralBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class TileBlock(nn.Module):
    """What a level is told of the picture itself; two convolutions with nothing between them."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 64, 3, padding=1)
        self.conv_out = nn.Conv2d(64, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(self.conv1(x))


class Decoder(nn.Module):
    """Features and the picture -> one logit per pixel, from level 4 (1/32 of the picture) to level 1 (1/4)."""

    def __init__(self, config: MattingConfig) -> None:
        super().__init__()
        self.tiles_by_column = config.tiles_by_column
        wide = [2 * channels for channels in stage_channels(config)]  # of two looks
        told = {5: wide[3] // 8, 4: wide[3] // 8, 3: wide[2] // 8, 2: wide[1] // 8, 1: wide[0] // 8}
        for level, tile_side in ((5, 32), (4, 16), (3, 8), (2, 4), (1, 1)):
            self.add_module(f"ipt_blk{level}", TileBlock(3 * tile_side**2, told[level]))
        for level in (4, 3, 2, 1):
            out = wide[level - 2] if level > 1 else wide[0] // 2
            self.add_module(f"decoder_block{level}", DecoderBlock(wide[level - 1] + told[level + 1], out))
            if level > 1:
                self.add_module(f"lateral_block{level}", LateralBlock(out))
                edges = nn.Sequential(nn.Conv2d(out, _EDGE, 3, padding=1), BatchNorm(_EDGE), nn.ReLU())
                self.add_module(f"gdt_convs_{level}", edges)
                self.add_module(f"gdt_convs_attn_{level}", nn.Sequential(nn.Conv2d(_EDGE, 1, 1)))
        self.conv_out1 = nn.Sequential(nn.Conv2d(wide[0] // 2 + told[1], 1, 1))

    def forward(self, image: Tensor, maps: list[Tensor]) -> Tensor:
        """image: (B, 3, H, W). maps: four, the finest first, the coarsest squeezed; they are used up.

        Returns (B, 1, H, W).
        """
        h = maps.pop()
        for level in (4, 3, 2):
            h = self._block(level, h, image)
            gate = self.get_submodule(f"gdt_convs_attn_{level}")(self.get_submodule(f"gdt_convs_{level}")(h))
            skip = maps.pop()
            h = resize(h * torch.sigmoid(gate), skip.shape[2:]) + self.get_submodule(f"lateral_block{level}")(skip)
        h = self._block(1, h, image)
        # The last convolution sees single pixels, so its part for ``h`` may come before the enlargement to the full
        # picture: one channel is enlarged instead of hundreds of megabytes.
        last = self.conv_out1[0]
        coarse, fine = last.weight.split([h.shape[1], last.in_channels - h.shape[1]], dim=1)  # type: ignore[operator]
        logits = resize(F.conv2d(h, coarse), image.shape[2:])
        told = self.get_submodule("ipt_blk1")(image)
        return logits + F.conv2d(told, fine, last.bias)  # type: ignore[arg-type]

    def _block(self, level: int, h: Tensor, image: Tensor) -> Tensor:
        told = self.get_submodule(f"ipt_blk{level + 1}")(tiles(image, h.shape[2:], self.tiles_by_column))
        return self.get_submodule(f"decoder_block{level}")(torch.cat([h, told], dim=1))


class BiRefNet(nn.Module):
    """Separates the object of a picture from its background.  ``matte`` is a ``trellis2.image.Matting``."""

    def __init__(self, config: MattingConfig | None = None) -> None:
        """config: None for that of the published files."""
        super().__init__()
        self.config = config or MattingConfig()
        self.bb = Swin(self.config)
        wide = [2 * channels for channels in stage_channels(self.config)]
        self.squeeze_module = nn.Sequential(DecoderBlock(sum(wide), wide[-1]))
        self.decoder = Decoder(self.config)
        self.set_dtype(torch.float32)

    def set_dtype(self, dtype: torch.dtype) -> None:
        """Compute in ``dtype``; norms, and where deformable convolutions read, stay float32."""
        self.dtype = dtype
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.to(dtype)

    def unused_keys(self) -> set[str]:
        """Names that published files hold beside this network's: what only training needs, and what follows."""
        heads = [f"conv_ms_spvn_{level}" for level in (2, 3, 4)] + [f"gdt_convs_pred_{level}.0" for level in (2, 3, 4)]
        keys = {f"decoder.{head}.{kind}" for head in heads for kind in ("weight", "bias")}
        for name, module in self.named_modules():
            if isinstance(module, BatchNorm):
                keys.add(f"{name}.num_batches_tracked")
            elif isinstance(module, WindowAttention):
                keys.add(f"{name}.relative_position_index")
        return keys

    def forward(self, image: Tensor) -> Tensor:
        """image: (B, 3, H, W) float32, normalised, sides multiples of 64.  Returns logits (B, 1, H, W) float32.

        Raises ValueError on other sides.
        """
        if any(side % STRIDE for side in image.shape[2:]):
            raise ValueError(f"image is {tuple(image.shape[2:])}; its sides must be multiples of {STRIDE}")
        small = resize(image, [side // 2 for side in image.shape[2:]]).to(self.dtype)
        image = image.to(self.dtype)
        maps = [
            torch.cat([large, resize(other, large.shape[2:])], dim=1)
            for large, other in zip(self.bb(image), self.bb(small), strict=True)
        ]
        coarse = maps[-1].shape[2:]
        maps[-1] = self.squeeze_module(torch.cat([resize(x, coarse) for x in maps], dim=1))
        return self.decoder(image, maps).float()

    def matte(self, image: Image.Image) -> Image.Image:
        """RGB picture of any size -> coverage of the object, mode L, of the same size.

        As the original does it: bilinear reduction to 1024 x 1024 pixels whatever the shape, sigmoid, 256 levels
        cut off, bicubic enlargement.
        """
        resized = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        device = next(self.parameters()).device
        pixels = torch.from_numpy(np.array(resized)).to(device).permute(2, 0, 1)[None].float() / 255
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in (PIXEL_MEAN, PIXEL_STD))
        with torch.inference_mode():
            coverage = torch.sigmoid(self((pixels - mean) / std))[0, 0]
            levels = (coverage * 255).to(torch.uint8).cpu().numpy()
        return Image.fromarray(levels).resize(image.size, Image.Resampling.BICUBIC)


def resize(x: Tensor, size: torch.Size | list[int]) -> Tensor:
    """Bilinear, the outermost pixels staying outermost.  x: (B, C, H, W)."""
    if x.shape[2:] == torch.Size(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=True)


def tiles(image: Tensor, size: torch.Size, by_column: bool) -> Tensor:
    """Cut a picture into tiles of ``size`` (h, w) and stack them as channels.

    image: (B, 3, H, W), H and W multiples of h and w.  Returns (B, 3 * rows * columns, h, w).
    by_column: channels count (column, row, colour), else (colour, row, column), the last one fastest.
    """
    cells = image.unflatten(3, (-1, size[1])).unflatten(2, (-1, size[0]))  # (B, colour, row, h, column, w)
    order = (0, 4, 2, 1, 3, 5) if by_column else (0, 1, 2, 4, 3, 5)
    return cells.permute(order).flatten(1, 3)


# --- deformable convolution ------------------------------------------------------------------------------------


def deform_conv2d(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
    """Modulated deformable convolution (DCNv2), stride 1.

    x: (B, C, H, W), zero outside. offset: (B, 2 * kh * kw, h, w), for every tap of the kernel, row by row, how far
    down and how far right of its place it reads, in pixels (bilinear). mask: (B, kh * kw, h, w) factors of the
    readings. weight: (D, C, kh, kw). bias: (D,) or None. padding: on all sides.
    Returns (B, D, h, w) in x's dtype, h = H + 2 * padding - kh + 1.  Places are computed in float32.
    """
    kernel = _torchvision_kernel() if x.is_cuda else None
    if kernel is None:
        return deform_conv2d_reference(x, offset, mask, weight, bias, padding)
    # In float16 it would round the places themselves, to an eighth of a pixel from 128 on.
    out = kernel(
        x.float(),
        offset.float(),
        weight.float(),
        None if bias is None else bias.float(),
        padding=padding,
        mask=mask.float(),
    )
    return out.to(x.dtype)


@functools.cache
def _torchvision_kernel() -> Callable[..., Tensor] | None:
    """torchvision is a help on a GPU, not a requirement."""
    try:
        kernel: Callable[..., Tensor] = importlib.import_module("torchvision.ops").deform_conv2d
    except (ImportError, RuntimeError, OSError):  # the latter two where it was built for another torch
        return None
    return kernel


def deform_conv2d_reference(
    x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None, padding: int
) -> Tensor:
    """``deform_conv2d`` in plain torch: gather and matrix product, ``_GATHERED`` values at a time."""
    channels, height, width = x.shape[1:]
    taps_right = weight.shape[3]
    taps = weight.shape[2] * taps_right
    offsets = offset.permute(0, 2, 3, 1).reshape(-1, taps, 2)
    factors = mask.permute(0, 2, 3, 1).reshape(-1, taps)
    # A frame of zeros around the pictures stands for all that is outside them; places count from its corner.
    framed = F.pad(x, (1, 1, 1, 1)).permute(0, 2, 3, 1).reshape(-1, channels)
    matrix = weight.permute(2, 3, 1, 0).reshape(taps * channels, -1)
    tap = torch.arange(taps, device=x.device)
    out = x.new_empty(len(offsets), len(weight))
    count = max(1, _GATHERED // (taps * channels))
    for begin in range(0, len(offsets), count):
        part = slice(begin, begin + count)
        pixel = torch.arange(len(offsets), device=x.device)[part, None]
        row, item = pixel // offset.shape[3] % offset.shape[2], pixel // offset[0, 0].numel()
        down, right = offsets[part].float().unbind(dim=2)
        y = (row + tap // taps_right - padding + down).clamp(-1, height) + 1
        z = (pixel % offset.shape[3] + tap % taps_right - padding + right).clamp(-1, width) + 1
        top, left = y.floor().clamp(max=height), z.floor().clamp(max=width)
        below, beside = y - top, z - left
        corner = (item * (height + 2) + top.long()) * (width + 2) + left.long()
        shares = (
            (0, (1 - below) * (1 - beside)),
            (1, (1 - below) * beside),
            (width + 2, below * (1 - beside)),
            (width + 3, below * beside),
        )
        read = x.new_zeros(*corner.shape, channels)
        for step, share in shares:
            read.addcmul_(framed[corner + step], (share * factors[part])[..., None].to(x.dtype))
        out[part] = read.flatten(1) @ matrix
    if bias is not None:
        out += bias
    return out.unflatten(0, (len(x), *offset.shape[2:])).permute(0, 3, 1, 2).contiguous()

"""BiRefNet against the original on weights that follow from their names, and its deformable convolution."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_cases import golden_cases, load_golden, relative_l2
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from trellis2.checkpoint import fill_model
from trellis2.models import matting
from trellis2.models.matting import BiRefNet, MattingConfig, deform_conv2d, deform_conv2d_reference, tiles

TINY = MattingConfig(embed_dim=16, depths=(2, 2, 4, 2), heads=(1, 2, 4, 8), window=5)

VARIANCE = 0.05
"""Of batch norms: small, so that what is added to it for safety can be seen."""


def named_weights(shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Weights that anybody can make again: each from a generator seeded with its name, of a size that keeps signals."""
    return {name: _named(name, shape) for name, shape in shapes.items()}


def _named(name: str, shape: torch.Size) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    if name.endswith("running_var"):
        return VARIANCE * (0.5 + torch.rand(shape, generator=generator))
    value = torch.randn(shape, generator=generator)
    if name.endswith(("bias", "running_mean")):
        return 0.1 * value
    if name.endswith("bias_table"):
        return 0.5 * value
    if len(shape) == 1:  # the scale of a norm
        batch_norm = any(part in name for part in ("bn", "global_avg_pool", "gdt_convs"))
        return (1 + 0.1 * value) * (VARIANCE**0.5 if batch_norm else 1)
    return value / shape[1:].numel() ** 0.5


def picture(shape: list[int], seed: int) -> Tensor:
    """Normalised pixels: noise at several scales, so that neither level of the network sees only grey."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.zeros(shape)
    for step in (1, 4, 16, 64):
        coarse = torch.randn([*shape[:2], *(-(-side // step) for side in shape[2:])], generator=generator)
        out += coarse.repeat_interleave(step, 2).repeat_interleave(step, 3)[..., : shape[2], : shape[3]]
    return out / 2


def build(config: MattingConfig | None = None, dtype: torch.dtype = torch.float32) -> BiRefNet:
    with torch.device("meta"):
        model = BiRefNet(config).eval()
    model.set_dtype(dtype)
    fill_model(model, named_weights({name: value.shape for name, value in model.state_dict().items()}))
    return model


# --- the network -----------------------------------------------------------------------------------------------


def config_of(meta: dict[str, Any], by_column: bool = False) -> MattingConfig:
    fields = {key: tuple(v) if isinstance(v, list) else v for key, v in (meta["config"] or {}).items()}
    return MattingConfig(**fields, tiles_by_column=by_column)


def recorded(path: Path, dtype: torch.dtype, device: str) -> Iterator[tuple[Tensor, Tensor, dict[str, Any]]]:
    """What ours and the original's network say of the same picture: without and, where recorded, with other tiles."""
    meta, tensors = load_golden(path)
    for name, expected in sorted(tensors.items()):
        model = build(config_of(meta, name == "out_by_column"), dtype).to(device)
        out = model(picture(meta["shape"], meta["seed"]).to(device)).cpu()
        yield out[..., :: meta["step"], :: meta["step"]], expected, meta


@pytest.mark.parametrize("path", golden_cases("matting"))
def test_logits_of_the_original(path: Path) -> None:
    for out, expected, meta in recorded(path, torch.float32, "cpu"):
        assert out.dtype == torch.float32
        assert out.shape == expected.shape
        assert relative_l2(out, expected) <= meta["tol"]["rel_l2"]


@pytest.mark.parametrize("path", golden_cases("matting")[:1])  # the full size takes long without a GPU
def test_half_precision(path: Path) -> None:
    assert_rounding_only(path, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("path", golden_cases("matting"))
def test_half_precision_on_a_gpu(path: Path) -> None:
    assert_rounding_only(path, "cuda")


def assert_rounding_only(path: Path, device: str) -> None:
    """float16 has three bits more than bfloat16, so an eighth of its error; at most twice that is allowed."""
    half, expected, _ = next(recorded(path, torch.float16, device))
    coarse, _, _ = next(recorded(path, torch.bfloat16, device))
    assert relative_l2(coarse, expected) <= 0.02
    assert relative_l2(half, expected) <= 2 * relative_l2(coarse, expected) / 8


def test_two_pictures_equal_one_and_one() -> None:
    model = build(TINY)
    both = picture([2, 3, 128, 64], 3)
    assert relative_l2(model(both), torch.cat([model(item[None]) for item in both])) <= 1e-6


@pytest.mark.parametrize("size", [(64, 96), (1000, 64)])
def test_sides_that_do_not_fit_are_named(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"\({size[0]}, {size[1]}\); its sides must be multiples of 64"):
        build(TINY)(torch.zeros(1, 3, *size))


def test_precision_of_the_weights() -> None:
    state = build(TINY, torch.float16).state_dict()
    wide = {name for name, value in state.items() if value.dtype == torch.float32}
    assert {value.dtype for name, value in state.items() if name not in wide} == {torch.float16}
    for name in wide:
        assert (
            any(part.startswith(("norm", "bn")) for part in name.split("."))
            or state[name].ndim == 1
            or (name.endswith("relative_position_bias_table"))
        ), name


def test_tiles_by_hand() -> None:
    """A picture of 2 x 4 pixels in tiles of 1 x 2; pixel = 100 * colour + 10 * row + column."""
    image = torch.tensor([[[[100 * c + 10 * y + x for x in range(4)] for y in range(2)] for c in (1, 2, 3)]])
    size = torch.Size([1, 2])
    by_colour = [[100, 101], [102, 103], [110, 111], [112, 113], [200, 201], [202, 203], [210, 211], [212, 213]]
    assert tiles(image, size, by_column=False)[0, :8, 0].tolist() == by_colour
    by_column = [[100, 101], [200, 201], [300, 301], [110, 111], [210, 211], [310, 311], [102, 103], [202, 203]]
    assert tiles(image, size, by_column=True)[0, :8, 0].tolist() == by_column


def test_published_names_and_size() -> None:
    """Both published files hold these tensors; with what is not used, 220 202 578 weights."""
    with torch.device("meta"):
        model = BiRefNet()
    state = model.state_dict()
    assert sum(value.numel() for value in state.values()) == 220_199_836
    assert len(state) == 675
    assert {
        "bb.patch_embed.norm.weight",
        "bb.layers.2.blocks.17.attn.relative_position_bias_table",
        "bb.layers.2.downsample.reduction.weight",
        "bb.norm3.bias",
        "squeeze_module.0.dec_att.global_avg_pool.2.running_var",
        "decoder.decoder_block1.dec_att.aspp_deforms.2.atrous_conv.modulator_conv.weight",
        "decoder.ipt_blk5.conv1.weight",
        "decoder.gdt_convs_attn_2.0.bias",
        "decoder.lateral_block4.conv.weight",
        "decoder.conv_out1.0.weight",
    } <= set(state)
    unused = model.unused_keys()
    assert not unused & set(state)
    assert len(unused) == 79  # 12 of heads for training, 24 index tables, 43 counters
    assert {
        "bb.layers.3.blocks.1.attn.relative_position_index",
        "decoder.conv_ms_spvn_4.weight",
        "decoder.gdt_convs_pred_2.0.bias",
        "decoder.gdt_convs_3.1.num_batches_tracked",
    } <= unused


# --- matting a picture -----------------------------------------------------------------------------------------


class Recorder(BiRefNet):
    """Says of every pixel what its red channel is, and remembers what it saw."""

    def forward(self, image: Tensor) -> Tensor:
        self.seen = image
        return image[:, :1]


def recorder() -> Recorder:
    return Recorder(TINY)


def test_matte_prepares_and_returns_as_the_original() -> None:
    image = Image.effect_noise((40, 30), 90).convert("RGB")
    image.paste((255, 128, 0), (0, 0, 20, 30))
    model = recorder()
    matte = model.matte(image)
    assert (matte.mode, matte.size) == ("L", (40, 30))
    large = np.asarray(image.resize((1024, 1024), Image.Resampling.BILINEAR), dtype=np.float64) / 255
    seen = (large - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert np.abs(model.seen[0].permute(1, 2, 0).numpy() - seen).max() < 1e-5
    red = (1 / (1 + np.exp(-seen[..., 0])) * 255).astype(np.uint8)  # cut off, not rounded
    expected = np.asarray(Image.fromarray(red).resize((40, 30), Image.Resampling.BICUBIC)).astype(int)
    error = np.abs(np.asarray(matte) - expected)
    assert error.max() <= 1
    assert error.mean() < 0.1


def test_matte_does_not_change_the_picture() -> None:
    image = Image.effect_noise((40, 30), 90).convert("RGBA")
    before = image.tobytes()
    recorder().matte(image)
    assert image.tobytes() == before


# --- deformable convolution ------------------------------------------------------------------------------------


def by_definition(
    x: NDArray[Any], offset: NDArray[Any], mask: NDArray[Any], weight: NDArray[Any], padding: int
) -> NDArray[np.float64]:
    """One tap of one pixel at a time, in float64."""

    def pixel(item: int, y: int, x_: int) -> Any:
        inside = 0 <= y < x.shape[2] and 0 <= x_ < x.shape[3]
        return x[item, :, y, x_].astype(np.float64) if inside else np.zeros(x.shape[1])

    out = np.zeros((len(x), len(weight), *offset.shape[2:]))
    for item, row, column in np.ndindex(len(x), *offset.shape[2:]):
        for tap, (i, j) in enumerate(np.ndindex(*weight.shape[2:])):
            y = row - padding + i + float(offset[item, 2 * tap, row, column])
            z = column - padding + j + float(offset[item, 2 * tap + 1, row, column])
            top, left = int(np.floor(y)), int(np.floor(z))
            read = sum(
                (1 - abs(y - v)) * (1 - abs(z - h)) * pixel(item, v, h)
                for v in (top, top + 1)
                for h in (left, left + 1)
            )
            out[item, :, row, column] += weight[:, :, i, j] @ read * float(mask[item, tap, row, column])
    return out


def deformable_case(size: int, padding: int, reach: float, seed: int = 0) -> tuple[Tensor, ...]:
    """x, offset, mask and weight of two pictures of 6 x 5 pixels; offsets reach about ``reach`` pixels."""
    generator = torch.Generator().manual_seed(seed)
    height, width = 6 + 2 * padding - size + 1, 5 + 2 * padding - size + 1
    return (
        torch.randn(2, 4, 6, 5, generator=generator),
        reach * torch.randn(2, 2 * size**2, height, width, generator=generator),
        2 * torch.rand(2, size**2, height, width, generator=generator),
        torch.randn(3, 4, size, size, generator=generator),
    )


@pytest.mark.parametrize(("size", "padding"), [(1, 0), (3, 1), (3, 0), (5, 2)])
@pytest.mark.parametrize("reach", [0.3, 4.0])
def test_deformable_convolution_by_definition(size: int, padding: int, reach: float) -> None:
    x, offset, mask, weight = deformable_case(size, padding, reach)
    out = deform_conv2d(x, offset, mask, weight, None, padding)
    expected = by_definition(x.numpy(), offset.numpy(), mask.numpy(), weight.numpy(), padding)
    assert out.shape == expected.shape
    assert np.abs(out.numpy() - expected).max() <= 1e-5 * np.abs(expected).max()


def test_deformable_convolution_by_hand() -> None:
    """One tap that reads half a pixel to the right and a quarter down, and one that falls off the picture."""
    x = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    offset = torch.zeros(1, 2, 2, 2)
    offset[0, 0], offset[0, 1] = 0.25, 0.5
    mask = torch.full((1, 1, 2, 2), 2.0)
    out = deform_conv2d(x, offset, mask, torch.full((1, 1, 1, 1), 10.0), torch.tensor([100.0]), 0)
    # Upper left: 0.75 * (1 + 2) / 2 + 0.25 * (3 + 4) / 2 = 2, times 2 * 10; outside counts as 0.
    assert out.flatten().tolist() == [140.0, 125.0, 152.5, 130.0]
    far = offset + 1e6
    assert deform_conv2d(x, far, mask, torch.ones(1, 1, 1, 1), None, 0).flatten().tolist() == [0.0] * 4
    assert deform_conv2d(x, -far, mask, torch.ones(1, 1, 1, 1), None, 0).flatten().tolist() == [0.0] * 4


def test_deformable_convolution_without_offsets_is_a_convolution() -> None:
    x, offset, mask, weight = deformable_case(3, 1, 0)
    bias = torch.tensor([1.0, -2.0, 3.0])
    out = deform_conv2d(x, offset, torch.ones_like(mask), weight, bias, 1)
    assert relative_l2(out, torch.nn.functional.conv2d(x, weight, bias, padding=1)) <= 1e-6


def test_deformable_convolution_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    case = deformable_case(3, 1, 2.0)
    whole = deform_conv2d(*case, None, 1)
    monkeypatch.setattr(matting, "_GATHERED", 9 * 4 * 7)  # seven pixels at a time, which divides neither picture
    assert relative_l2(deform_conv2d(*case, None, 1), whole) <= 1e-6


@pytest.mark.parametrize("error", [ImportError("none"), RuntimeError("operator torchvision::nms does not exist")])
def test_torchvision_may_be_missing_or_of_another_torch(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(name: str) -> Any:
        raise error

    monkeypatch.setattr(matting.importlib, "import_module", fail)
    matting._torchvision_kernel.cache_clear()
    assert matting._torchvision_kernel() is None
    monkeypatch.undo()
    matting._torchvision_kernel.cache_clear()


# --- on a GPU --------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("path", golden_cases("matting"))
def test_logits_of_the_original_on_a_gpu(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    for out, expected, meta in recorded(path, torch.float32, "cuda"):
        assert relative_l2(out, expected) <= 10 * meta["tol"]["rel_l2"]  # sums in another order


@pytest.mark.gpu
@pytest.mark.parametrize(("size", "padding"), [(1, 0), (3, 1), (7, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_deformable_convolution_on_a_gpu(size: int, padding: int, dtype: torch.dtype) -> None:
    """Whichever kernel is there, and the plain one, against the plain one on the CPU in float32."""
    case = [t.to(dtype) for t in deformable_case(size, padding, 2.0)]
    expected = deform_conv2d_reference(*(t.float() for t in case), None, padding)
    for kernel in (deform_conv2d, deform_conv2d_reference):
        out = kernel(*(t.cuda() for t in case), None, padding)
        assert out.dtype == dtype
        assert relative_l2(out.cpu(), expected) <= (1e-5 if dtype == torch.float32 else 2e-3)


@pytest.mark.gpu
def test_deformable_convolution_is_that_of_torchvision() -> None:
    torchvision = pytest.importorskip("torchvision.ops", exc_type=(ImportError, RuntimeError))
    x, offset, mask, weight = (t.cuda() for t in deformable_case(3, 1, 2.0))
    expected = torchvision.deform_conv2d(x, offset, weight, padding=1, mask=mask)
    assert relative_l2(deform_conv2d_reference(x, offset, mask, weight, None, 1), expected) <= 1e-5


@pytest.mark.gpu
def test_matte_at_full_size_on_a_gpu() -> None:
    """The published shape in half precision, within the memory that is promised."""
    model = build(dtype=torch.float16).cuda()
    image = Image.effect_noise((300, 200), 90).convert("RGB")
    torch.cuda.reset_peak_memory_stats()
    matte = model.matte(image)
    assert torch.cuda.max_memory_allocated() < 2.5e9
    assert (matte.mode, matte.size) == ("L", (300, 200))
    low, high = matte.getextrema()
    assert low < high
    assert model.matte(image).tobytes() == matte.tobytes()

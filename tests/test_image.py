from __future__ import annotations

import io
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from golden_cases import golden_cases, load_golden
from numpy.typing import NDArray
from pictures import intersection_over_union, object_mask, scene
from PIL import Image

from trellis2 import background
from trellis2.background import separate
from trellis2.errors import InputError
from trellis2.image import MAX_BYTES, open_image, prepare

RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)
EXAMPLES = Path(__file__).parents[1] / "assets" / "example_image"


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def noise(height: int, width: int, channels: int, dtype: Any = np.uint8) -> NDArray[Any]:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (height, width, channels)).astype(dtype)


def red_left() -> Image.Image:
    """40 x 20, white with a red left quarter."""
    image = Image.new("RGB", (40, 20), WHITE)
    image.paste(RED, (0, 0, 10, 20))
    return image


def disc(size: int = 64, box: tuple[int, int, int, int] = (16, 20, 40, 44)) -> Image.Image:
    """RGBA noise with a hard-edged opaque rectangle."""
    alpha = np.zeros((size, size), np.uint8)
    alpha[box[1] : box[3], box[0] : box[2]] = 255
    return Image.fromarray(np.dstack([noise(size, size, 3), alpha]))


def png_header(width: int, height: int) -> bytes:
    """A PNG that ends where its pixels should begin."""
    header = b"IHDR" + struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"\0")
    chunks = [struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in (header, data)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def icc_profile(space: str) -> bytes:
    """A display profile with a linear response: sRGB's primaries for "RGB ", no colour for "GRAY"."""
    curve = b"curv" + bytes(4) + struct.pack(">I", 0)

    def xyz(x: float, y: float, z: float) -> bytes:
        return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(v * 65536) for v in (x, y, z)))

    tags = {
        b"wtpt": xyz(0.9642, 1, 0.8249),
        b"desc": b"desc" + bytes(4) + struct.pack(">I", 7) + b"linear\0" + bytes(78),
    }
    if space == "RGB ":
        tags |= {b"rXYZ": xyz(0.4361, 0.2225, 0.0139), b"gXYZ": xyz(0.3851, 0.7169, 0.0971)}
        tags |= {b"bXYZ": xyz(0.1431, 0.0606, 0.7141), b"rTRC": curve, b"gTRC": curve, b"bTRC": curve}
    else:
        tags |= {b"kTRC": curve}
    offset = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">2I", offset + len(body), len(content))
        body += content
    header = struct.pack(
        ">I4sI4s4s4s12s4s",
        offset + len(body),
        bytes(4),
        0x02100000,
        b"mntr",
        space.encode(),
        b"XYZ ",
        bytes(12),
        b"acsp",
    )
    header += bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + table + body


# --- reading ---------------------------------------------------------------------------------------------------


def test_every_kind_of_source_gives_the_same_picture(tmp_path: Path) -> None:
    image = red_left()
    data = encoded(image, "PNG")
    path = tmp_path / "picture.bin"  # the name says nothing, the content does
    path.write_bytes(data)
    with path.open("rb") as stream:
        sources = [str(path), path, data, stream, io.BytesIO(data), image]
        for source in sources:
            assert open_image(source).tobytes() == image.tobytes()


@pytest.mark.parametrize("form", ["PNG", "WEBP", "BMP", "TIFF", "GIF", "JPEG"])
def test_formats(form: str) -> None:
    result = open_image(encoded(red_left(), form))
    assert (result.mode, result.size) == ("RGB", (40, 20))
    pixels = np.asarray(result).astype(int)
    assert abs(pixels[:, :6] - RED).max() <= 16
    assert abs(pixels[:, 14:] - WHITE).max() <= 16


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF", "GIF"])
def test_first_frame_of_an_animation(form: str) -> None:
    frames = [Image.new("RGB", (40, 20), RED), Image.new("RGB", (40, 20), GREEN)]
    result = open_image(encoded(frames[0], form, save_all=True, append_images=frames[1:]))
    assert abs(np.asarray(result)[..., :3].astype(int) - RED).max() <= 4


@pytest.mark.parametrize("form", ["JPEG", "TIFF"])
def test_cmyk(form: str) -> None:
    """Pillow writes CMYK JPEG as Adobe does, inverted and with Adobe's marker."""
    data = encoded(Image.new("CMYK", (40, 20), (0, 255, 255, 0)), form)
    assert form != "JPEG" or b"Adobe" in data
    result = open_image(data)
    assert result.mode == "RGB"
    assert abs(np.asarray(result).astype(int) - RED).max() <= 2


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_deep_grey_is_scaled(form: str) -> None:
    values = np.linspace(0, 65535, 40 * 20).reshape(20, 40).round().astype(np.uint16)
    result = open_image(encoded(Image.fromarray(values), form))
    assert result.mode == "RGB"
    assert abs(np.asarray(result) - values[..., None] / 257).max() <= 0.5 + 1e-6


@pytest.mark.parametrize("form", [".png", ".tiff"])
@pytest.mark.parametrize("channels", [3, 4])
def test_deep_colour_is_scaled(form: str, channels: int) -> None:
    values = noise(20, 40, channels, np.uint16)
    swapped = values[..., [2, 1, 0, 3][:channels]]  # OpenCV's order
    result = open_image(cv2.imencode(form, swapped)[1].tobytes())
    assert result.mode == ("RGB" if channels == 3 else "RGBA")
    assert abs(np.asarray(result) - values / 257).max() < 1


def test_floating_point_is_scaled() -> None:
    values = np.linspace(-0.5, 1.5, 800, dtype=np.float32).reshape(20, 40)
    result = np.asarray(open_image(encoded(Image.fromarray(values), "TIFF")))
    assert abs(result[..., 0] - values.clip(0, 1) * 255).max() <= 0.5 + 1e-3


def test_palette_with_transparency() -> None:
    image = Image.new("P", (40, 20), 0)
    image.putpalette([*RED, *GREEN] + [0] * 762)
    image.paste(1, (20, 0, 40, 20))
    indexed = open_image(encoded(image, "GIF", transparency=0))
    assert indexed.getpixel((3, 3))[3] == 0  # type: ignore[index]
    assert indexed.getpixel((30, 3)) == (*GREEN, 255)
    graded = open_image(encoded(image, "PNG", transparency=bytes([0, 128])))
    assert graded.getpixel((30, 3)) == (*GREEN, 128)
    assert open_image(encoded(image, "PNG")).mode == "RGB"


@pytest.mark.parametrize(
    ("image", "options", "expected"),
    [
        (Image.new("LA", (40, 20), (100, 50)), {}, (100, 100, 100, 50)),
        (Image.new("L", (40, 20), 9), {"transparency": 9}, (9, 9, 9, 0)),
        (Image.new("RGB", (40, 20), (9, 8, 7)), {"transparency": (9, 8, 7)}, (9, 8, 7, 0)),
        (Image.new("L", (40, 20), 200), {}, (200, 200, 200)),
        (Image.new("1", (40, 20), 1), {}, WHITE),
    ],
    ids=["LA", "L-key", "RGB-key", "L", "1"],
)
def test_modes_of_png(image: Image.Image, options: dict[str, Any], expected: tuple[int, ...]) -> None:
    assert open_image(encoded(image, "PNG", **options)).getpixel((1, 1)) == expected


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize(
    ("orientation", "size", "red"),
    [(1, (40, 20), (4, 10)), (3, (40, 20), (35, 10)), (6, (20, 40), (10, 4)), (8, (20, 40), (10, 35))],
)
def test_orientation(form: str, orientation: int, size: tuple[int, int], red: tuple[int, int]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    result = open_image(encoded(red_left(), form, exif=exif))
    assert result.size == size
    pixels = np.asarray(result).astype(int)
    assert abs(pixels[red[1], red[0]] - RED).max() <= 16
    assert abs(pixels[size[1] - 1 - red[1], size[0] - 1 - red[0]] - WHITE).max() <= 16


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"Exif\0\0nonsense", b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01"])
def test_a_broken_exif_block_does_no_harm(exif: bytes) -> None:
    assert open_image(encoded(red_left(), "JPEG", exif=exif)).size == (40, 20)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA"])
def test_embedded_profile_is_converted_to_srgb(mode: str) -> None:
    value = (128,) * 3 if mode.startswith("RGB") else (128,)
    image = Image.new(mode, (40, 20), value + ((77,) if mode.endswith("A") else ()))
    profile = icc_profile("RGB " if mode.startswith("RGB") else "GRAY")
    result = open_image(encoded(image, "PNG", icc_profile=profile))
    expected = round(255 * (1.055 * (128 / 255) ** (1 / 2.4) - 0.055))  # IEC 61966-2-1
    assert expected == 188
    assert abs(np.array(result.getpixel((1, 1))[:3]) - expected).max() <= 1  # type: ignore[index]
    if mode.endswith("A"):
        assert result.getpixel((1, 1))[3] == 77  # type: ignore[index]


@pytest.mark.parametrize("profile", [b"nonsense", icc_profile("GRAY")], ids=["broken", "of another space"])
def test_a_profile_that_does_not_fit_is_passed_over(profile: bytes) -> None:
    result = open_image(encoded(Image.new("RGB", (40, 20), (128, 64, 32)), "PNG", icc_profile=profile))
    assert result.getpixel((1, 1)) == (128, 64, 32)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK", "I;16", "1"])
def test_the_callers_image_is_never_changed(mode: str) -> None:
    image = Image.new(mode, (40, 40), 0)
    exif = image.getexif()
    exif[0x0112] = 6
    image.paste(1, (0, 0, 20, 40))
    before = (image.mode, image.size, image.tobytes(), dict(image.info), dict(image.getexif()))
    result = open_image(image)
    result.paste(WHITE[: len(result.getbands())], (0, 0, 5, 5)) if result.mode == "RGB" else result.putalpha(3)
    assert (image.mode, image.size, image.tobytes(), dict(image.info), dict(image.getexif())) == before


def test_preparing_does_not_change_the_picture() -> None:
    for image in (disc(), scene("white", 96)[0]):
        before = image.tobytes()
        prepared = prepare(image)
        assert prepared.cutout is not None
        prepared.cutout.putalpha(0)
        prepared.rgb.paste(RED, (0, 0, 5, 5))
        assert image.tobytes() == before


# --- bad input -------------------------------------------------------------------------------------------------


def refusal(source: Any) -> str:
    with pytest.raises(InputError) as caught:
        open_image(source)
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


def test_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "empty.png"
    path.touch()
    remedy = "is empty; give a PNG, JPEG, WebP, BMP, TIFF or GIF file."
    assert refusal(path) == f"The picture {str(path)!r} {remedy}"
    assert refusal(b"") == refusal(io.BytesIO()) == f"The picture {remedy}"


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Truncated File Read")
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
@pytest.mark.parametrize("share", [0.5, 0.95, 40, 12])
def test_truncated_file(form: str, share: float) -> None:
    data = encoded(Image.fromarray(noise(64, 64, 3)), form)
    message = refusal(data[: int(share if share > 1 else len(data) * share)])
    assert "damaged or cut short" in message
    assert "save it again as PNG or JPEG" in message


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIC image"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1avif", "an AVIF image"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom", "a video"),
        (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG drawing"),
        (b"%PDF-1.7\n", "a PDF document"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n", "a PostScript file"),
        (b"8BPS\0\x01", "a Photoshop file"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "a web page"),
        (b"glTF\x02\0\0\0", "a GLB model"),
        (b"RIFF\0\0\0\0WAVEfmt ", "a sound or a video"),
        (b"hello, I am not a picture", "a text"),
        (bytes(range(256)), "of an unknown kind"),
    ],
)
def test_a_file_of_another_kind_is_named(data: bytes, kind: str) -> None:
    assert (
        refusal(data) == f"The picture is {kind}, not a PNG, JPEG, WebP, BMP, TIFF or GIF file; save it as PNG or JPEG."
    )


def test_a_path_that_cannot_be_read(tmp_path: Path) -> None:
    assert "does not exist; give the path of a PNG" in refusal(tmp_path / "none.png")
    assert "cannot be read (Is a directory); give the path" in refusal(tmp_path)
    assert "cannot be read (embedded null byte)" in refusal("a\0b")


def test_too_many_pixels_are_refused_from_the_header() -> None:
    message = refusal(png_header(10000, 6000))
    assert message == (
        "The picture has 10000 x 6000 pixels, 60 megapixels, where 40 are allowed; "
        "make it smaller (the model sees at most 1024 x 1024)."
    )
    assert "damaged" in refusal(png_header(5000, 5000))  # fewer pixels: only now the decoder is asked


@pytest.mark.parametrize("side", [10000, 60000])
def test_pixel_bombs(side: int) -> None:
    """Above 89 megapixels Pillow warns, above 179 it refuses by itself."""
    message = refusal(png_header(side, side))
    assert message == "The picture has more than the 40 megapixels that are allowed; make it smaller."


def test_a_large_image_object_is_refused_too() -> None:
    assert "60 megapixels" in refusal(Image.new("1", (10000, 6000)))


def test_too_many_bytes(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    with path.open("wb") as stream:
        stream.truncate(MAX_BYTES + 1)
    message = "has more than the 50 MB that are allowed; make it smaller or save it as JPEG."
    assert refusal(path) == f"The picture {str(path)!r} {message}"


@pytest.mark.parametrize("size", [(1, 1), (15, 400), (400, 15)])
def test_too_small(size: tuple[int, int]) -> None:
    assert refusal(Image.new("RGB", size)) == (
        f"The picture has only {size[0]} x {size[1]} pixels; give one of at least 16 x 16 (1024 x 1024 is best)."
    )
    assert open_image(Image.new("RGB", (16, 16))).size == (16, 16)


def unprepared(image: Image.Image, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        prepare(image, **options)
    return str(caught.value)


@pytest.mark.parametrize("preprocess", [True, False])
def test_fully_transparent(preprocess: bool) -> None:
    image = Image.new("RGBA", (64, 64), (200, 10, 10, 0))
    assert unprepared(image, preprocess=preprocess) == (
        "The picture is fully transparent; give one that shows an object."
    )


@pytest.mark.parametrize("preprocess", [True, False])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_single_colour(preprocess: bool, mode: str) -> None:
    image = open_image(encoded(Image.new(mode, (64, 64), (200, 10, 10)), "PNG"))
    assert unprepared(image, preprocess=preprocess) == (
        "The picture shows a single colour; give one that shows an object."
    )


def test_nothing_opaque_enough() -> None:
    image = disc()
    image.putalpha(image.getchannel("A").point(lambda a: a * 4 // 5))  # 204 is not above the threshold
    assert unprepared(image) == (
        "No part of the picture is more than 80% opaque; give a picture whose object has an alpha of 255."
    )


def test_an_object_of_a_few_pixels() -> None:
    assert unprepared(disc(64, (10, 10, 13, 15))) == (
        "The object in the picture is only 3 x 5 pixels; crop the picture to the object or give a larger one."
    )


def test_no_object_before_the_background() -> None:
    y = np.mgrid[0:128, 0:128][0]
    image = Image.fromarray(np.repeat((100 + y // 2)[..., None], 3, axis=2).astype(np.uint8))
    assert unprepared(image) == (
        "No object was found in front of the background; give a PNG with a transparent background, or turn "
        "preprocess_image off to use the picture as it is."
    )
    unprocessed = prepare(image, preprocess=False)
    assert unprocessed.rgb.tobytes() == image.tobytes()
    assert unprocessed.cutout is None


def test_a_matting_that_finds_nothing() -> None:
    image = Image.fromarray(noise(64, 64, 3))
    assert "No object was found" in unprepared(image, matting=lambda rgb: Image.new("L", rgb.size, 0))


# --- preparing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", golden_cases("preprocess"))
def test_preprocess_equals_the_original(path: Path) -> None:
    meta, tensors = load_golden(path)
    names = sorted(name for name in tensors if name.startswith("rgba"))
    assert names
    for name in names:
        expected = Image.open(io.BytesIO(_bytes(tensors[name.replace("rgba", "out")])))
        prepared = prepare(open_image(_bytes(tensors[name])))
        assert prepared.rgb.mode == expected.mode
        assert prepared.rgb.size == expected.size
        error = np.abs(np.asarray(prepared.rgb).astype(int) - np.asarray(expected)).max()
        assert error <= meta["tol"]["max_abs"]


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.numpy().tobytes()


def test_square_around_the_object() -> None:
    image = disc(64, (16, 20, 41, 44))  # columns 16..40, rows 20..43: side 24 about (28, 31.5)
    prepared = prepare(image)
    assert prepared.cutout is not None
    assert prepared.warnings == ()
    assert prepared.rgb.size == prepared.cutout.size == (24, 24)
    # 31.5 - 12 = 19.5 goes to the even row 20, and rows 20..43 are what is cut out.
    assert prepared.cutout.tobytes() == image.crop((16, 20, 40, 44)).tobytes()
    assert np.abs(np.asarray(prepared.rgb).astype(int) - np.asarray(prepared.cutout)[..., :3]).max() <= 1


def test_square_beyond_the_picture_is_black_and_transparent() -> None:
    prepared = prepare(disc(64, (0, 24, 64, 44)))
    assert prepared.cutout is not None
    assert prepared.cutout.size == (62, 62)
    outside = np.asarray(prepared.cutout)[:18, :, 3]
    assert outside.max() == 0
    assert np.asarray(prepared.rgb)[:18].max() == 0


def test_colour_is_premultiplied_and_the_cutout_is_not() -> None:
    image = Image.new("RGBA", (64, 64), (200, 100, 50, 255))
    image.paste((200, 100, 50, 102), (20, 20, 44, 44))
    prepared = prepare(image)
    assert prepared.rgb.getpixel((31, 31)) == pytest.approx((80, 40, 20), abs=1)
    assert prepared.cutout is not None
    assert prepared.cutout.getpixel((31, 31)) == (200, 100, 50, 102)


def test_large_pictures_are_reduced_to_1024() -> None:
    image = disc(64, (0, 0, 64, 64)).resize((3000, 1500), Image.Resampling.NEAREST)
    image.paste((0, 0, 0, 0), (0, 0, 30, 30))
    prepared = prepare(image)
    assert prepared.rgb.size == (1022, 1022)  # longest side 1024, 1023 between the outermost columns, made even


def test_opaque_alpha_is_no_alpha() -> None:
    picture, _ = scene("white", 128)
    with_alpha = picture.copy()
    with_alpha.putalpha(255)
    assert prepare(with_alpha).rgb.tobytes() == prepare(picture).rgb.tobytes()


def test_matting_network_is_asked_only_without_alpha() -> None:
    seen: list[tuple[str, tuple[int, int]]] = []

    def matting(rgb: Image.Image) -> Image.Image:
        seen.append((rgb.mode, rgb.size))
        alpha = Image.new("L", rgb.size, 0)
        alpha.paste(255, (100, 200, 300, 420))
        return alpha

    prepare(disc(), matting=matting)
    assert seen == []
    image = Image.fromarray(noise(600, 1200, 3))
    prepared = prepare(image, matting=matting)
    assert seen == [("RGB", (1024, 512))]
    assert prepared.cutout is not None
    assert prepared.cutout.size == (218, 218)
    assert prepared.warnings == ()
    small = image.resize((1024, 512), Image.Resampling.LANCZOS)
    assert prepared.cutout.getpixel((109, 109))[:3] == small.getpixel((199, 309))  # type: ignore[index]


def test_without_preprocessing_the_picture_stays_as_it_is() -> None:
    picture, mask = scene("white", 200)
    prepared = prepare(picture, preprocess=False)
    assert prepared.rgb.tobytes() == picture.tobytes()
    assert prepared.cutout is not None
    assert prepared.cutout.size == picture.size
    assert intersection_over_union(np.asarray(prepared.cutout.getchannel("A")) / np.float32(255), mask) > 0.97


def test_a_cutout_that_nobody_wants_is_not_made() -> None:
    def matting(rgb: Image.Image) -> Image.Image:
        raise AssertionError("asked for the background")

    picture, _ = scene("white", 200)
    prepared = prepare(picture, preprocess=False, cutout=False, matting=matting)
    assert prepared.rgb.tobytes() == picture.tobytes()
    assert prepared.cutout is None
    assert prepared.warnings == ()
    # With preprocessing it has to be made, and where there is alpha it is there already.
    assert prepare(picture, cutout=False).cutout is not None
    transparent = disc()
    assert prepare(transparent, preprocess=False, cutout=False, matting=matting).cutout is transparent


def test_without_preprocessing_hidden_colours_stay_hidden() -> None:
    image = disc()
    prepared = prepare(image, preprocess=False)
    pixels, source = np.asarray(prepared.rgb), np.asarray(image)
    solid = source[..., 3] == 255
    assert (pixels[solid] == source[solid][:, :3]).all()
    assert pixels[~solid].max() == 0
    assert source[~solid][:, :3].max() > 0
    assert prepared.cutout is image


# --- background removal ----------------------------------------------------------------------------------------

PLAIN = ["white", "grey", "dark", "gradient"]


@pytest.mark.parametrize("size", [256, 640, 1024])
@pytest.mark.parametrize("kind", PLAIN)
def test_plain_backgrounds(kind: str, size: int) -> None:
    picture, mask = scene(kind, size)
    jpeg = open_image(encoded(picture, "JPEG", quality=90))
    matte = separate(jpeg)
    assert intersection_over_union(matte.alpha, mask) >= 0.97
    assert np.abs(matte.alpha - mask).mean() < 0.005
    assert matte.warnings == ()


def test_the_dark_shadow_that_an_object_stands_in_is_no_part_of_it() -> None:
    """The yellow duck on grey paper: its lowest tenth is yellow."""
    matte = separate(open_image(EXAMPLES / "duck.jpg"))
    rows, columns = np.nonzero(matte.alpha > 0.8)
    assert 0.14 < len(rows) / matte.alpha.size < 0.16
    lowest = rows > rows.max() - 0.1 * np.ptp(rows)
    colour = matte.colour[rows[lowest], columns[lowest]]
    assert (np.ptp(colour, axis=1) < 60).mean() < 0.05
    assert matte.warnings == ()


def test_the_edge_is_soft_and_free_of_the_background() -> None:
    picture, mask = scene("white", 512)
    matte = separate(picture)
    edge = (mask > 0.3) & (mask < 0.7)
    assert ((matte.alpha > 0) & (matte.alpha < 1)).sum() > 0.5 * ((mask > 0) & (mask < 1)).sum()
    assert np.abs(matte.alpha - mask)[edge].mean() < 0.15
    # Half a pixel of white is in the picture's edge, and none in the result's.
    before, after = (image[edge].astype(float).min(axis=1).mean() for image in (np.asarray(picture), matte.colour))
    assert before > 130
    assert after < 80


def test_busy_background_is_tried_and_doubted() -> None:
    picture, mask = scene("busy", 512)
    matte = separate(picture)
    assert intersection_over_union(matte.alpha, mask) > 0.9
    assert matte.warnings[0].startswith(
        "The background was removed by colour and may be wrong, because the background is not plain"
    )
    assert matte.warnings[0].endswith("; give a PNG with a transparent background for a sure result.")


def doubts(image: Image.Image) -> str:
    return " ".join(separate(image).warnings)


def test_object_cut_by_the_border_is_doubted() -> None:
    picture, mask = scene("white", 256)
    cropped, kept = picture.crop((90, 0, 256, 256)), mask[:, 90:]
    assert "because the object touches the edge of the picture;" in doubts(cropped)
    assert intersection_over_union(separate(cropped).alpha, kept) > 0.97


def test_several_objects_are_doubted() -> None:
    picture, _ = scene("white", 128)
    sheet = Image.new("RGB", (256, 128), WHITE)
    sheet.paste(picture, (0, 0))
    sheet.paste(picture, (128, 0))
    assert "because it is in several pieces;" in doubts(sheet)


def test_tiny_and_huge_objects_are_doubted() -> None:
    picture, _ = scene("white", 64)
    sheet = Image.new("RGB", (512, 512), WHITE)
    sheet.paste(picture, (200, 200))
    assert "the object is very small" in doubts(sheet)
    close = Image.new("RGB", (200, 200), WHITE)
    close.paste((40, 60, 90), (8, 8, 192, 192))
    assert "the object fills nearly all of the picture" in doubts(close)


def test_object_in_the_colour_of_its_background_is_doubted() -> None:
    mask = object_mask(256)[..., None]
    y, x = np.mgrid[0:256, 0:256][..., None] * (2 * np.pi / 32)
    fade = np.clip(0.25 + 0.85 * np.sin(x) * np.sin(y), 0, 1)  # blue that fades to the backdrop in places
    colour = np.array([40, 60, 140]) * (1 - fade) + 240 * fade
    picture = (colour * mask + 240 * (1 - mask)).astype(np.uint8)
    assert "because the object and the background have similar colours;" in doubts(Image.fromarray(picture))


def test_warnings_reach_the_caller() -> None:
    assert "not plain" in " ".join(prepare(scene("busy", 256)[0]).warnings)


def test_result_does_not_depend_on_threads_nor_on_what_ran_before() -> None:
    picture, _ = scene("gradient", 400)
    threads = cv2.getNumThreads()
    results = []
    try:
        for count in (1, 2, 4):
            cv2.setNumThreads(count)
            cv2.setRNGSeed(count)
            prepared = prepare(picture)
            assert prepared.cutout is not None
            results.append(prepared.rgb.tobytes() + prepared.cutout.tobytes())
    finally:
        cv2.setNumThreads(threads)
    assert results[0] == results[1] == results[2]


def test_picture_of_any_shape() -> None:
    picture, mask = scene("white", 128)
    wide = Image.new("RGB", (1500, 128), WHITE)
    wide.paste(picture, (600, 0))
    matte = separate(wide)
    assert matte.alpha.shape == (128, 1500)
    assert intersection_over_union(matte.alpha[:, 600:728], mask) > 0.9
    assert max(wide.size) > background.WORK_SIDE


def test_speed_at_1024() -> None:
    picture, _ = scene("gradient", 1024)
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        prepare(picture)
        start = time.process_time()
        prepare(picture)
        seconds = time.process_time() - start
    finally:
        cv2.setNumThreads(threads)
    assert seconds <= 1.5

"""Any picture a user may drop -> the square RGB picture that the model sees, and the object cut out of it."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError, features

from .background import separate
from .errors import InputError

ImageSource = str | Path | bytes | BinaryIO | Image.Image
Matting = Callable[[Image.Image], Image.Image]
"""A network that separates an object: RGB picture -> its coverage, mode L, of the same size."""

MAX_BYTES = 50 * 2**20
MAX_PIXELS = 40_000_000
MIN_SIDE = 16
"""Shortest side of a picture, in pixels."""

WORK_SIDE = 1024
"""Pictures are reduced to this longest side, in pixels, before the object is cut out."""

# Only these decoders are used: Pillow has others that start programs (EPS) or that take any file for theirs (TGA).
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
_READABLE = "PNG, JPEG, WebP, BMP, TIFF or GIF"
_SOLID = 0.8 * 255  # alpha above which a pixel belongs to the object
_MIN_OBJECT = 8  # pixels
_FLAT = 4  # largest difference of values, of 255, within a picture that shows nothing


@dataclass(frozen=True)
class Prepared:
    """A picture, ready for the model.

    rgb: RGB picture that the image encoder sees. cutout: the same picture with its background transparent (RGBA,
    straight alpha), None where no object was found or nobody wanted it. warnings: sentences for the user.
    """

    rgb: Image.Image
    cutout: Image.Image | None
    warnings: tuple[str, ...]


def open_image(source: ImageSource) -> Image.Image:
    """Return an upright 8-bit sRGB picture, mode RGB, or RGBA where the source has transparency.

    source: path, content of a file, binary stream, or PIL image (which stays as it is). PNG, JPEG, WebP, BMP, TIFF
    and GIF are read (the first frame of several), of any depth and colour space; an embedded colour profile and the
    EXIF orientation are applied. Size limits are checked before anything is decoded.
    Raises InputError for everything that cannot be used.
    """
    if isinstance(source, Image.Image):
        label = "The picture"
        picture = source
    else:
        label, data = _read(source)
        picture = _identify(label, data)
    _require_size(label, picture)
    try:
        picture.load()
        # Pillow turns TIFF upright while it decodes, and not every version says so afterwards.
        upright = picture if picture.format == "TIFF" else ImageOps.exif_transpose(picture)
        return _eight_bit_srgb(upright)
    except Exception as error:  # decoders raise whatever they stumble over
        raise InputError(f"{label} is damaged or cut short; save it again as PNG or JPEG ({error}).") from error


def prepare(
    image: Image.Image, *, preprocess: bool = True, cutout: bool = True, matting: Matting | None = None
) -> Prepared:
    """Make the model's view of a picture from ``open_image``.

    preprocess: see ``remove_background``. Without it the picture is used as it is, in its own size and shape, and the
    cut-out has them too. If it has alpha, its colours are used and alpha is not, as the original's image encoder does
    by ``convert("RGB")`` after resizing: fully transparent pixels come out black, whatever colour hides in them.
    cutout: whether the cut-out is wanted for itself; False leaves it out where nothing else needs the background
    removed, which is an opaque picture without ``preprocess``. matting: see ``remove_background``.
    Raises InputError where there is nothing to see: a transparent or single-coloured picture, or no object.
    """
    _require_content(image)
    if preprocess:
        return remove_background(image, matting)
    if _has_transparency(image):
        # To premultiplied alpha and back, which is what a resize does to hidden colours.
        return Prepared(image.convert("RGBa").convert("RGBA").convert("RGB"), image, ())
    rgb = image.convert("RGB")
    if not cutout:
        return Prepared(rgb, None, ())
    matted, warnings = _matted(rgb, matting)
    if not (_alpha(matted) > _SOLID).any():
        return Prepared(rgb, None, ())
    return Prepared(rgb, matted, warnings)


def remove_background(image: Image.Image, matting: Matting | None = None) -> Prepared:
    """Cut the object out of a picture from ``open_image`` and centre it in a square on black.

    The picture's alpha is used if it has any that is not opaque, else ``matting``, else the colours of the border
    (``trellis2.background``). The picture is reduced to at most 1024 pixels; the square has the longer side of the
    box around all alpha above 0.8 and the box's centre; RGB is premultiplied.
    Source: ``preprocess_image`` of the original's image-to-3D pipeline. Raises InputError where no object is found.
    """
    transparent = _has_transparency(image)
    scale = min(1.0, WORK_SIDE / max(image.size))
    if scale < 1:
        size = (max(1, int(image.width * scale)), max(1, int(image.height * scale)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    cutout, warnings = (image, ()) if transparent else _matted(image.convert("RGB"), matting)
    square = cutout.crop(_square(_alpha(cutout), transparent))
    pixels = np.asarray(square, dtype=np.float32) / 255
    # Cut off, not rounded: the model was trained on what the original computes.
    premultiplied = (pixels[..., :3] * pixels[..., 3:] * 255).astype(np.uint8)
    return Prepared(Image.fromarray(premultiplied), square, warnings)


def _matted(rgb: Image.Image, matting: Matting | None) -> tuple[Image.Image, tuple[str, ...]]:
    """Return the picture as RGBA with its object's alpha, and warnings."""
    if matting is None:
        matte = separate(rgb)
        alpha = (matte.alpha * 255 + 0.5).astype(np.uint8)
        return Image.fromarray(np.dstack([matte.colour, alpha])), matte.warnings
    cutout = rgb.copy()
    cutout.putalpha(matting(rgb))
    return cutout, ()


def _square(alpha: NDArray[np.uint8], transparent: bool) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the square around what is solid in ``alpha`` (H, W); it may exceed the picture."""
    solid = alpha > _SOLID
    columns, rows = np.flatnonzero(solid.any(axis=0)), np.flatnonzero(solid.any(axis=1))
    if not len(columns):
        if transparent:
            raise InputError(
                "No part of the picture is more than 80% opaque; give a picture whose object has an alpha of 255."
            )
        raise InputError(
            "No object was found in front of the background; give a PNG with a transparent background, or turn "
            "preprocess_image off to use the picture as it is."
        )
    left, right, top, bottom = (int(v) for v in (columns[0], columns[-1], rows[0], rows[-1]))
    side = max(right - left, bottom - top)
    if side < _MIN_OBJECT:
        raise InputError(
            f"The object in the picture is only {right - left + 1} x {bottom - top + 1} pixels; "
            "crop the picture to the object or give a larger one."
        )
    half = side // 2
    x, y = round((left + right) / 2 - half), round((top + bottom) / 2 - half)
    return x, y, x + 2 * half, y + 2 * half


def _alpha(image: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(image.getchannel("A"))


def _has_transparency(image: Image.Image) -> bool:
    """Whether an RGB or RGBA picture has a pixel that is not opaque."""
    return image.mode == "RGBA" and bool((_alpha(image) < 255).any())


def _require_content(image: Image.Image) -> None:
    if _has_transparency(image):
        if not _alpha(image).any():
            raise InputError("The picture is fully transparent; give one that shows an object.")
        return
    extrema = np.array(image.convert("RGB").getextrema())
    if (extrema[:, 1] - extrema[:, 0]).max() <= _FLAT:
        raise InputError("The picture shows a single colour; give one that shows an object.")


def _read(source: str | Path | bytes | BinaryIO) -> tuple[str, bytes]:
    """Return how to call the picture in a sentence, and the file's content."""
    label = "The picture"
    try:
        if isinstance(source, (str, os.PathLike)):
            label = f"The picture {os.fspath(source)!r}"
            with open(source, "rb") as stream:
                data = stream.read(MAX_BYTES + 1)
        elif isinstance(source, bytes):
            data = source
        else:
            data = source.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise InputError(f"{label} does not exist; give the path of a {_READABLE} file.") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{label} cannot be read ({reason}); give the path of a {_READABLE} file.") from error
    if not data:
        raise InputError(f"{label} is empty; give a {_READABLE} file.")
    if len(data) > MAX_BYTES:
        raise InputError(
            f"{label} has more than the {MAX_BYTES // 2**20} MB that are allowed; make it smaller or save it as JPEG."
        )
    return label, data


def _identify(label: str, data: bytes) -> Image.Image:
    """Read the header; nothing is decoded yet."""
    try:
        return Image.open(io.BytesIO(data), formats=_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(
            f"{label} has more than the {MAX_PIXELS // 10**6} megapixels that are allowed; make it smaller."
        ) from error
    except UnidentifiedImageError as error:
        kind = _kind(data)
        if kind in _READABLE:
            raise InputError(
                f"{label} is a {kind} file, but damaged or cut short; save it again as PNG or JPEG."
            ) from error
        raise InputError(f"{label} is {kind}, not a {_READABLE} file; save it as PNG or JPEG.") from error
    except Exception as error:  # as above
        raise InputError(f"{label} is damaged or cut short; save it again as PNG or JPEG ({error}).") from error


def _kind(data: bytes) -> str:
    """What a file looks like: a name from ``_READABLE``, or a noun with its article."""
    head = data[:1024]
    if head[4:8] == b"ftyp":
        brands = head[8:40]
        if b"avif" in brands or b"avis" in brands:
            return "an AVIF image"
        if any(brand in brands for brand in (b"heic", b"heix", b"hevc", b"heim", b"mif1", b"msf1")):
            return "a HEIC image"
        return "a video"
    if head[:4] == b"RIFF":
        return "WebP" if head[8:12] == b"WEBP" else "a sound or a video"
    signatures = {
        b"\x89PNG": "PNG",
        b"\xff\xd8\xff": "JPEG",
        b"GIF8": "GIF",
        b"BM": "BMP",
        b"II*\0": "TIFF",
        b"MM\0*": "TIFF",
        b"%PDF": "a PDF document",
        b"%!PS": "a PostScript file",
        b"8BPS": "a Photoshop file",
        b"PK\x03\x04": "a ZIP archive",
        b"glTF": "a GLB model",
        b"\xff\x0a": "a JPEG XL image",
        b"\0\0\0\x0cJXL ": "a JPEG XL image",
        b"\0\0\0\x0cjP  ": "a JPEG 2000 image",
        b"\0\0\1\0": "an icon",
        b"v/1\1": "an OpenEXR image",
        b"#?RADIANCE": "a Radiance HDR image",
        b"\x1aE\xdf\xa3": "a video",
    }
    for signature, name in signatures.items():
        if head.startswith(signature):
            return name
    text = head.lower()
    if b"<svg" in text:
        return "an SVG drawing"
    if b"<html" in text or b"<!doctype html" in text:
        return "a web page"
    if b"\0" not in head and head.isascii():
        return "a text"
    return "of an unknown kind"


def _require_size(label: str, image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise InputError(
            f"{label} has {width} x {height} pixels, {width * height / 1e6:.0f} megapixels, where "
            f"{MAX_PIXELS // 10**6} are allowed; make it smaller (the model sees at most {WORK_SIDE} x {WORK_SIDE})."
        )
    if min(width, height) < MIN_SIDE:
        raise InputError(
            f"{label} has only {width} x {height} pixels; give one of at least {MIN_SIDE} x {MIN_SIDE} "
            f"({WORK_SIDE} x {WORK_SIDE} is best)."
        )


def _eight_bit_srgb(image: Image.Image) -> Image.Image:
    """A new RGB or RGBA picture from a decoded one in any mode."""
    profile = image.info.get("icc_profile")
    if image.mode == "F" or image.mode.startswith("I"):
        image = _grey_from_deep(image)
    alpha = None
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        grey = image.mode in ("L", "LA", "La")
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        image = image.convert("L" if grey else "RGB")
    elif image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("RGB")
    colour = _managed(image, profile) if profile else image.convert("RGB")  # a copy, even of RGB
    if alpha is not None:
        colour.putalpha(alpha)
    return colour


def _grey_from_deep(image: Image.Image) -> Image.Image:
    """Mode L from 16-bit grey (modes I;16*, and I, which older Pillow uses), and from floating point in [0, 1]."""
    values: NDArray[Any] = np.asarray(image)
    full = 1.0 if image.mode == "F" else 65535.0
    return Image.fromarray((np.clip(values / full, 0, 1) * 255 + 0.5).astype(np.uint8))


def _managed(image: Image.Image, profile: bytes) -> Image.Image:
    """RGB in sRGB of a picture (L, RGB or CMYK) with an ICC profile; one that does not fit is passed over."""
    spaces = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}
    if features.check("littlecms2"):
        try:
            embedded = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            fits = embedded.profile.xcolor_space.strip() == spaces[image.mode]
            # The standard's own profile would only add rounding errors.
            if fits and "sRGB" not in ImageCms.getProfileDescription(embedded):
                standard = ImageCms.createProfile("sRGB")
                managed = ImageCms.profileToProfile(image, embedded, standard, outputMode="RGB")
                assert managed is not None  # it is only when converting in place
                return managed
        except (OSError, ImageCms.PyCMSError):
            pass
    return image.convert("RGB")

"""Image files to pixels: decoded strictly, resized once, the same for every method.

Nothing is repaired and nothing is guessed. A file that is cut short is refused, and whatever decoding changes about an
accepted one (16 bits scaled to 8, an opaque alpha channel dropped, CMYK turned into RGB) is said in a note.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import imagecodecs
import numpy as np
from PIL import Image, UnidentifiedImageError
from scipy.fft import dctn

from al_models.errors import InvalidInput

FORMATS = ("BMP", "JPEG", "PNG", "TIFF", "WEBP")
MAX_PIXELS = 89_478_485
"""Larger images are refused (Pillow's own limit for a decompression bomb: 256 MiB of RGB)."""

_ORIENTATION = 0x0112
_BITS_PER_SAMPLE = 258
_GRAY = ("1", "L", "LA", "La", "I;16", "I;16B", "I;16L", "I;16N")
_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
# What Pillow raises for bytes that are no image, or not a whole one.
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error, zlib.error)
_TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)


@dataclass(frozen=True)
class Decoded:
    """One image file, and what was seen while decoding it."""

    pixels: np.ndarray
    """uint8 (h, w) for gray, (h, w, 3) for colour (RGB)."""
    width: int
    height: int
    format: str
    """Pillow's word for the file's format (`PNG`, `JPEG`, ...)."""
    mode: str
    """Pillow's word for the file's pixels (`L`, `RGB`, `I;16`, `P`, ...)."""
    bit_depth: int
    """16, or 8 for everything that 8 bits a channel hold without loss."""
    n_channels: int
    """Channels of `pixels`: 1 or 3."""
    note: str | None
    """What decoding changed or did not apply, in words; None when there is nothing to say."""
    orientation: int = 1
    """The file's EXIF orientation, which is not applied; 1: none."""


def decode(data: bytes) -> Decoded:
    """The pixels of an image file, whole and unrepaired.

    EXIF orientation is not applied (a camera on a line does not turn), only noted. Raises InvalidInput for bytes that
    are no image or not a whole one, for real transparency, for pixels beyond 16 bits, and above `MAX_PIXELS`.
    """
    image, frames, pixels = _load(data)
    bits = _bit_depth(image, data)
    turned = _orientation(image)
    notes = [None if turned == 1 else f"EXIF orientation {turned} was not applied"]
    notes.append(f"only the first of {frames} frames was read" if frames > 1 else None)
    if pixels is None and image.mode.startswith("I"):
        # 65535 / 255 = 257: black stays black and white stays white.
        pixels = np.rint(np.asarray(image) / np.float32(257)).astype(np.uint8)
        notes.append("16-bit gray values were scaled by 1/257 to 8 bits")
    elif pixels is None:
        pixels = np.asarray(_to_gray_or_rgb(image, notes))
        if bits == 16:
            notes.append("16-bit colour values were cut to their upper 8 bits")
    return Decoded(
        pixels=pixels,
        width=image.width,
        height=image.height,
        format=image.format or "",
        mode=image.mode,
        bit_depth=bits,
        n_channels=1 if pixels.ndim == 2 else 3,
        note="; ".join(note for note in notes if note) or None,
        orientation=turned,
    )


def is_gray(path: str | Path) -> bool | None:
    """Whether a file's header announces a gray image; None when no header can be read. Decodes no pixel."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.mode in (*_GRAY, "I")
    except (*_BROKEN, *_TOO_LARGE):
        return None


def resize(pixels: np.ndarray, size: int) -> np.ndarray:
    """The image as a square of `size` pixels: uint8 [h, w(, 3)] -> uint8 [size, size(, 3)].

    This is the one interpolation every method sees: bilinear, antialiased when it shrinks (Pillow's BILINEAR, whose
    triangle filter widens with the factor); the aspect ratio is not kept. Raises InvalidInput for other arrays.
    """
    shaped = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)
    if pixels.dtype != np.uint8 or not shaped or 0 in pixels.shape:
        raise InvalidInput(
            f"resize was given {pixels.dtype} {list(pixels.shape)}; it takes uint8 [h, w] or [h, w, 3]: scale to "
            f"0..255 and move the channels last"
        )
    if size < 1:
        raise InvalidInput(f"image size {size} is not a side in pixels; give at least 1, such as 256")
    if pixels.shape[:2] == (size, size):
        return pixels
    # Rows first, then columns, each rounded to whole levels: left to itself, Pillow 13 takes tall images the other way
    # round, and a quarter of their values would be a level off those of earlier versions and of exported graphs.
    rows = Image.fromarray(pixels).resize((size, pixels.shape[0]), Image.Resampling.BILINEAR)
    return np.asarray(rows.resize((size, size), Image.Resampling.BILINEAR))


def light(pixels: np.ndarray) -> dict[str, float]:
    """Brightness and contrast, mean and standard deviation in 0..255, and `sharpness` of a resized image."""
    return {"brightness": float(pixels.mean()), "contrast": float(pixels.std()), "sharpness": sharpness(pixels)}


def sharpness(pixels: np.ndarray) -> float:
    """Variance of the Laplacian of the gray image: uint8 [h, w(, 3 or 1)] -> a number that falls with blur.

    Pech-Pacheco et al. 2000, "Diatom autofocusing in brightfield microscopy"; comparable at one image size only.
    """
    gray = pixels.astype(np.float32) if pixels.ndim == 2 else pixels.mean(axis=2, dtype=np.float32)
    inner = gray[1:-1, 1:-1]
    return float((gray[:-2, 1:-1] + gray[2:, 1:-1] + gray[1:-1, :-2] + gray[1:-1, 2:] - 4 * inner).var())


def perceptual_hash(pixels: np.ndarray) -> bytes:
    """256 bits that near-duplicates share: uint8 [h, w(, 3 or 1)] -> 32 bytes.

    Which of the 16 x 16 lowest frequencies of the image at 64 x 64 lie above their median (Zauner 2010, "Implementation
    and benchmarking of perceptual image hash functions"), the mean brightness left out.
    """
    gray = pixels if pixels.ndim == 2 else np.rint(pixels.mean(axis=2, dtype=np.float32)).astype(np.uint8)
    small = Image.fromarray(gray).resize((64, 64), Image.Resampling.BILINEAR)
    low = dctn(np.asarray(small, dtype=np.float32))[:16, :16]
    low[0, 0] = 0
    return np.packbits(low > np.median(low)).tobytes()


def load_images(paths: Sequence[str | Path], size: int) -> np.ndarray:
    """Image files as one array, uint8 [n, size, size, 3]; gray ones repeat their channel.

    Raises InvalidInput, naming the file, for one that `decode` refuses.
    """
    images = np.empty((len(paths), size, size, 3), dtype=np.uint8)  # (n, h, w, 3)

    def load(row: int) -> None:
        try:
            small = resize(decode(Path(paths[row]).read_bytes()).pixels, size)
        except InvalidInput as error:
            raise InvalidInput(f"{paths[row]}: {error}") from error
        images[row] = small if small.ndim == 3 else small[..., None]

    with ThreadPoolExecutor() as pool:  # Pillow decodes and resizes without the interpreter's lock
        list(pool.map(load, range(len(paths))))
    return images


def _load(data: bytes) -> tuple[Image.Image, int, np.ndarray | None]:
    """The first image of a file, the number of images in it, and its pixels where they need no conversion."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise InvalidInput(_too_large(f"{image.width}x{image.height} px"))
        frames = getattr(image, "n_frames", 1)  # asked first: loading may let go of the file
        pixels = _plain_png(image, data)
        if pixels is None:
            image.load()
    except _TOO_LARGE as error:
        raise InvalidInput(_too_large(str(error))) from error
    except UnidentifiedImageError as error:
        raise InvalidInput(
            f"not an image that can be read ({len(data)} bytes); expected the content of a {', '.join(FORMATS)} file: "
            f"export it again"
        ) from error
    except InvalidInput:
        raise
    except _BROKEN as error:
        raise InvalidInput(f"damaged or cut short ({error}); copy or export the file again") from error
    if image.mode == "F" or (image.mode == "I" and (_bit_depth(image, data) > 16 or np.asarray(image).min() < 0)):
        raise InvalidInput(f"pixels of mode {image.mode} go beyond 0..65535; export the image with 8 bits a channel")
    return image, frames, pixels


def _plain_png(image: Image.Image, data: bytes) -> np.ndarray | None:
    """The pixels of an 8-bit gray or RGB PNG by libpng, in 4/5 (gray) and 3/5 (RGB) of Pillow's time; the same ones.

    None for other files, and for damaged ones: Pillow says what is wrong with them. An EXIF chunk behind the pixels
    is seen only by Pillow.
    """
    plain = image.format == "PNG" and image.mode in ("L", "RGB") and data[24] == 8 and not image.is_animated
    if not plain or "transparency" in image.info or b"eXIf" in data:
        return None
    try:
        return np.asarray(imagecodecs.png_decode(data))
    except imagecodecs.PngError:
        return None


def _too_large(given: str) -> str:
    return f"too large: {given}, at most {MAX_PIXELS} pixels are accepted; crop or tile the image"


def _bit_depth(image: Image.Image, data: bytes) -> int:
    """From the file, because Pillow opens 16-bit colour as plain RGB."""
    if image.format == "PNG":
        bits = data[24]  # the header chunk's bit depth always lies there
    elif image.format == "TIFF":
        bits = max(image.tag_v2.get(_BITS_PER_SAMPLE, (8,)))  # type: ignore[attr-defined]
    else:
        bits = 8
    return max(8, bits)


def _to_gray_or_rgb(image: Image.Image, notes: list[str | None]) -> Image.Image:
    """The image in mode L or RGB; what is lost on the way goes to the notes."""
    gray = image.mode in _GRAY
    try:
        if image.has_transparency_data:
            _refuse_transparency(image)
            if image.mode in _ALPHA:
                notes.append("the alpha channel is opaque and was dropped")
            image = image.convert("RGBA")  # a palette with transparency converts cleanly by this way only
        elif image.mode in ("CMYK", "YCbCr", "LAB"):
            notes.append(f"{image.mode} was converted to RGB without a colour profile")
        return image.convert("L" if gray else "RGB")
    except _BROKEN as error:
        if isinstance(error, InvalidInput):
            raise
        raise InvalidInput(f"pixels of mode {image.mode} cannot be read as gray or RGB; export as PNG") from error


def _refuse_transparency(image: Image.Image) -> None:
    alpha = image.convert("RGBA").getchannel("A")
    share = 1 - alpha.histogram()[255] / (image.width * image.height)
    if share > 0:
        raise InvalidInput(
            f"{share:.1%} of the pixels are transparent, and what lies under them is not known; export the image "
            f"without an alpha channel, on the background the camera saw"
        )


def _orientation(image: Image.Image) -> int:
    if "exif" not in image.info:
        return 1
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged metadata says nothing about the pixels
        return 1

"""Image files to pixels: decoded strictly, resized once, the same for every method.

Nothing is repaired and nothing is guessed. A file that is cut short is refused, and whatever decoding changes about an
accepted one (more bits scaled to 8, an opaque alpha channel dropped, CMYK turned into RGB) is said in a note.
"""

from __future__ import annotations

import io
import math
import struct
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import imagecodecs
import numpy as np
import tifffile
from PIL import Image, UnidentifiedImageError
from scipy.fft import dctn

from al_models.errors import InvalidInput

FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP")
_OTHERS = {"JXL": (b"\x00\x00\x00\x0cJXL ", b"\xff\x0a"), "JXR": (b"II\xbc",)}
"""Formats that Pillow does not read, by their first bytes."""
WHOLE = 65535.0
"""The largest value of 16 bits."""
MAX_PIXELS = 89_478_485
"""Larger images are refused (Pillow's own limit for a decompression bomb: 256 MiB of RGB)."""

_ORIENTATION = 0x0112
_BITS_PER_SAMPLE = 258
_GRAY = ("1", "L", "LA", "La", "I;16", "I;16B", "I;16L", "I;16N")
_DEEP = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")
_ONE_CHANNEL = (*_GRAY, "I", "F")
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
    """Bits a channel of the file; 8 for everything that 8 bits hold without loss."""
    n_channels: int
    """Channels of `pixels`: 1 or 3."""
    note: str | None
    """What decoding changed or did not apply, in words; None when there is nothing to say."""
    orientation: int = 1
    """The file's EXIF orientation, which is not applied; 1: none."""
    highest: float | None = None
    """The largest value in the file; None where 8 bits a channel hold all."""
    beyond: float = 0.0
    """Share of the values that are larger than the range, and were taken for white."""


def decode(data: bytes, white: float | None = None) -> Decoded:
    """The pixels of an image file, whole and unrepaired.

    `white`: the value that becomes 255 where a file has more than 8 bits a channel (`learned_white`); None: the largest
    of 16 bits, and in files of floating-point numbers 1 or 255. EXIF orientation is not applied (a camera on a line
    does not turn), only noted. Raises InvalidInput for bytes that are no image or not a whole one, for real
    transparency, for values that are negative or beyond 16 bits, and above `MAX_PIXELS`.
    """
    image, frames, pixels = _load(data)
    bits = _bit_depth(image, data)
    turned = _orientation(image)
    notes = [None if turned == 1 else f"EXIF orientation {turned} was not applied"]
    notes.append(f"only the first of {frames} frames was read" if frames > 1 else None)
    deep = _deep(image, data, bits) if pixels is None else None
    beyond = 0.0
    if deep is not None:
        shown = _to_gray_or_rgb(image, notes) if image.mode in ("RGB", *_ALPHA) else None  # which refuses transparency
        pixels, beyond = _scaled(deep, white, notes, None if shown is None else np.asarray(shown))
    elif pixels is None:
        pixels = np.asarray(_to_gray_or_rgb(image, notes))
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
        highest=None if deep is None else float(deep.max()),
        beyond=beyond,
    )


def _scaled(
    deep: np.ndarray, white: float | None, notes: list[str | None], upper: np.ndarray | None
) -> tuple[np.ndarray, float]:
    """Values as uint8, and the share of them beyond `white`. `upper`: the upper 8 bits of colour values, else None."""
    real = deep.dtype.kind == "f"
    if white is None and real:
        white = 1.0 if deep.max() <= 1 else 255.0
        notes.append(f"floating-point values were taken for 0 to {white:g}")
    white = WHOLE if white is None else white
    beyond = float((deep > white).mean())
    if white == WHOLE and upper is not None:
        notes.append("16-bit colour values were cut to their upper 8 bits")
        return upper, beyond
    if white == WHOLE:
        # 65535 / 255 = 257: black stays black and white stays white.
        notes.append(f"{'floating-point' if real else '16-bit gray'} values were scaled by 1/257 to 8 bits")
        return np.rint(deep / np.float32(257)).astype(np.uint8), beyond
    if not real or white not in (1.0, 255.0):
        notes.append(f"values of 0 to {white:g} were scaled to 8 bits")
    values = np.minimum(deep, white).astype(np.float32)
    if white > 255:  # the upper 8 bits, which are what the same camera gives where it is set to 8
        return (values * np.float32(256 / (white + 1))).astype(np.uint8), beyond
    return np.rint(values * np.float32(255 / white)).astype(np.uint8), beyond


def learned_white(highest: Iterable[float]) -> float | None:
    """The white that good images were taken with, from the largest value of each image with more than 8 bits: the
    largest value of the fewest bits, 8 to 16, that hold all values; 1 where all are fractions; None without any.

    Images that need over two bits more than the median are left out, since one with a hot pixel, or of another export,
    would leave the others a few gray levels. None of this depends on order.
    """
    bits = sorted(0 if value <= 1 else max(8, math.ceil(math.log2(value + 1))) for value in highest)
    if not bits:
        return None
    most = max(one for one in bits if one <= bits[(len(bits) - 1) // 2] + 2)
    return float(2**most - 1) if most else 1.0


def highest_value(data: bytes) -> float | None:
    """The largest value of a file with more than 8 bits a channel, at least 255 where they are whole numbers; None of
    another file, and of one that `decode` refuses."""
    try:
        image, _, pixels = _load(data)
        deep = _deep(image, data, _bit_depth(image, data)) if pixels is None else None
    except InvalidInput:
        return None
    if deep is None:
        return None
    return float(deep.max()) if deep.dtype.kind == "f" else max(255.0, float(deep.max()))


@dataclass(frozen=True)
class Header:
    """What a file's header announces."""

    gray: bool
    deep: bool
    """Whether it has more than 8 bits a channel."""


def header_of(path: str | Path) -> Header | None:
    """What a file's header announces; None when none can be read. Decodes no pixel but of rare formats."""
    try:
        with open(path, "rb") as file:
            start = file.read(32)
        if _other_format(start):
            image = _load(Path(path).read_bytes())[0]
            return Header(image.mode in _ONE_CHANNEL, image.mode in _DEEP)
        with Image.open(path, formats=FORMATS) as image:
            deep = image.mode in _DEEP or _bit_depth(image, start) > 8
            return Header(image.mode in _ONE_CHANNEL, deep)
    except (*_BROKEN, *_TOO_LARGE):
        return None


def is_gray(path: str | Path) -> bool | None:
    """Whether a file's header announces a gray image; None when no header can be read. Decodes no pixel."""
    header = header_of(path)
    return header and header.gray


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


def load_images(paths: Sequence[str | Path], size: int, white: float | None = None) -> np.ndarray:
    """Image files as one array, uint8 [n, size, size, 3]; gray ones repeat their channel. `white` as in
    `decode`.

    Raises InvalidInput, naming the file, for one that `decode` refuses.
    """
    images = np.empty((len(paths), size, size, 3), dtype=np.uint8)  # (n, h, w, 3)

    def load(row: int) -> None:
        try:
            small = resize(decode(Path(paths[row]).read_bytes(), white).pixels, size)
        except InvalidInput as error:
            raise InvalidInput(f"{paths[row]}: {error}") from error
        images[row] = small if small.ndim == 3 else small[..., None]

    with ThreadPoolExecutor() as pool:  # Pillow decodes and resizes without the interpreter's lock
        list(pool.map(load, range(len(paths))))
    return images


def _load(data: bytes) -> tuple[Image.Image, int, np.ndarray | None]:
    """The first image of a file, the number of images in it, and its pixels where they need no conversion."""
    try:
        image = _opened_by_imagecodecs(data) or Image.open(io.BytesIO(data), formats=FORMATS)
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
    if image.mode in ("I", "F"):
        low, high = (float(value) for value in (np.min(image), np.max(image)))
        if not 0 <= low <= high <= WHOLE:  # which NaN is not, either
            raise InvalidInput(
                f"values of {low:g} to {high:g}, negative, no numbers or beyond 65535; export the image with values of "
                f"0 to 65535, or with 8 bits a channel"
            )
    return image, frames, pixels


def _other_format(start: bytes) -> str | None:
    return next((name for name, firsts in _OTHERS.items() if start.startswith(firsts)), None)


def _opened_by_imagecodecs(data: bytes) -> Image.Image | None:
    """An image in one of `_OTHERS`, with 8 bits a channel or gray with 16."""
    form = _other_format(data[:32])
    if form is None:
        return None
    try:
        values = imagecodecs.jpegxl_decode(data) if form == "JXL" else imagecodecs.jpegxr_decode(data)
        if values.dtype == np.uint16 and values.ndim == 3:
            raise InvalidInput("colour of 16 bits in this format is not read; export as PNG")
        image = Image.fromarray(values)
    except (imagecodecs.JpegxlError, imagecodecs.JpegxrError, TypeError, RuntimeError) as error:
        raise InvalidInput(f"damaged or cut short ({error}); copy or export the file again") from error
    image.format = form
    return image


def _deep(image: Image.Image, data: bytes, bits: int) -> np.ndarray | None:
    """The values of a loaded image with more than 8 bits a channel, (h, w) or (h, w, 3); None of another image, and
    where only the upper 8 bits can be read."""
    if image.mode in _DEEP:
        return np.asarray(image)
    if bits <= 8 or image.mode not in ("L", "RGB", *_ALPHA):
        return None
    try:
        values = imagecodecs.png_decode(data) if image.format == "PNG" else tifffile.imread(io.BytesIO(data), key=0)
    except (*_BROKEN, imagecodecs.PngError, RuntimeError):
        return None
    if values.ndim == 3 and values.shape[0] in (3, 4) and values.shape[1:] == (image.height, image.width):
        values = np.moveaxis(values, 0, 2)
    if values.dtype != np.uint16 or values.shape[:2] != (image.height, image.width):
        return None
    if values.ndim == 3:
        values = values[..., 0] if values.shape[2] < 3 else values[..., :3]
    return values


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
    """Bits a channel, at least 8, as the file says, since Pillow opens 16-bit colour as plain RGB."""
    if image.format == "PNG":
        bits = data[24]  # the header chunk's bit depth always lies there
    elif image.format == "TIFF":
        bits = max(np.atleast_1d(image.tag_v2.get(_BITS_PER_SAMPLE, 8)).tolist())  # type: ignore[attr-defined]
    else:
        bits = 16 if image.mode in _DEEP else 8
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

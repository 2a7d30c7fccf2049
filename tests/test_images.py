"""Decoding: strict, nothing guessed; resizing: antialiased, the same for all."""

from __future__ import annotations

import io
import struct
import zlib

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from al_models.errors import InvalidInput
from al_models.parts import images
from al_models.parts.images import (
    decode,
    highest_value,
    is_gray,
    learned_white,
    load_images,
    perceptual_hash,
    resize,
    sharpness,
)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def encode(image: Image.Image | np.ndarray, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, form, **options)
    return buffer.getvalue()


def png_rgb16(values: np.ndarray) -> bytes:
    """Pillow writes no 16-bit colour, so the file is put together by hand."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    h, w, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_gray_and_colour_pixels_come_back_unchanged():
    gray, colour = noise(20, 30), noise(20, 30, 3)
    for pixels, mode, channels in ((gray, "L", 1), (colour, "RGB", 3)):
        for form in ("PNG", "BMP", "TIFF"):
            decoded = decode(encode(pixels, form))
            np.testing.assert_array_equal(decoded.pixels, pixels)
            facts = (decoded.width, decoded.height, decoded.mode, decoded.bit_depth, decoded.n_channels, decoded.note)
            assert facts == (30, 20, mode, 8, channels, None)


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "JPEG", "WEBP"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_a_file_cut_short_is_refused(form, share):
    data = encode(noise(64, 64), form)
    with pytest.raises(InvalidInput, match=r"cut short|not an image"):
        decode(data[: int(share * len(data))])


def test_a_flipped_bit_in_a_png_is_refused_and_never_read_as_other_pixels():
    pixels = noise(32, 32)
    data = encode(pixels)
    for position in range(60, len(data) - 16, 101):
        damaged = bytearray(data)
        damaged[position] ^= 0x55
        with pytest.raises(InvalidInput):
            decode(bytes(damaged))


@pytest.mark.parametrize("data", [b"", b"this is text\n", b"%PDF-1.4 ...", b"\x89PNG\r\n\x1a\n"])
def test_bytes_that_are_no_image_are_refused(data):
    with pytest.raises(InvalidInput, match=r"not an image|cut short"):
        decode(data)


def test_sixteen_bit_gray_is_scaled_linearly_and_noted():
    values = np.array([[0, 128, 257, 1000, 32768, 65535]], dtype=np.uint16)
    for form in ("PNG", "TIFF"):
        decoded = decode(encode(values, form))
        np.testing.assert_array_equal(decoded.pixels, [[0, 0, 1, 4, 128, 255]])
        assert decoded.bit_depth == 16
        assert decoded.n_channels == 1
        assert "1/257" in decoded.note


def test_sixteen_bit_colour_is_found_out_although_pillow_opens_it_as_rgb():
    decoded = decode(png_rgb16(np.full((4, 5, 3), 0xABCD, dtype=np.uint16)))
    assert decoded.mode == "RGB"
    assert decoded.bit_depth == 16
    assert "upper 8 bits" in decoded.note
    assert (decoded.pixels == 0xAB).all()


@pytest.mark.parametrize("bits", [8, 9, 10, 11, 12, 13, 14])
@pytest.mark.parametrize("form", ["PNG", "TIFF", "float TIFF", "signed TIFF", "RGB PNG", "JXL"])
def test_values_of_fewer_bits_than_the_file_are_scaled_from_the_learned_range(bits, form):
    small = noise(16, 16)
    small[0, 0] = 255
    values = small.astype(np.uint16) * 2 ** (bits - 8)
    data = {
        "RGB PNG": lambda: png_rgb16(np.dstack([values] * 3)),
        "float TIFF": lambda: encode(values.astype(np.float32), "TIFF"),
        "signed TIFF": lambda: tiff(values.astype(np.int16)),
        "JXL": lambda: imagecodecs.jpegxl_encode(values, lossless=True),
    }.get(form, lambda: encode(values, form))()
    highest = highest_value(data)
    assert highest == values.max()
    white = learned_white([highest])
    assert white == 2**bits - 1
    decoded = decode(data, white)
    pixels = decoded.pixels if decoded.pixels.ndim == 2 else decoded.pixels[..., 1]
    np.testing.assert_array_equal(pixels, small)
    assert decoded.beyond == 0


def tiff(values):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values)
    return buffer.getvalue()


def test_sixteen_bits_stay_to_the_bit_and_eight_bits_have_no_range():
    values = np.random.default_rng(0).integers(0, 65536, (8, 8), dtype=np.uint16)
    values[0, 0] = 65535
    gray, colour = encode(values), png_rgb16(np.dstack([values] * 3))
    white = learned_white([highest_value(gray), highest_value(colour)])
    assert white == 65535
    np.testing.assert_array_equal(decode(gray, white).pixels, np.rint(values / np.float32(257)))
    np.testing.assert_array_equal(decode(colour, white).pixels, np.dstack([values >> 8] * 3))
    eight = encode(noise(8, 8))
    assert highest_value(eight) is None
    assert learned_white([]) is None
    np.testing.assert_array_equal(decode(eight, 4095.0).pixels, decode(eight).pixels)


def test_a_hot_pixel_or_an_image_of_another_export_does_not_widen_the_range():
    assert learned_white([4000, 3900, 65535, 4095]) == 4095
    assert learned_white([65535, 1000, 900]) == 1023
    assert learned_white([4000, 3000, 500, 16000]) == 16383, "bright and dark good images are all held"
    assert learned_white([0.9, 1.0, 0.2, 255.0]) == 1
    values = np.full((4, 4), 1000, np.uint16)
    values[0] = 65535
    decoded = decode(encode(values), 4095.0)
    assert (decoded.beyond, decoded.highest) == (0.25, 65535)
    assert (decoded.pixels[0] == 255).all()


@pytest.mark.parametrize(
    ("values", "white", "first"),
    [([0.0, 0.5, 1.0], 1.0, 128), ([0.0, 128.0, 255.0], 255.0, 128), ([0.0, 32768.0, 65535.0], 65535.0, 128)],
)
def test_floating_point_values_are_read(values, white, first):
    data = encode(np.array([values], np.float32), "TIFF")
    assert learned_white([highest_value(data)]) == white
    assert decode(data, white).pixels.tolist() == [[0, first, 255]]
    if white <= 255:
        alone = decode(data)
        assert alone.pixels.tolist() == [[0, first, 255]]
        assert f"taken for 0 to {white:g}" in alone.note


def test_values_beyond_sixteen_bits_below_zero_and_no_numbers_are_refused():
    odd = [np.full((4, 4), 70000, np.int32), np.full((4, 4), -1, np.float32), np.full((4, 4), 7e4, np.float32)]
    for pixels in (*odd, np.full((4, 4), np.nan, np.float32)):
        with pytest.raises(InvalidInput, match="beyond"):
            decode(encode(pixels, "TIFF"))
    with pytest.raises(InvalidInput, match="values of -5 to -5, negative"):
        decode(tiff(np.full((4, 4), -5, np.int16)))


@pytest.mark.parametrize("form", ["GIF", "JPEG2000", "PPM", "TGA", "PCX", "AVIF", "QOI"])
def test_rarer_formats_are_read(form):
    decoded = decode(encode(noise(16, 16) if form in ("GIF", "PPM", "TGA", "PCX") else noise(16, 16, 3), form))
    assert decoded.pixels.shape[:2] == (16, 16)


def test_an_opaque_alpha_channel_is_dropped_with_a_note():
    colour = noise(8, 8, 3)
    decoded = decode(encode(np.dstack([colour, np.full((8, 8), 255, np.uint8)])))
    np.testing.assert_array_equal(decoded.pixels, colour)
    assert decoded.mode == "RGBA"
    assert "alpha" in decoded.note
    gray = decode(encode(Image.fromarray(colour[..., 0]).convert("LA")))
    np.testing.assert_array_equal(gray.pixels, colour[..., 0])


def test_real_transparency_is_refused_with_its_share():
    alpha = np.full((8, 8), 255, np.uint8)
    alpha[0] = 254
    with pytest.raises(InvalidInput, match=r"12\.5% of the pixels are transparent"):
        decode(encode(np.dstack([noise(8, 8, 3), alpha])))
    palette = Image.fromarray(noise(8, 8, 3)).quantize(4)
    with pytest.raises(InvalidInput, match="transparent"):
        decode(encode(palette, transparency=0))


def test_palette_and_one_bit_and_cmyk_images_are_read():
    colour = np.zeros((8, 8, 3), np.uint8)
    colour[:, 4:] = (200, 10, 60)
    palette = decode(encode(Image.fromarray(colour).quantize(2)))
    np.testing.assert_array_equal(palette.pixels, colour)
    one_bit = decode(encode(Image.fromarray(colour[..., 0]).convert("1")))
    assert set(np.unique(one_bit.pixels)) == {0, 255}
    assert one_bit.bit_depth == 8
    cmyk = decode(encode(Image.fromarray(colour).convert("CMYK"), "TIFF"))
    assert cmyk.n_channels == 3
    assert "CMYK" in cmyk.note


def test_exif_orientation_is_noted_and_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    for form in ("JPEG", "PNG"):
        decoded = decode(encode(noise(20, 30), form, exif=exif.tobytes()))
        assert decoded.pixels.shape == (20, 30)
        assert "orientation 6 was not applied" in decoded.note


def test_only_the_first_frame_is_read_and_it_is_said():
    first, second = noise(8, 8), 255 - noise(8, 8)
    data = encode(Image.fromarray(first), "TIFF", save_all=True, append_images=[Image.fromarray(second)])
    decoded = decode(data)
    np.testing.assert_array_equal(decoded.pixels, first)
    assert "first of 2 frames" in decoded.note


def test_decompression_bombs_are_refused_before_decoding():
    def header(side: int) -> bytes:
        body = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
        return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))

    for side in (10_000, 30_000):  # Pillow warns of the first and refuses the second
        with pytest.raises(InvalidInput, match="too large"):
            decode(header(side) + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT")))


def test_the_own_limit_holds_where_pillow_would_only_warn(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 63)
    with pytest.raises(InvalidInput, match=r"too large: 8x8 px, at most 63"):
        decode(encode(noise(8, 8)))


def test_resize_keeps_constants_and_averages_when_it_shrinks():
    assert (resize(np.full((37, 53), 77, np.uint8), 16) == 77).all()
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    small = resize(stripes, 16)  # without antialiasing it would be 0 or 255 everywhere
    assert small.shape == (16, 16)
    assert np.abs(small[:, 1:-1].astype(int) - 127).max() <= 2  # the filter is cut at the border
    assert resize(noise(9, 12, 3), 5).shape == (5, 5, 3)
    pixels = noise(16, 16)
    np.testing.assert_array_equal(resize(pixels, 16), pixels)


def test_resize_golden_values():
    # By hand: a triangle of half-width 4 px around 2, 6, 10, 14, cut at the border and normalised, on a ramp of slope
    # 16: the first is 16 (1*.875 + 2*.875 + 3*.625 + 4*.375 + 5*.125) / 3.5 = 30.3, then 16 * 5.5, 16 * 9.5, 209.7.
    ramp = np.arange(16, dtype=np.uint8).reshape(1, 16).repeat(16, 0) * 16
    np.testing.assert_array_equal(resize(ramp, 4), [[30, 88, 152, 210]] * 4)


@pytest.mark.parametrize("bad", [np.zeros((4, 4)), np.zeros((4, 4, 4), np.uint8), np.zeros((0, 4), np.uint8)])
def test_resize_refuses_other_arrays(bad):
    with pytest.raises(InvalidInput, match=r"takes uint8 \[h, w\]"):
        resize(bad, 8)


def test_load_images_repeats_gray_and_names_the_bad_file(tmp_path):
    gray, colour = noise(16, 16), noise(16, 16, 3)
    for name, pixels in (("a.png", gray), ("b.png", colour)):
        (tmp_path / name).write_bytes(encode(pixels))
    loaded = load_images([tmp_path / "b.png", str(tmp_path / "a.png")], 16)
    assert loaded.shape == (2, 16, 16, 3)
    np.testing.assert_array_equal(loaded[0], colour)
    np.testing.assert_array_equal(loaded[1], np.repeat(gray[..., None], 3, axis=2))
    assert load_images([], 16).shape == (0, 16, 16, 3)
    (tmp_path / "c.png").write_text("text")
    with pytest.raises(InvalidInput, match=r"c\.png: not an image"):
        load_images([tmp_path / "a.png", tmp_path / "c.png"], 16)


def test_is_gray_reads_the_header_alone(tmp_path):
    file = tmp_path / "x.png"
    for pixels, expected in ((noise(64, 64), True), (noise(64, 64, 3), False), (noise(64, 64).astype(np.uint16), True)):
        file.write_bytes(encode(pixels)[:200])  # cut short: enough for the header
        assert is_gray(file) is expected
    file.write_text("text")
    assert is_gray(file) is None


def test_the_perceptual_hash_survives_what_a_copy_goes_through_and_tells_others_apart():
    def bits(pixels):
        return np.unpackbits(np.frombuffer(perceptual_hash(pixels), np.uint8))

    smooth = np.asarray(Image.fromarray(noise(16, 16)).resize((128, 128), Image.Resampling.BICUBIC))
    jpeg = decode(encode(smooth, "JPEG", quality=80)).pixels
    brighter = np.clip(smooth * 0.9 + 20, 0, 255).astype(np.uint8)
    other = np.asarray(Image.fromarray(noise(16, 16)[::-1]).resize((128, 128), Image.Resampling.BICUBIC))
    assert (bits(smooth) != bits(jpeg)).sum() <= 8
    assert (bits(smooth) != bits(brighter)).sum() <= 8
    assert (bits(smooth) != bits(other)).sum() > 64
    assert perceptual_hash(smooth) == perceptual_hash(np.repeat(smooth[..., None], 3, axis=2))
    assert len(perceptual_hash(np.zeros((20, 30), np.uint8))) == 32


def test_sharpness_falls_with_blur():
    sharp = noise(64, 64)
    blurred = np.asarray(Image.fromarray(sharp).resize((16, 16)).resize((64, 64), Image.Resampling.BICUBIC))
    assert sharpness(blurred) < sharpness(sharp) / 10
    assert sharpness(np.full((8, 8), 9, np.uint8)) == 0
    assert sharpness(sharp) == pytest.approx(sharpness(np.repeat(sharp[..., None], 3, axis=2)))

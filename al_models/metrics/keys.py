"""Unsigned integers that order as floats do, so that exact counting needs no sorting and no bins.

A float is sign and magnitude, an integer two's complement: where the sign bit is set the magnitude is negated, and the
sign bit is flipped so that the order starts at 0. -0 and +0 share a key, as they are equal.
"""

from __future__ import annotations

import numpy as np

from al_models.detector import FLOAT16_MAX

N_KEYS = 65_536
BELOW_ALL_16 = -65520.0
"""Rounds to -inf in float16: a threshold that every pixel exceeds."""
BELOW_ALL_32 = -3.5e38
"""Likewise in float32."""


def keys_of(values: np.ndarray) -> np.ndarray:
    """uint16 keys that order as the values do once rounded to float16."""
    return _keys(values.astype(np.float16, copy=False).view(np.int16), np.uint16)


def keys32_of(values: np.ndarray) -> np.ndarray:
    """uint32 keys that order as the values do once rounded to float32."""
    return _keys(values.astype(np.float32, copy=False).view(np.int32), np.uint32)


def just_below(keys: np.ndarray) -> np.ndarray:
    """The largest float16 value below each uint16 key's, float64: flags the key and all above it."""
    return np.maximum(_values(keys.astype(np.int64) - 1, np.uint16, np.float16), BELOW_ALL_16)


def just_below32(keys: np.ndarray) -> np.ndarray:
    """The largest float32 value below each uint32 key's, float64."""
    return np.maximum(_values(keys.astype(np.int64) - 1, np.uint32, np.float32), BELOW_ALL_32)


def _keys(bits: np.ndarray, unsigned: type[np.unsignedinteger]) -> np.ndarray:
    most = np.iinfo(bits.dtype).max
    negative = bits >> bits.dtype.type(8 * bits.itemsize - 1)  # -1 or 0
    signed = (bits ^ (negative & most)) - negative
    return signed.view(unsigned) ^ unsigned(most + 1)


def _values(keys: np.ndarray, unsigned: type[np.unsignedinteger], real: type[np.floating]) -> np.ndarray:
    """The floats of keys given as int64."""
    middle = np.iinfo(unsigned).max // 2 + 1
    signed = keys - middle
    bits = np.where(signed >= 0, signed, middle - signed)
    return bits.astype(unsigned).view(real).astype(np.float64)


LOWEST, HIGHEST = (int(key) for key in keys_of(np.array([-FLOAT16_MAX, FLOAT16_MAX])))
"""Keys of the finite values; NaN and inf lie outside."""

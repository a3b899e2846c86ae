"""Arrays for the page: a JSON header that names them, then their bytes. `static/wire.js` is the other half.

  uint32  length of the header, little-endian
  header  JSON: what the caller gave, and "arrays": {name: [dtype, shape, offset behind the header's padding]}
  zeros   up to the next multiple of 8
  bytes   the arrays, each at a multiple of 8

A picture of 200 rows is four planes; as JSON it would take ten times as long to write, send and read.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

MISSING, ZERO, OVER = -32768, -32767, 32767
"""Codes of a plane for: not measured, the logarithm of zero, an infinite value."""
MOST = 32000


def pack(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> bytes:
    """One message of a header and named arrays."""
    places, parts, at = {}, [], 0
    for name, array in arrays.items():
        array = np.ascontiguousarray(array)
        places[name] = [array.dtype.str.lstrip("<|"), list(array.shape), at]
        data = array.tobytes()
        data += bytes(-len(data) % 8)
        parts.append(data)
        at += len(data)
    head = dumps({**header, "arrays": places}).encode()
    head += b" " * (-(len(head) + 4) % 8)
    return struct.pack("<I", len(head)) + head + b"".join(parts)


def quantise(values: np.ndarray, factor: float | None = None) -> tuple[np.ndarray, float]:
    """Values as int16 codes: `round(value * factor)`, -inf as `ZERO`, inf as `OVER`, NaN as `MISSING`.

    Args:
      values: Any shape.
      factor: Codes a unit; None takes the finest that holds the largest finite value.
    """
    if factor is None:
        largest = np.max(np.abs(values), initial=0.0, where=np.isfinite(values))
        factor = MOST / largest if largest > 0 and math.isfinite(MOST / largest) else 1.0
    with np.errstate(invalid="ignore", over="ignore"):
        codes = np.clip(np.rint(np.nan_to_num(values * factor, nan=0.0, posinf=MOST, neginf=-MOST)), -MOST, MOST)
    codes = codes.astype("<i2")
    codes[np.isposinf(values)] = OVER
    codes[np.isneginf(values)] = ZERO
    codes[np.isnan(values)] = MISSING
    return codes, float(factor)


def dumps(content: Any) -> str:
    """JSON that every browser reads: NaN and infinities, which JSON has not, become null."""
    return json.dumps(_plain(content), allow_nan=False, separators=(",", ":"))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)

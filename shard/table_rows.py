"""Rows of an embedding table as 8-bit records: quantised, checked, and restored.

A record is the scale and the bias of its row, both float16, and then D unsigned codes; a value is
``code * scale + bias``. A code times a float16 scale is exact in float32, so every machine restores
the same bits, with and without fused multiply-add.

Shapes: n rows, D embedding dimension, W = D + 4 bytes of a record.
Source: the 8-bit rows of FBGEMM's inference tables on CPU, byte for byte; its operator
``FloatOrHalfToFusedNBitRowwiseQuantizedSBHalf`` has the scale and the bias at the end instead.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from silvershard.model.request import RequestError

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Records = npt.NDArray[np.uint8]

MAX_VALUE = 65504.0
"""Largest magnitude of a value: that of float16, which holds the bias."""

_HEADER_BYTES = 4
_LEVELS = np.float32(255)


def record_bytes(dim: int) -> int:
    """Return W, the bytes of a row of D values."""
    return dim + _HEADER_BYTES


def quantize_rows(values: npt.NDArray[Any], dim: int) -> Records:
    """Return the records ``(n, W)`` of rows, each with the finest scale that covers it.

    Args:
        values: ``(n, D)`` float32 or float16.
        dim: D.

    Raises:
        RequestError: if shape or dtype differ, or a value is NaN or beyond ``MAX_VALUE``.
    """
    if values.dtype not in (np.float32, np.float16):
        raise RequestError("values", f"must be float32 or float16, got {values.dtype}")
    if values.ndim != 2 or values.shape[1] != dim:
        raise RequestError("values", f"must be of shape (n, {dim}), got {values.shape}")
    if not len(values):
        return np.empty((0, record_bytes(dim)), dtype=np.uint8)
    floats = values.astype(np.float32, copy=False)
    low, high = floats.min(axis=1), floats.max(axis=1)
    fits = (low >= -MAX_VALUE) & (high <= MAX_VALUE)  # False where NaN
    if not fits.all():
        row = int(fits.argmin())
        raise RequestError(
            "values",
            f"must be finite and within ±{MAX_VALUE:g}, got {low[row]:g} to {high[row]:g} "
            f"in row {row}",
        )
    header = np.empty((len(floats), 2), dtype=np.float16)
    header[:, 1] = low
    bias = header[:, 1].astype(np.float32)
    spread = high - bias
    scale = np.where(spread == 0, np.float32(1), spread / _LEVELS)
    scale = scale.astype(np.float16).astype(np.float32)
    # A row whose values are as good as equal has a spread that float16 calls zero.
    scale[scale == 0] = 1
    header[:, 0] = scale
    records = np.empty((len(floats), record_bytes(dim)), dtype=np.uint8)
    records[:, :_HEADER_BYTES] = header.view(np.uint8)
    codes = floats - bias[:, None]
    codes *= (np.float32(1) / scale)[:, None]
    np.clip(np.rint(codes, out=codes), 0, _LEVELS, out=codes)
    records[:, _HEADER_BYTES:] = codes
    return records


def dequantize_rows(records: Records) -> Floats:
    """Return the values ``(n, D)`` of records ``(n, W)``."""
    header = _header(records).astype(np.float32)
    values = records[:, _HEADER_BYTES:].astype(np.float32)
    values *= header[:, :1]
    values += header[:, 1:]
    return values


def whole(records: Records) -> npt.NDArray[np.void]:
    """Return records ``(n, W)`` as n elements, which are gathered three times as fast."""
    return np.ascontiguousarray(records).view(f"V{records.shape[1]}").reshape(-1)


def split(elements: npt.NDArray[np.void], width: int) -> Records:
    """Return n elements as records ``(n, W)`` again."""
    return elements.view(np.uint8).reshape(-1, width)


def check_records(records: Records) -> None:
    """Refuse records that would restore to NaN or infinity.

    Raises:
        RequestError: naming the first such row.
    """
    finite = np.isfinite(_header(records)).all(axis=1)
    if not finite.all():
        row = int(finite.argmin())
        raise RequestError("records", f"scale and bias must be finite, row {row} has others")


def _header(records: Records) -> npt.NDArray[np.float16]:
    """Return scale and bias ``(n, 2)``."""
    return np.ascontiguousarray(records[:, :_HEADER_BYTES]).view(np.float16)

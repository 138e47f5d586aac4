"""Columns of a catalogue as named tensors and back, for snapshot files.

Strings are stored as UTF-8 bytes with offsets, rows of lists as values with offsets (CSR).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from silvershard.model.catalogue import Catalogue, Ragged
from silvershard.model.dtypes import ValueType
from silvershard.model.schema import Schema

_NUMBERS: Mapping[str, np.dtype[Any]] = {
    "int": np.dtype(np.int64),
    "float": np.dtype(np.float64),
}


def pack_column(values: NDArray[Any]) -> dict[str, Tensor]:
    """Return int64 or float64 values as ``values``; strings as ``bytes`` and ``ends``."""
    if values.dtype != object:
        return {"values": torch.from_numpy(np.ascontiguousarray(values))}
    encoded = [value.encode() for value in values]
    joined = np.frombuffer(b"".join(encoded), dtype=np.uint8).copy()
    ends = np.cumsum(np.array([len(value) for value in encoded], dtype=np.int64))
    return {"bytes": torch.from_numpy(joined), "ends": torch.from_numpy(ends)}


def unpack_column(tensors: Mapping[str, Tensor], dtype: ValueType) -> NDArray[Any]:
    """Return the column that ``pack_column`` packed.

    Raises:
        ValueError: if the tensors are not those of a column of this type.
    """
    if dtype != "string":
        values = tensors["values"].numpy()
        if values.dtype != _NUMBERS[dtype]:
            raise ValueError(f"expected {_NUMBERS[dtype]}, got {values.dtype}")
        return values
    joined = tensors["bytes"].numpy().tobytes()
    ends = tensors["ends"].tolist()
    if (ends[-1] if ends else 0) != len(joined):
        raise ValueError(f"string offsets must end at {len(joined)}")
    column = np.empty(len(ends), dtype=object)
    start = 0
    for row, end in enumerate(ends):
        column[row] = joined[start:end].decode()
        start = end
    return column


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    start = f"{prefix}/"
    return {name[len(start) :]: one for name, one in tensors.items() if name.startswith(start)}


def _pack_ragged(ragged: Ragged) -> dict[str, Tensor]:
    return {**pack_column(ragged.values), "offsets": torch.from_numpy(ragged.offsets)}


def _unpack_ragged(tensors: Mapping[str, Tensor], dtype: ValueType) -> Ragged:
    return Ragged(unpack_column(tensors, dtype), tensors["offsets"].numpy())


def pack_catalogue(catalogue: Catalogue) -> dict[str, Tensor]:
    """Return every column of a catalogue as tensors named ``<kind>/<column>/<part>``."""
    tensors = {
        "item_ids": torch.from_numpy(catalogue.item_ids),
        "signals": torch.from_numpy(catalogue.signals),
    }
    for name, ragged in catalogue.categories.items():
        tensors |= _prefixed(f"category/{name}", _pack_ragged(ragged))
    for name, ragged in catalogue.features.items():
        tensors |= _prefixed(f"feature/{name}", _pack_ragged(ragged))
    for name, column in catalogue.numbers.items():
        tensors |= _prefixed(f"number/{name}", pack_column(column))
    for name, column in catalogue.fields.items():
        tensors |= _prefixed(f"field/{name}", pack_column(column))
    return tensors


def unpack_catalogue(tensors: Mapping[str, Tensor], schema: Schema) -> Catalogue:
    """Return the catalogue that ``pack_catalogue`` packed.

    Raises:
        KeyError: if a column of the schema is missing.
        ValueError: if a column does not have the type that the schema declares.
    """
    return Catalogue(
        item_ids=tensors["item_ids"].numpy(),
        categories={
            one.name: _unpack_ragged(_below(tensors, f"category/{one.name}"), one.dtype)
            for one in schema.categories
        },
        numbers={
            one.name: unpack_column(_below(tensors, f"number/{one.name}"), one.dtype)
            for one in schema.numbers
        },
        signals=tensors["signals"].numpy(),
        fields={
            one.name: unpack_column(_below(tensors, f"field/{one.name}"), one.dtype)
            for one in schema.fields
        },
        features={
            one.name: _unpack_ragged(_below(tensors, f"feature/{one.name}"), one.dtype)
            for one in schema.item_features
        },
    )

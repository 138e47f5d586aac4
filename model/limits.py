"""Limits that a configuration is checked against before anything is trained; free of torch."""

from collections.abc import Mapping

MAX_ANN_K = 300_000
"""The largest number of candidates per head that a plan may ask for."""

COLUMN_MULTIPLES: Mapping[str, int] = {"float32": 1, "int8": 4, "int4": 8}
"""What the embedding dimension must be a multiple of, by the precision of the tables."""

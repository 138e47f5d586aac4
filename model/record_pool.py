"""Pooling of quantised rows that were brought together from wherever they lie.

Shapes: B bags, n values of all of them together, D embedding dimension, W bytes of a record.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from silvershard.model.bags import Bags
from silvershard.model.placement import Precision


class RecordPool:
    """Weighted sums of records, by the lookup and with the bits of a table that holds them.

    One thread pools at a time.
    """

    def __init__(self, num_features: int, dim: int, precision: Precision) -> None:
        """Make a pool of that many features of D columns each."""
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
        from fbgemm_gpu.split_table_batched_embeddings_ops_inference import (
            EmbeddingLocation,
            IntNBitTableBatchedEmbeddingBagsCodegen,
            SparseType,
        )

        sparse_type = SparseType.INT8 if precision == "int8" else SparseType.INT4
        self._dim = dim
        self._lookup: Any = IntNBitTableBatchedEmbeddingBagsCodegen(
            embedding_specs=[("records", 1, dim, sparse_type, EmbeddingLocation.HOST)],
            feature_table_map=[0] * num_features,
            device=torch.device("cpu"),
            output_dtype=SparseType.FP32,
            # The rows are counted up here, and the list is longer than the lookup knows.
            bounds_check_mode=BoundsCheckMode.NONE,
        )
        self._lookup.initialize_weights()

    def __call__(
        self, bags: Mapping[str, Bags], records: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the weighted sum of each bag, ``(B, D)`` float32 per feature.

        Args:
            bags: B bags, at least one, for each of the features.
            records: per feature the record ``(n, W)`` uint8 of each value of its bags, in order.
        """
        chosen: Sequence[Bags] = list(bags.values())
        self._lookup.weights_host = torch.cat([records[name] for name in bags]).flatten()
        lengths = torch.cat([one.lengths for one in chosen])
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        found = self._lookup(
            indices=torch.arange(int(offsets[-1])),
            offsets=offsets,
            per_sample_weights=torch.cat([one.weights for one in chosen]),
        )
        return dict(zip(bags, found.split(self._dim, 1), strict=True))

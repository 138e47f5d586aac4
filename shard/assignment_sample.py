"""How well the clusters of an index fit its items, from a sample that is drawn bit by bit.

Shapes: n drawn items, N pages of G slots, C clusters, D embedding dimension.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from silvershard.model.index import LIVE_PLANE, ItemIndex

_Ints = NDArray[np.int64]

SAMPLE = 1024
"""Items that the share is of."""
# Rounding to float16, and to what publishing compares, moves the difference of two cosines by less.
_TIE = 2.0**-9
# Multiplications of one look: 0.1 ms.
_WORK = 1 << 20
_MOST = 32
_SEED = 29


class AssignmentSample:
    """The assignment error of an index: ``error`` is the share of a sample that stands elsewhere.

    An item stands elsewhere if it is in a page of a cluster whose centroid is not the nearest one:
    the cosine of its float16 embedding with another centroid is larger by more than ``2**-9``.
    Balanced publishing puts some items there, and so does a pool without a free page; probes of few
    clusters may then miss them. Centroids of zeros are those of clusters without items.

    The sample is of ``SAMPLE`` draws with replacement among the live items. It is drawn when the
    index is loaded, and every ``look`` draws a few of them anew.

    Args:
        index: on the CPU; read whenever this looks.
        cluster_of: returns the clusters whose pages hold slots ``(n,)`` int64.
        centroids: ``(C, D)`` float32 of unit length, or zeros.
    """

    def __init__(
        self, index: ItemIndex, cluster_of: Callable[[_Ints], _Ints], centroids: Tensor
    ) -> None:
        live = index.planes[LIVE_PLANE].numpy().view(np.uint64)
        self._live: NDArray[np.uint64] = live.reshape(-1)  # (N * W,)
        self._cache = index.cache.flatten(0, 1)
        self._cluster_of = cluster_of
        self._centroids = centroids
        self._unused = ~centroids.any(1)
        self._draw = np.random.default_rng(_SEED)
        self._away = np.zeros(SAMPLE, dtype=np.bool_)
        self._drawn = 0
        self._per_look = min(max(_WORK // max(centroids.numel(), 1), 1), _MOST)
        for _ in range(SAMPLE // _MOST):
            self._take(_MOST)

    @property
    def error(self) -> float:
        """Return the share in [0, 1], 0 without items."""
        held = min(self._drawn, SAMPLE)
        return float(self._away[:held].mean()) if held else 0.0

    def look(self) -> None:
        """Draw a few items of the sample anew."""
        self._take(self._per_look)

    def _take(self, count: int) -> None:
        slots = self._draw.integers(0, max(64 * len(self._live), 1), 4 * count)
        if not len(self._live):
            return
        is_live = self._live[slots >> 6] >> (slots & 63).astype(np.uint64) & np.uint64(1)
        slots = slots[is_live != 0][:count]
        if not len(slots):
            return
        away = self._stand_elsewhere(slots)
        self._away[(self._drawn + np.arange(len(away))) % SAMPLE] = away
        self._drawn += len(away)

    @torch.inference_mode()
    def _stand_elsewhere(self, slots: _Ints) -> NDArray[np.bool_]:
        embeddings = self._cache[torch.from_numpy(slots)].float()
        unit = torch.nn.functional.normalize(embeddings, dim=1)
        cosines = (unit @ self._centroids.T).masked_fill_(self._unused, -1.0)  # (n, C)
        own = cosines.gather(1, torch.from_numpy(self._cluster_of(slots))[:, None])
        away: NDArray[np.bool_] = (cosines.amax(1) - own[:, 0] > _TIE).numpy()
        return away

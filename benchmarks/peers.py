"""The public alternatives: Faiss IVF SQ8 with its selectors, Roaring bitmaps, Faiss HNSW.

They are dependencies of the benchmarks only and are imported where they are needed.

Shapes: n items, D embedding dimension, B queries.
"""

import importlib
import struct
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.mixture import (
    NUM_TAGS,
    DataSet,
    Filter,
    Lists,
    cached_file,
    progress,
)

HNSW_LINKS = 32
HNSW_BUILD_WIDTH = 80
_RUN_COOKIE = 12347
_PLAIN_COOKIE = 12346
_CONTAINER_BYTES = 8192

Found = tuple[NDArray[np.float32], NDArray[np.int64]]
Selector = Any


class MissingPeerError(ImportError):
    """A peer that is not installed."""


def require(module: str) -> Any:
    """Import a peer.

    Raises:
        MissingPeerError: saying how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPeerError(
            f"the benchmark compares with {module}, which is not installed: "
            "pip install -e '.[bench]' (or pip install faiss-cpu==1.15.1 pyroaring==1.2.0)"
        ) from error


def use_threads(count: int) -> None:
    """Set the threads of Faiss in the calling thread."""
    require("faiss").omp_set_num_threads(count)


def modes(threads: int) -> tuple[int, ...]:
    """Return the parallel modes of a Faiss IVF index that can differ with this many threads."""
    return (0,) if threads == 1 else (0, 1, 2, 3)


@dataclass(frozen=True, eq=False)
class FaissIVF:
    """IVF SQ8 of Faiss on given centroids and assignments."""

    index: Any

    @classmethod
    def of(cls, data: DataSet, lists: Lists) -> "FaissIVF":
        """Return the index of a data set, from the cache where it is there."""
        faiss = require("faiss")

        def make(path: Path) -> None:
            progress(f"building Faiss IVF SQ8 of {len(data)} items")
            quantizer = faiss.IndexFlatIP(data.dim)
            quantizer.add(lists.centroids)
            index = faiss.IndexIVFScalarQuantizer(
                quantizer,
                data.dim,
                lists.count,
                faiss.ScalarQuantizer.QT_8bit,
                faiss.METRIC_INNER_PRODUCT,
            )
            index.train(np.ascontiguousarray(data.vectors[:: max(1, len(data) // 100_000)]))
            ids = np.arange(len(data), dtype=np.int64)
            index.add_core(
                len(data),
                faiss.swig_ptr(data.vectors),
                faiss.swig_ptr(ids),
                faiss.swig_ptr(lists.assignment),
            )
            faiss.write_index(index, str(path))

        index = faiss.read_index(str(cached_file(lists.folder / "sq8.faiss", make)))
        found = cls(index)
        found.check(lists)
        return found

    def check(self, lists: Lists) -> None:
        """Refuse an index whose centroids or assignments are not the given ones.

        Raises:
            ValueError: naming what differs.
        """
        faiss = require("faiss")
        centroids = self.index.quantizer.reconstruct_n(0, lists.count)
        if not np.array_equal(centroids, lists.centroids):
            raise ValueError("the peer must have the same centroids")
        for number, members in enumerate(lists.members):
            size = self.index.invlists.list_size(number)
            ids = faiss.rev_swig_ptr(self.index.invlists.get_ids(number), size) if size else []
            if not np.array_equal(np.sort(np.asarray(ids, dtype=np.int64)), members):
                raise ValueError(f"the peer must have the same items in list {number}")

    def parameters(self, probes: int, selector: Selector | None = None) -> Any:
        """Return search parameters, made before anything is timed."""
        faiss = require("faiss")
        if selector is None:
            return faiss.SearchParametersIVF(nprobe=probes)
        return faiss.SearchParametersIVF(nprobe=probes, sel=selector)

    def search(self, query: NDArray[np.float32], k: int, parameters: Any, mode: int = 0) -> Found:
        """Search a batch ``(B, D)``: scores and ids ``(B, k)``, sorted."""
        self.index.parallel_mode = mode
        scores, ids = self.index.search(query, k, params=parameters)
        return scores, ids

    def search_each(
        self, query: NDArray[np.float32], k: int, parameters: Sequence[Any], mode: int = 0
    ) -> Found:
        """Search every query with its own parameters, one after another."""
        self.index.parallel_mode = mode
        found = [
            self.index.search(query[row : row + 1], k, params=one)
            for row, one in enumerate(parameters)
        ]
        return np.concatenate([one[0] for one in found]), np.concatenate([one[1] for one in found])


class ThreadedLoop:
    """Searches queries with parameters of their own on a pool, one Faiss thread each."""

    def __init__(self, peer: FaissIVF, threads: int) -> None:
        self._peer = peer
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, initializer=use_threads, initargs=(1,))
        barrier = threading.Barrier(threads)
        # Every worker is there and has its setting before anything is timed.
        list(self._pool.map(lambda _: barrier.wait(), range(threads)))

    def __call__(self, query: NDArray[np.float32], k: int, parameters: Sequence[Any]) -> Found:
        """Return scores and ids ``(B, k)``."""
        peer = self._peer
        peer.index.parallel_mode = 0
        bounds = np.linspace(0, len(parameters), self._threads + 1).astype(int)
        parts = list(
            self._pool.map(
                lambda low, high: peer.search_each(query[low:high], k, parameters[low:high]),
                bounds[:-1],
                bounds[1:],
            )
        )
        return np.concatenate([one[0] for one in parts]), np.concatenate([one[1] for one in parts])


class Bitmaps:
    """The tags of a data set as Roaring bitmaps, and filters as bitmaps for Faiss."""

    def __init__(self, data: DataSet) -> None:
        self._data = data
        roaring = require("pyroaring")
        self._tags = []
        for tag in range(NUM_TAGS):
            rows = np.flatnonzero(data.tags & np.uint32(1 << tag)).astype(np.uint32)
            bitmap = roaring.BitMap(rows)
            bitmap.run_optimize()
            self._tags.append(bitmap)

    def ready(self, which: Filter) -> NDArray[np.uint8]:
        """Return the bitmap of a filter, made for free."""
        return np.packbits(self._data.passing(which), bitorder="little")

    def from_roaring(self, which: Filter) -> NDArray[np.uint8]:
        """Return the bitmap of a filter from the Roaring bitmaps of its three tags; timed."""
        a, b, c = which.tags
        both = self._tags[a] & self._tags[b]
        both &= self._tags[c]
        return dense(both.serialize(), len(self._data))

    def selector(self, bitmap: NDArray[np.uint8]) -> Selector:
        """Return what Faiss takes; the bitmap must outlive it."""
        faiss = require("faiss")
        return faiss.IDSelectorBitmap(len(self._data), faiss.swig_ptr(bitmap))


def dense(serialized: bytes, size: int) -> NDArray[np.uint8]:
    """Return a serialised Roaring bitmap as plain bits of ``size`` items, low bit first.

    Reading the containers is several times faster than every route that the Python binding offers.

    Source: https://github.com/RoaringBitmap/RoaringFormatSpec (containers and headers).
    """
    count = -(-size // 65536)
    bits = np.zeros(count * _CONTAINER_BYTES, dtype=np.uint8)
    cookie = struct.unpack_from("<I", serialized)[0]
    if cookie & 0xFFFF == _RUN_COOKIE:
        containers = (cookie >> 16) + 1
        runs = np.unpackbits(
            np.frombuffer(serialized, np.uint8, -(-containers // 8), 4), bitorder="little"
        ).tolist()
        at = 4 + -(-containers // 8)
        has_offsets = containers >= 4
    elif cookie == _PLAIN_COOKIE:
        containers = struct.unpack_from("<I", serialized, 4)[0]
        runs = [0] * containers
        at = 8
        has_offsets = True
    else:
        raise ValueError(f"cookie must be {_PLAIN_COOKIE} or {_RUN_COOKIE}, got {cookie}")
    header = struct.unpack_from(f"<{2 * containers}H", serialized, at)
    at += 4 * containers + (4 * containers if has_offsets else 0)
    for number in range(containers):
        place = header[2 * number] * _CONTAINER_BYTES
        cardinality = header[2 * number + 1] + 1
        part = bits[place : place + _CONTAINER_BYTES]
        if runs[number]:
            pairs = struct.unpack_from("<H", serialized, at)[0]
            spans = np.frombuffer(serialized, "<u2", 2 * pairs, at + 2).reshape(-1, 2)
            part[:] = _packed_spans(spans.astype(np.int64))
            at += 2 + 4 * pairs
        elif cardinality > 4096:
            part[:] = np.frombuffer(serialized, np.uint8, _CONTAINER_BYTES, at)
            at += _CONTAINER_BYTES
        else:
            flags = np.zeros(65536, dtype=np.bool_)
            flags[np.frombuffer(serialized, "<u2", cardinality, at)] = True
            part[:] = np.packbits(flags, bitorder="little")
            at += 2 * cardinality
    return bits


def _packed_spans(spans: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Return runs ``[start, length - 1]`` as the bits of one container."""
    edges = np.zeros(65537, dtype=np.int8)
    edges[spans[:, 0]] += 1
    edges[spans.sum(1) + 1] -= 1
    return np.packbits(np.cumsum(edges[:-1], dtype=np.int8) > 0, bitorder="little")


class FaissHNSW:
    """A graph over the exact float32 vectors."""

    def __init__(self, data: DataSet) -> None:
        faiss = require("faiss")
        self._data = data

        def make(path: Path) -> None:
            progress(f"building Faiss HNSW of {len(data)} items; minutes at a million, once")
            index = faiss.IndexHNSWFlat(data.dim, HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efConstruction = HNSW_BUILD_WIDTH
            step = max(1, len(data) // 10)
            for at in range(0, len(data), step):
                index.add(np.ascontiguousarray(data.vectors[at : at + step]))
                progress(f"HNSW: {index.ntotal} of {len(data)}")
            faiss.write_index(index, str(path))

        name = f"hnsw-{HNSW_LINKS}-{HNSW_BUILD_WIDTH}.faiss"
        self._index = faiss.read_index(str(cached_file(data.folder / name, make)))

    def parameters(self, width: int) -> Any:
        """Return search parameters for this width of the beam."""
        return require("faiss").SearchParametersHNSW(efSearch=width)

    def search(self, query: NDArray[np.float32], k: int, parameters: Any) -> Found:
        """Search a batch ``(B, D)``: scores and ids ``(B, k)``, sorted."""
        scores, ids = self._index.search(query, k, params=parameters)
        return scores, ids


@dataclass(frozen=True, eq=False)
class Peers:
    """The peers of one data set and its lists, each made when it is first asked for."""

    data: DataSet
    lists: Lists

    @cached_property
    def ivf(self) -> FaissIVF:
        """Faiss IVF SQ8."""
        return FaissIVF.of(self.data, self.lists)

    @cached_property
    def bitmaps(self) -> Bitmaps:
        """Roaring bitmaps of the tags."""
        return Bitmaps(self.data)

    @cached_property
    def hnsw(self) -> FaissHNSW:
        """Faiss HNSW."""
        return FaissHNSW(self.data)


def versions() -> dict[str, str]:
    """Return the versions of the peers and what Faiss was compiled for."""
    faiss = require("faiss")
    roaring = require("pyroaring")
    return {
        "faiss": str(faiss.__version__),
        "faiss_options": str(faiss.get_compile_options()).strip(),
        "pyroaring": str(roaring.__version__),
    }

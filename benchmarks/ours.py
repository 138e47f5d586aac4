"""Our side of the kernel benchmarks: the product's index over the benchmark's items.

Shapes: n items, D embedding dimension, C clusters, N pages of G slots, B queries, U candidates,
O outputs of a layer.
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import silvershard.kernels
from benchmarks.mixture import (
    MAX_TERMS,
    NUM_TAGS,
    RARE_TAGS,
    RARE_VALUES,
    DataSet,
    Filter,
    Lists,
    progress,
)
from silvershard.kernels import (
    PAD_TERM,
    IvfIndex,
    ScanResult,
    coarse_probe,
    quantize_rows,
    refine,
    select_topk,
)
from silvershard.model.catalogue import Catalogue, Ragged
from silvershard.model.filter import compile_filter
from silvershard.model.filter_parser import parse_filter
from silvershard.model.index import IndexTensors, ItemIndex
from silvershard.model.planes import ItemBits, PlaneDictionary
from silvershard.model.request import FilterMode
from silvershard.model.retriever import Centroids, pad_programs
from silvershard.model.schema import Attribute, Schema
from silvershard.model.spec import SearchDefaults, ServingSpec
from silvershard.shard.build import build_index
from silvershard.shard.snapshot import PartitionData

BLOOM_PLANES = 256
BLOOM_HASHES = 4
BLOOM_SEED = 9
"""Of few tags the errors depend on the seed; this one errs as often as random tags would."""
SCHEMA = Schema(attributes=(Attribute(name="tag", kind="category", dtype="int"),))
_CHUNK = 1 << 17
_NATIVE = "silvershard.kernels.native_library"

GatherLinear = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@contextmanager
def use_implementation(name: str) -> Iterator[str]:
    """Choose which implementation the public functions of silvershard.kernels run.

    The one place that knows how that is done; without ``native_library`` only the references are
    there and every name but theirs means them.

    Args:
        name: "best" (what the product picks), "reference" (as without a compiler), or one of the
            instruction sets.

    Yields:
        What runs while the context is open, for the record.

    Raises:
        ValueError: if this machine cannot run it.
    """
    if importlib.util.find_spec(_NATIVE) is None:
        if name not in ("best", "reference"):
            raise ValueError(f"implementation must be best or reference, got {name!r}")
        yield "reference"
        return
    native = importlib.import_module(_NATIVE)
    chosen = native.available()[-1] if name == "best" else name
    with native.use(chosen):
        yield chosen


def gather_linear_stand_in(cache: Tensor, slots: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Stand in for ``silvershard.kernels.gather_linear`` until it exists, in plain PyTorch.

    Args:
        cache: ``(N, G, D)`` float16.
        slots: ``(B, U)`` int64, -1 is padding.
        weight: ``(B, D, O)`` float32.
        bias: ``(B, O)`` float32.

    Returns:
        ``(B, U, O)`` float32, zero at padding.
    """
    rows = cache.view(-1, cache.shape[2]).index_select(0, slots.clamp_min(0).flatten()).float()
    found = torch.baddbmm(bias[:, None], rows.view(*slots.shape, -1), weight)
    return found.masked_fill_((slots < 0)[:, :, None], 0.0)


def gather_linear() -> tuple[GatherLinear, str]:
    """Return the operator, or the stand-in by its own name while there is none."""
    found = getattr(silvershard.kernels, "gather_linear", None)
    if found is None:
        return gather_linear_stand_in, "stand-in"
    return cast(GatherLinear, found), "silvershard.kernels"


class Programs(NamedTuple):
    """Compiled filters of a batch."""

    scan: Tensor
    """``(B, L, 4)`` int64."""
    verify: Tensor
    """``(B, Lv, 4)`` int64."""


@dataclass(frozen=True, eq=False)
class OurIndex:
    """The paged index over a data set, with its centroids and filter planes."""

    index: ItemIndex
    centroids: Centroids
    dictionary: PlaneDictionary
    page_slots: int
    sorted_codes: NDArray[np.int8]
    """``(n, D)`` codes by item id, for the definition that the gate compares with."""
    sorted_scales: NDArray[np.float32]

    @property
    def dim(self) -> int:
        """Return D."""
        return int(self.sorted_codes.shape[1])

    @property
    def bytes_scanned(self) -> int:
        """Return the bytes of all codes and scales, pads included."""
        return self.index.codes.numel() + 4 * self.index.scales.numel()

    @cached_property
    def searched(self) -> IvfIndex:
        """The centroids and lists as one search needs them."""
        return IvfIndex(
            centroids=self.centroids.vectors,
            centroid_codes=self.centroids.codes,
            centroid_scales=self.centroids.scales,
            page_table=self.index.page_table,
            codes=self.index.codes,
            scales=self.index.scales,
            item_ids=self.index.item_ids,
            planes=self.index.planes,
            columns=self.index.columns,
            terms=self.index.terms,
        )

    def programs(self, which: Sequence[Filter] | None, batch: int) -> Programs:
        """Return the programs of a batch: no filter, or the filter of each query in turn."""
        if which is None:
            empty = torch.zeros(batch, 0, 4, dtype=torch.int64)
            return Programs(empty, empty)
        compiled = [
            compile_filter(
                parse_filter(one.text, {}, SCHEMA),
                self.dictionary,
                SCHEMA,
                FilterMode.BLOOM_VERIFIED,
            )
            for one in which
        ]
        return Programs(
            pad_programs([one.scan for one in compiled]),
            pad_programs([one.verify for one in compiled]),
        )

    def probe(self, query: Tensor, codes: Tensor, scales: Tensor, probes: int) -> Tensor:
        """Return the clusters of each query, as ``Retriever`` chooses them."""
        count = self.centroids.vectors.shape[0]
        if probes >= count:
            return torch.arange(count, dtype=torch.int32).expand(query.shape[0], -1).contiguous()
        return coarse_probe(query, codes, scales, *self.centroids, probes)

    def search(self, query: Tensor, probes: int, k: int, programs: Programs) -> ScanResult:
        """Search a batch of float32 queries; everything from here on is timed.

        Args:
            query: ``(B, D)`` float32.
            probes: clusters per query; all of them skip the choice.
            k: results per query.
            programs: compiled filters.
        """
        return self.searched.search(
            query,
            programs.scan,
            programs.verify,
            query.new_empty((query.shape[0], 0), dtype=torch.int64),
            probes,
            k,
        )

    def search_refined(
        self, query: Tensor, probes: int, k: int, kept: int, programs: Programs
    ) -> tuple[Tensor, Tensor]:
        """Keep ``kept`` candidates, score them again from the fp16 cache and return the best k."""
        found = self.search(query, probes, kept, programs)
        scores = refine(query[:, None], self.index.cache, found.slots)[:, :, 0]
        best = select_topk(scores, found.item_ids, k)
        return best.scores, best.item_ids

    def definition(
        self,
        query: NDArray[np.float32],
        lists: Lists,
        clusters: Sequence[int],
        k: int,
        passing: NDArray[np.bool_] | None,
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return what a scan of these clusters has to return, from the definition alone.

        Nothing of the index is used but the codes of the items: no pages, no planes, no slots.
        """
        items = np.concatenate([lists.members[one] for one in sorted(set(clusters))])
        if passing is not None:
            items = items[passing[items]]
        scale = np.float32(np.abs(query).max() / np.float32(127))
        codes = np.rint(query / scale).astype(np.float32)
        # Every partial sum is an integer below 2**24, so that float32 is exact.
        dots = self.sorted_codes[items].astype(np.float32) @ codes
        scores = (dots * self.sorted_scales[items]) * scale + np.float32(0)
        order = np.lexsort((items, -scores))[:k]
        return scores[order], items[order]


def build(data: DataSet, lists: Lists, page_slots: int) -> OurIndex:
    """Lay the items into pages with the code of the product.

    Args:
        data: items and tags.
        lists: centroids and the list of every item.
        page_slots: slots per page, 64 or 128.
    """
    progress(f"laying {len(data)} items into pages of {page_slots}, {lists.count} lists")
    held = np.bitwise_count(data.tags).astype(np.float64) + RARE_TAGS
    fill = 1 - (1 - 1 / BLOOM_PLANES) ** (BLOOM_HASHES * held)
    dictionary = PlaneDictionary(
        dtypes={"tag": "int"},
        exact_planes={"tag": {}},
        first_bloom_plane=1,
        num_bloom_planes=BLOOM_PLANES,
        num_hashes=BLOOM_HASHES,
        seed=BLOOM_SEED,
        columns={},
        terms_width=MAX_TERMS,
        false_positive_rate=float((fill**BLOOM_HASHES).mean()),
    )
    spec = ServingSpec(
        model="kernels",
        generation=1,
        documents=len(data),
        dim=data.dim,
        num_clusters=lists.count,
        num_partitions=1,
        partition_documents=(len(data),),
        page_slots=page_slots,
        item_schema=SCHEMA,
        planes=dictionary,
        defaults=SearchDefaults(probes=1, ann_k=100),
    )
    codes, scales = quantize_rows(torch.from_numpy(data.vectors))
    order = torch.from_numpy(np.argsort(lists.assignment, kind="stable"))
    partition = PartitionData(
        catalogue=_catalogue(order.numpy()),
        clusters=torch.from_numpy(lists.assignment)[order].to(torch.int32),
        codes=codes[order],
        scales=scales[order],
        cache=torch.from_numpy(data.vectors)[order].half(),
        bits=ItemBits(
            exact=torch.zeros(len(data), 0, dtype=torch.bool),
            terms=torch.from_numpy(term_keys(dictionary, data, order.numpy())),
            columns=torch.zeros(len(data), 0, dtype=torch.int64),
        ),
    )
    return OurIndex(
        index=build_index([partition], spec),
        centroids=Centroids.of(torch.from_numpy(lists.centroids)),
        dictionary=dictionary,
        page_slots=page_slots,
        sorted_codes=codes.numpy(),
        sorted_scales=scales.numpy(),
    )


def term_keys(
    dictionary: PlaneDictionary, data: DataSet, items: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the term keys of some items, ``(u, MAX_TERMS)``, ascending and padded."""
    values = range(NUM_TAGS + RARE_TAGS * RARE_VALUES)
    keys = np.array([dictionary.term_key("tag", tag) for tag in values], dtype=np.int64)
    found = np.empty((len(items), MAX_TERMS), dtype=np.int64)
    bits = np.uint32(1) << np.arange(NUM_TAGS, dtype=np.uint32)
    for at in range(0, len(items), _CHUNK):
        rows = items[at : at + _CHUNK]
        held = (data.tags[rows, None] & bits) != 0
        table = np.where(held, keys[:NUM_TAGS], np.int64(PAD_TERM))
        table = np.concatenate([table, keys[data.rare_tags[rows]]], axis=1)
        table.sort(axis=1)
        found[at : at + _CHUNK] = table[:, :MAX_TERMS]
    return found


def repeated(ours: OurIndex, copies: int) -> OurIndex:
    """Return the index several times over, with lists, pages and ids of their own.

    It serves the row about memory bandwidth, whose index must not fit into the last-level cache;
    filters are left out. A query probes the copies of a list alike.
    """
    index = ours.index
    pages, slots = index.codes.shape[0], index.codes.shape[0] * ours.page_slots
    items = int(index.item_ids.max()) + 1
    tables = [torch.where(index.page_table >= 0, index.page_table + copy * pages, -1)
              for copy in range(copies)]  # fmt: skip
    ids = [torch.where(index.item_ids >= 0, index.item_ids + copy * items, -1)
           for copy in range(copies)]  # fmt: skip
    tensors = IndexTensors(
        page_table=torch.cat(tables),
        codes=index.codes.repeat(copies, 1, 1),
        scales=index.scales.repeat(copies, 1),
        item_ids=torch.cat(ids),
        planes=index.planes[:1].repeat(1, copies, 1),
        columns=torch.zeros(0, copies * pages, ours.page_slots, dtype=torch.int64),
        terms=torch.zeros(copies * pages, ours.page_slots, 0, dtype=torch.int64),
        cache=torch.zeros(0, ours.page_slots, ours.dim, dtype=torch.float16),
        signals=torch.zeros(copies * slots // ours.page_slots, ours.page_slots, 0),
    )
    return OurIndex(
        index=ItemIndex(tensors),
        centroids=Centroids.of(ours.centroids.vectors.repeat(copies, 1)),
        dictionary=ours.dictionary,
        page_slots=ours.page_slots,
        sorted_codes=np.tile(ours.sorted_codes, (copies, 1)),
        sorted_scales=np.tile(ours.sorted_scales, copies),
    )


def _catalogue(item_ids: NDArray[np.int64]) -> Catalogue:
    """Return the little of a catalogue that the layout reads: ids and no signals."""
    count = len(item_ids)
    return Catalogue(
        item_ids=item_ids,
        categories={"tag": Ragged(np.zeros(0, np.int64), np.zeros(count + 1, np.int64))},
        numbers={},
        signals=np.zeros((count, 0), dtype=np.float32),
        fields={},
        features={},
    )

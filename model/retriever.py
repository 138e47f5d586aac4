"""The whole retrieval pipeline as one module, from a user's features to a ranked answer.

Shapes: B requests, H heads, Q = B * H query rows, D embedding dimension, P probes, R candidates
per head, Rs semantic candidates, U candidates of the union of all, T tasks, K results.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, Self, cast

import torch
from torch import Tensor, nn

from silvershard.kernels import (
    IvfIndex,
    ScanResult,
    coarse_probe,
    quantize_rows,
    select_topk,
    value_program,
)
from silvershard.model.answer import Answer, split_answers
from silvershard.model.compiled_request import CompiledRequest, compile_request
from silvershard.model.index import ItemIndex
from silvershard.model.live_trie import LiveTrie
from silvershard.model.merge import Merge, passes
from silvershard.model.plan import Plan
from silvershard.model.request import FeatureValues, Request
from silvershard.model.rerank import task_probabilities
from silvershard.model.semantic_search import Generated
from silvershard.model.semantic_source import SemanticSource
from silvershard.model.spec import ServingSpec
from silvershard.model.stages import Proceed, Stopwatch, always
from silvershard.model.two_tower import Encoded
from silvershard.model.types import Cutoffs, RoundOne, RoundTwo, Work

_MAX_VALUE = torch.finfo(torch.float32).max


class RetrievalModel(Protocol):
    """What the pipeline needs of a model; ``two_tower.TwoTower`` is one."""

    def encode(self, features: Sequence[Mapping[str, FeatureValues]]) -> Encoded:
        """Return the query embeddings and the reranker's user state of each user."""
        ...

    def rank_slots(
        self,
        query: Tensor,
        user_state: Tensor,
        cache: Tensor,
        slots: Tensor,
        refined: Tensor,
        signals: Tensor,
    ) -> Tensor:
        """Return task logits ``(B, U, T)`` of cached candidates ``slots`` ``(B, U)``."""
        ...


class Centroids(NamedTuple):
    """The global cluster centres and their int8 form."""

    vectors: Tensor
    """``(C, D)`` float32."""
    codes: Tensor
    """``(C, D)`` int8."""
    scales: Tensor
    """``(C,)`` float32."""

    @classmethod
    def of(cls, vectors: Tensor) -> "Centroids":
        """Return the centroids with their int8 form."""
        return cls(vectors, *quantize_rows(vectors))


class PartCandidates(NamedTuple):
    """The candidates that one device keeps between the rounds."""

    scores: Tensor
    """``(B, H, R)`` float32."""
    item_ids: Tensor
    """``(B, H, R)`` int64."""
    slots: Tensor
    """``(B, H, R)`` int64."""
    generated: Generated | None = None
    """The semantic candidates; None where nobody asked for any."""


def pad_programs(programs: Sequence[Tensor]) -> Tensor:
    """Return programs ``(L_i, ...)`` as one ``(B, L, ...)`` tensor; zero rows are ``NOP``."""
    return torch.nn.utils.rnn.pad_sequence(list(programs), batch_first=True)


def assemble(
    compiled: Sequence[CompiledRequest],
    plans: Sequence[Plan],
    embedding: Tensor,
    user_state: Tensor,
) -> Work:
    """Return the tensors that a batch of compiled requests runs on.

    Args:
        compiled: B requests.
        plans: the plan of each.
        embedding: ``(B, H, D)`` float32.
        user_state: ``(B, Us)`` float32.
    """
    exclude = [torch.tensor(one.exclude, dtype=torch.int64) for one in compiled]
    return Work(
        embedding=embedding,
        user_state=user_state,
        scan=pad_programs([one.scan for one in compiled]),
        verify=pad_programs([one.verify for one in compiled]),
        exclude=torch.nn.utils.rnn.pad_sequence(exclude, batch_first=True, padding_value=-1),
        value_ops=pad_programs([one.value_ops for one in compiled]),
        value_constants=pad_programs([one.value_constants for one in compiled]),
        probes=torch.tensor([plan.probes for plan in plans], dtype=torch.int64),
        ann_k=torch.tensor([plan.ann_k for plan in plans], dtype=torch.int64),
        semantic_k=torch.tensor([plan.semantic_k for plan in plans], dtype=torch.int64),
        k=torch.tensor([one.k for one in compiled], dtype=torch.int64),
        tasks=torch.tensor(
            [
                [name not in plan.without for name in one.tasks]
                for one, plan in zip(compiled, plans, strict=True)
            ],
            dtype=torch.int8,
        ),
    )


class Retriever(nn.Module):
    """One generation over some documents: all of them in one process, or those of one shard.

    The documents may be split over several parts (one per local device); the answer does not
    depend on how. Float stages run on padded shapes and fixed summation orders, so it does not
    depend on batch neighbours either.
    """

    centroids: Tensor
    centroid_codes: Tensor
    centroid_scales: Tensor

    def __init__(
        self,
        model: nn.Module,
        centroids: Centroids,
        parts: Sequence[ItemIndex],
        spec: ServingSpec,
        semantic: SemanticSource | None = None,
    ) -> None:
        super().__init__()
        if not parts:
            raise ValueError("a retriever needs at least one part, got none")
        if (spec.semantic is None) != (semantic is None):
            raise ValueError(
                "semantic must be given if and only if the generation has semantic ids"
            )
        self.model = model
        self.register_buffer("centroids", centroids.vectors)
        self.register_buffer("centroid_codes", centroids.codes)
        self.register_buffer("centroid_scales", centroids.scales)
        self.parts = nn.ModuleList(parts)
        self.semantic = semantic
        self.tries = nn.ModuleList([semantic.trie(part) for part in parts] if semantic else [])
        self.merge = Merge()
        self.spec = spec
        self._searched: list[IvfIndex] = []
        self._tables: list[Tensor] = []
        """The page tables of what is searched; an index that outgrows its own replaces it."""

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        # A move to another device replaces the buffers.
        self._searched, self._tables = [], []
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        return self

    def _search_indexes(self) -> list[IvfIndex]:
        """Return the parts with the global centroids, checked once for every page table."""
        tables = [part.page_table for part in self.indexes]
        if list(map(id, tables)) != list(map(id, self._tables)):
            self._tables = tables
            self._searched = [
                IvfIndex(
                    centroids=self.centroids,
                    centroid_codes=self.centroid_codes,
                    centroid_scales=self.centroid_scales,
                    page_table=part.page_table,
                    codes=part.codes,
                    scales=part.scales,
                    item_ids=part.item_ids,
                    planes=part.planes,
                    columns=part.columns,
                    terms=part.terms,
                )
                for part in self.indexes
            ]
        return self._searched

    @property
    def indexes(self) -> list[ItemIndex]:
        """Return the parts with their type."""
        return [cast(ItemIndex, part) for part in self.parts]

    @property
    def documents(self) -> int:
        """Return the number of live documents in all parts."""
        return sum(part.documents for part in self.indexes)

    @torch.inference_mode()
    def encode(self, features: Sequence[Mapping[str, FeatureValues]]) -> Encoded:
        """Return query embeddings and user states; features are checked already.

        What the decoder of semantic ids reads of a user stands at the end of the state, so that it
        is made once and not by every shard.
        """
        encoded = cast(RetrievalModel, self.model).encode(features)
        if self.semantic is None:
            return encoded
        return encoded._replace(user_state=self.semantic.with_context(encoded.user_state))

    @torch.inference_mode()
    def count(self, scan: Tensor) -> Tensor:
        """Return how many live documents pass each scan program ``(B, L, 4)``, ``(B,)`` int64."""
        return torch.stack([part.count(scan) for part in self.indexes]).sum(0)

    def _probe(self, rows: Tensor, codes: Tensor, scales: Tensor, probes: Tensor) -> Tensor:
        """Return the clusters of each query row, ``(Q, P)`` int32, -1 beyond its probes."""
        num_clusters = self.centroids.shape[0]
        clusters = torch.full((rows.shape[0], int(probes.max())), -1, dtype=torch.int32)
        # The int8 shortlist depends on P, so rows of different plans are probed apart.
        for count in probes.unique().tolist():
            at = torch.nonzero(probes == count).flatten()
            if count == num_clusters:
                clusters[at, :count] = torch.arange(num_clusters, dtype=torch.int32)
                continue
            clusters[at, :count] = coarse_probe(
                rows[at],
                codes[at],
                scales[at],
                self.centroids,
                self.centroid_codes,
                self.centroid_scales,
                count,
            )
        return clusters

    def _scan(self, work: Work, width: int) -> list[ScanResult]:
        """Return the best ``width`` slots of each query row in every part."""
        heads = work.embedding.shape[1]
        rows = work.embedding.flatten(0, 1)  # (Q, D)
        programs = work.scan.repeat_interleave(heads, 0)  # (Q, L, 4)
        verify = work.verify.repeat_interleave(heads, 0)
        exclude = work.exclude.repeat_interleave(heads, 0)
        fewest, most = int(work.probes.min()), int(work.probes.max())
        if fewest == most:
            return [
                index.search(rows, programs, verify, part.slots_of(exclude), most, width)
                for part, index in zip(self.indexes, self._search_indexes(), strict=True)
            ]
        codes, scales = quantize_rows(rows)
        clusters = self._probe(rows, codes, scales, work.probes.repeat_interleave(heads))
        return [
            part.scan(codes, scales, clusters, programs, verify, exclude, width)
            for part in self.indexes
        ]

    def _generate(self, work: Work) -> list[Generated | None]:
        """Return the best semantic candidates of every part; None where nobody asked for any."""
        if not bool(work.semantic_k.any()):
            return [None] * len(self.parts)
        if self.semantic is None:
            raise ValueError("semantic_k must be 0 in a generation without semantic ids")
        return [
            self.semantic.search(work, part, cast(LiveTrie, trie))
            for part, trie in zip(self.indexes, self.tries, strict=True)
        ]

    @torch.inference_mode()
    def open(self, work: Work, proceed: Proceed = always) -> tuple[RoundOne, list[PartCandidates]]:
        """Run round one: probe, filter and scan, and the search for semantic candidates.

        Args:
            work: the batch.
            proceed: is called before the search for semantic candidates.

        Returns:
            The best candidates per head over all parts, the best semantic ones beside them, and
            what each part keeps for round two.

        Raises:
            ValueError: if semantic candidates are asked of a generation without semantic ids.
        """
        watch = Stopwatch()
        batch, heads, _ = work.embedding.shape
        width = int(work.ann_k.max())
        # A request with fewer candidates than its neighbours keeps some too many; none of those
        # passes its cutoffs, which are made for its own R.
        kept: list[PartCandidates] = []
        rounds: list[RoundOne] = []
        scanned = self._scan(work, width)
        watch.mark("ann")
        proceed("semantic")
        generated = self._generate(work)
        if work.semantic_k.any():
            watch.mark("semantic")
        no_scores, no_ids = work.embedding.new_zeros(batch, 0), work.k.new_zeros(batch, 0)
        for found, beside in zip(scanned, generated, strict=True):
            candidates = PartCandidates(
                found.scores.view(batch, heads, width),
                found.item_ids.view(batch, heads, width),
                found.slots.view(batch, heads, width),
                beside,
            )
            kept.append(candidates)
            rounds.append(
                RoundOne(
                    candidates.scores,
                    candidates.item_ids,
                    found.probed.view(batch, heads).sum(1),
                    found.eligible.view(batch, heads).sum(1),
                    no_scores if beside is None else beside.scores,
                    no_ids if beside is None else beside.item_ids,
                    {},
                )
            )
        merged = rounds[0] if len(rounds) == 1 else self.merge.candidates(rounds, width)
        watch.mark("ann")
        return merged._replace(times=watch.times), kept

    @torch.inference_mode()
    def close(
        self,
        work: Work,
        candidates: Sequence[PartCandidates],
        cutoffs: Cutoffs,
        proceed: Proceed = always,
    ) -> RoundTwo:
        """Run round two on the candidates that pass the global cut: refine, rerank and value.

        Args:
            work: the batch.
            candidates: what round one kept.
            cutoffs: what passes.
            proceed: is called before the candidates of each part are reranked, and valued.
        """
        rounds = [
            self._finish(part, work, kept, cutoffs, proceed)
            for part, kept in zip(self.indexes, candidates, strict=True)
        ]
        return rounds[0] if len(rounds) == 1 else self.merge(rounds, int(work.k.max()))

    def _finish(
        self,
        part: ItemIndex,
        work: Work,
        candidates: PartCandidates,
        cutoffs: Cutoffs,
        proceed: Proceed,
    ) -> RoundTwo:
        watch = Stopwatch()
        batch, heads, _ = work.embedding.shape
        own = Cutoffs(*(one[:, :heads] for one in cutoffs))
        passing = passes(candidates.scores, candidates.item_ids, own)  # (B, H, R)
        needed = heads if self.spec.item_schema.head_merge == "intersection" else 1
        flat = candidates.slots.masked_fill(~passing, -1).flatten(1)  # (B, H * R)
        semantic_kept = torch.zeros_like(work.k)
        if candidates.generated is not None and cutoffs.scores.shape[1] > heads:
            of_source = _passing_slots(candidates.generated, cutoffs)  # (B, Rs)
            semantic_kept = (of_source >= 0).sum(1)
            if needed > 1:
                # The source is no head: it adds to what the heads agree on.
                flat, needed = _distinct(flat, needed)[0], 1
            flat = torch.cat([flat, of_source], 1)
        slots, valid = _distinct(flat, needed)  # (B, U)
        refined = part.refine(work.embedding, slots)  # (B, U, H)
        watch.mark("refine")
        proceed("rerank")
        by_head = refined.masked_fill(~valid[:, :, None], 0.0)
        item_ids, signals = part.items_at(slots)  # (B, U), (B, U, Vs)
        state = work.user_state
        if self.semantic is not None:
            state = self.semantic.without_context(state)
        rank = cast(RetrievalModel, self.model).rank_slots
        tasks = task_probabilities(rank, work, state, part.cache, slots, by_head, signals)
        watch.mark("rerank")
        proceed("value")
        # Adding zero makes both zeros the same one, whichever the maximum picks.
        score = (refined + 0.0).amax(2)  # (B, U)
        columns = torch.cat([score[:, :, None], tasks, signals], 2).flatten(0, 1)
        request = torch.arange(batch).repeat_interleave(slots.shape[1])
        values = value_program(columns, request, work.value_ops, work.value_constants)
        # An infinite value still ranks its item: only padding is -inf, and its id is -1.
        values = values.clamp_(-_MAX_VALUE, _MAX_VALUE).view(slots.shape)
        best = select_topk(values, item_ids, int(work.k.max()))
        missing = best.positions < 0
        at = best.positions.clamp(min=0)
        best_score = score.gather(1, at).masked_fill_(missing, float("-inf"))
        per_task = at[:, :, None].expand(-1, -1, tasks.shape[2])
        best_tasks = tasks.gather(1, per_task).masked_fill_(missing[:, :, None], 0.0)
        watch.mark("value")
        return RoundTwo(
            item_ids=best.item_ids,
            values=best.scores,
            refined=best_score,
            tasks=best_tasks,
            kept=passing.sum((1, 2)),
            semantic_kept=semantic_kept,
            reranked=valid.sum(1),
            times=watch.times,
        )

    @torch.inference_mode()
    def forward(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer a batch of requests over the documents of this process.

        Raises:
            RequestError: if a request cannot be served as stated.
        """
        if not requests:
            return []
        watch = Stopwatch()
        compiled = [compile_request(request, self.spec) for request in requests]
        watch.mark("compile")
        counts: list[int | None] = [None] * len(compiled)
        asking = [at for at, one in enumerate(compiled) if one.needs_count]
        if asking:
            found = self.count(pad_programs([compiled[at].scan for at in asking]))
            for at, eligible in zip(asking, found.tolist(), strict=True):
                counts[at] = eligible
        documents = self.documents
        plans = [
            one.plan(self.spec, count, documents)
            for one, count in zip(compiled, counts, strict=True)
        ]
        watch.mark("filter")
        encoded = self.encode([one.features for one in compiled])
        watch.mark("tower")
        work = assemble(compiled, plans, encoded.embedding, encoded.user_state)
        first, candidates = self.open(work)
        cutoffs = self.merge.cutoffs([first], work.ann_k, work.semantic_k)
        second = self.close(work, candidates, cutoffs)
        times = {**watch.times, **first.times, **second.times}
        return split_answers(
            compiled,
            plans,
            encoded.warnings,
            first,
            second,
            self.spec,
            counts,
            times,
            documents=documents,
        )


def _passing_slots(generated: Generated, cutoffs: Cutoffs) -> Tensor:
    """Return the slots of semantic candidates that pass the last cutoff, -1 elsewhere.

    Args:
        generated: ``(B, Rs)`` candidates.
        cutoffs: of the heads and, last, of these.
    """
    own = Cutoffs(*(one[:, -1:] for one in cutoffs))
    passing = passes(generated.scores[:, None], generated.item_ids[:, None], own)[:, 0]
    return generated.slots.masked_fill(~passing, -1)


def _distinct(flat: Tensor, needed: int) -> tuple[Tensor, Tensor]:
    """Return the slots that come at least ``needed`` times, each once, and their mask.

    Args:
        flat: ``(B, n)`` int64 slots of several lists, each of distinct ones; -1 is none.
        needed: 1 unites the lists, their number intersects them.

    Returns:
        ``(B, U)`` int64 padded with -1, and ``(B, U)`` bool.
    """
    ordered = torch.sort(flat, 1, descending=True).values
    repeated = torch.zeros_like(ordered, dtype=torch.bool)
    repeated[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    # Equal slots stand side by side, so the first of enough of them sees itself further on.
    later = torch.nn.functional.pad(ordered[:, needed - 1 :], (0, needed - 1), value=-1)
    ordered = ordered.masked_fill(repeated | (ordered != later), -1)
    ordered = torch.sort(ordered, 1, descending=True).values
    width = max(int((ordered >= 0).sum(1).max()), 1)
    return ordered[:, :width], ordered[:, :width] >= 0

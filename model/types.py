"""Tensors that enter and leave the stages of retrieval.

Shapes: B requests, H heads (query embeddings per user), D embedding dimension, E exclusions, L and
Y program lengths, R candidates per head, Rs semantic candidates, U candidates of the union of all,
T tasks, K results.
"""

from typing import NamedTuple

from torch import Tensor

StageTimes = dict[str, int]
"""Microseconds per stage name."""


class Work(NamedTuple):
    """Everything a shard needs to answer a batch, besides its own documents."""

    embedding: Tensor
    """``(B, H, D)`` float32 query embeddings."""
    user_state: Tensor
    """``(B, Us)`` float32, the user side of the reranker; then what the decoder of semantic ids
    reads, where the generation has one."""
    scan: Tensor
    """``(B, L, 4)`` int64 filter programs over the planes."""
    verify: Tensor
    """``(B, Lv, 4)`` int64 exact filter programs; all ``NOP`` where the scan is exact."""
    exclude: Tensor
    """``(B, E)`` int64 item ids, -1 where there is none."""
    value_ops: Tensor
    """``(B, Y, 2)`` int32 value programs."""
    value_constants: Tensor
    """``(B, Y)`` float32 constants of the value programs."""
    probes: Tensor
    """``(B,)`` int64 clusters to probe per head."""
    ann_k: Tensor
    """``(B,)`` int64 candidates per head that pass the scan cut."""
    semantic_k: Tensor
    """``(B,)`` int64 candidates of the decoder of semantic ids that pass their cut; 0: none."""
    k: Tensor
    """``(B,)`` int64 wanted results."""
    tasks: Tensor
    """``(B, T)`` int8, 1 where the probability of a task is computed; the value program reads no
    other one."""


class RoundOne(NamedTuple):
    """The best candidates of a set of documents, per head and of the decoder of semantic ids."""

    scores: Tensor
    """``(B, H, R)`` float32 scan scores, best first; ``-inf`` marks padding."""
    item_ids: Tensor
    """``(B, H, R)`` int64; -1 marks padding."""
    probed: Tensor
    """``(B,)`` int64 live slots on the probed pages, summed over the heads."""
    eligible: Tensor
    """``(B,)`` int64 probed slots that passed the scan program, summed over the heads."""
    semantic_scores: Tensor
    """``(B, Rs)`` float32 log-probabilities, best first; ``-inf`` marks padding; Rs is 0 where
    nobody asked."""
    semantic_item_ids: Tensor
    """``(B, Rs)`` int64; -1 marks padding."""
    times: StageTimes


class Cutoffs(NamedTuple):
    """The last ``(score, item_id)`` that passes, of every head and of the semantic candidates."""

    scores: Tensor
    """``(B, H)`` or, where a request of the batch asked for semantic candidates, ``(B, H + 1)``
    float32; ``-inf`` where everything passes, ``inf`` where nothing does."""
    item_ids: Tensor
    """int64 of the same shape; the largest int64 where everything passes."""


class RoundTwo(NamedTuple):
    """The best results of a set of documents after refining, reranking and valuing."""

    item_ids: Tensor
    """``(B, K)`` int64, best first; -1 marks padding."""
    values: Tensor
    """``(B, K)`` float32; ``-inf`` marks padding."""
    refined: Tensor
    """``(B, K)`` float32 inner product in fp16 storage, the best over the heads."""
    tasks: Tensor
    """``(B, K, T)`` float32 probabilities; zeros for a task that was not computed."""
    kept: Tensor
    """``(B,)`` int64 candidates that passed the global cut, summed over the heads."""
    semantic_kept: Tensor
    """``(B,)`` int64 semantic candidates that passed theirs."""
    reranked: Tensor
    """``(B,)`` int64 items of the union that were reranked."""
    times: StageTimes

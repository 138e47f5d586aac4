"""The rerankers to choose from, behind one interface.

Shapes: as in ``ranker_interface``.
"""

from silvershard.model.ranker_attention import SelfAttentionRanker
from silvershard.model.ranker_config import (
    MixtureOfLogitsConfig,
    RankerConfig,
    SelfAttentionConfig,
    check_ranker,
)
from silvershard.model.ranker_interface import Ranker, RankerShape
from silvershard.model.ranker_mixture import MixtureOfLogitsRanker
from silvershard.model.ranker_mlp import MLPRanker


def build_ranker(
    config: RankerConfig,
    *,
    dim: int,
    num_heads: int,
    state_dim: int,
    session_length: int,
    num_signals: int,
    num_tasks: int,
) -> Ranker:
    """Return an untrained reranker, which orders as the retriever does.

    Args:
        config: which one.
        dim: embedding dimension D.
        num_heads: H.
        state_dim: width of the user state without a session.
        session_length: most ids of a history that the user tower reads.
        num_signals: Vs, may be 0.
        num_tasks: T >= 1.

    Raises:
        ValueError: if the reranker does not fit the tower.
    """
    check_ranker(config, dim=dim, session_length=session_length)
    shape = RankerShape(dim, num_heads, state_dim, session_length, num_signals, num_tasks)
    if isinstance(config, SelfAttentionConfig):
        return SelfAttentionRanker(config, shape)
    if isinstance(config, MixtureOfLogitsConfig):
        return MixtureOfLogitsRanker(config, shape)
    return MLPRanker(config, shape)

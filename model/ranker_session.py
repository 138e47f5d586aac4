"""The part of a user state that holds a session: the item embeddings a reranker attends to.

Shapes: B requests, L session rows, D embedding dimension.
"""

import torch
from torch import Tensor


def session_width(session_rows: int, dim: int) -> int:
    """Columns of a user state that a session of that many rows takes; 0 without rows."""
    return session_rows * dim + 1 if session_rows else 0


def pack_session(embeddings: Tensor, lengths: Tensor) -> Tensor:
    """Return sessions as flat rows: all embeddings, then the number of real ones.

    Args:
        embeddings: ``(B, L, D)`` float32, oldest first; what lies beyond a length is not read, and
            may be anything.
        lengths: ``(B,)`` int64 in [0, L].

    Returns:
        ``(B, L * D + 1)`` float32, zeros beyond a length.

    Raises:
        ValueError: if the shapes disagree.
    """
    if embeddings.ndim != 3 or lengths.shape != embeddings.shape[:1]:
        raise ValueError(
            "embeddings must be (B, L, D) with lengths (B,), "
            f"got {tuple(embeddings.shape)} and {tuple(lengths.shape)}"
        )
    kept = embeddings.masked_fill(~real_rows(lengths, embeddings.shape[1])[:, :, None], 0.0)
    return torch.cat([kept.flatten(1), lengths.to(embeddings.dtype)[:, None]], 1)


def unpack_session(packed: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return the embeddings ``(B, L, D)`` float32 and lengths ``(B,)`` int64 of packed sessions.

    Args:
        packed: ``(B, L * D + 1)`` float32, as ``pack_session`` returns it.
        dim: D.

    Raises:
        ValueError: if the width is another.
    """
    if packed.ndim != 2 or packed.shape[1] % dim != 1 % dim:
        raise ValueError(f"packed must be (B, L * {dim} + 1), got {tuple(packed.shape)}")
    rows = (packed.shape[1] - 1) // dim
    return packed[:, :-1].reshape(-1, rows, dim), packed[:, -1].to(torch.int64)


def real_rows(lengths: Tensor, session_rows: int) -> Tensor:
    """Return which rows of each session are real, ``(B, L)`` bool."""
    return torch.arange(session_rows, device=lengths.device) < lengths[:, None]

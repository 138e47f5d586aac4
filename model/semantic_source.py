"""Semantic ids as a source of candidates: codes for the items, a decoder for the users.

It stands beside the ANN heads in round one. Its candidates have a global cut of their own and are
then treated like any other.

Shapes: B requests, Us user state of the towers, E hidden units of the decoder, n items, D embedding
dimension, L levels, V codes of a level, R candidates.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from silvershard.kernels import select_topk
from silvershard.model.index import ItemIndex
from silvershard.model.live_trie import LiveTrie
from silvershard.model.semantic_config import SemanticSpec
from silvershard.model.semantic_ids import SemanticDecoder, encode_items
from silvershard.model.semantic_search import Generated, eligible_slots, generate
from silvershard.model.types import Work


class SemanticSource(nn.Module):
    """The codebooks of a generation and the decoder over their codes.

    Args:
        spec: the sizes.
        dim: D.
    """

    codebooks: Tensor

    def __init__(self, spec: SemanticSpec, dim: int) -> None:
        super().__init__()
        self.spec = spec
        self.decoder = SemanticDecoder(spec.decoder, spec.state_dim)
        self.register_buffer("codebooks", torch.zeros(spec.decoder.levels, spec.decoder.width, dim))

    def item_codes(self, embeddings: Tensor) -> Tensor:
        """Return the codes of items, ``(n, L)`` int16.

        Args:
            embeddings: ``(n, D)`` float32, finite.
        """
        return encode_items(embeddings, self.codebooks)

    def with_context(self, user_state: Tensor) -> Tensor:
        """Return user states followed by what the decoder reads of them, ``(B, Us + E)`` float32.

        Args:
            user_state: ``(B, Us)`` float32; the decoder reads its first elements.
        """
        context = self.decoder.context(user_state[:, : self.spec.state_dim].contiguous())
        return torch.cat([user_state, context], 1)

    def without_context(self, user_state: Tensor) -> Tensor:
        """Return what ``with_context`` was given, ``(B, Us)`` float32."""
        return user_state[:, : -self.spec.decoder.hidden].contiguous()

    def trie(self, part: ItemIndex) -> LiveTrie:
        """Return the trie of the items of a part, which follows the changes of the part.

        Raises:
            ValueError: if the part has no codes, or codes of other sizes.
        """
        sizes = self.spec.decoder
        codes = part.semantic_codes
        if codes is None or codes.shape[2] != sizes.levels:
            found = "none" if codes is None else codes.shape[2]
            raise ValueError(f"every item must have {sizes.levels} semantic codes, got {found}")
        return LiveTrie(part, codes, sizes.width)

    def search(self, work: Work, part: ItemIndex, trie: LiveTrie) -> Generated:
        """Return the exact best items of a part for each request.

        R is the largest ``semantic_k`` of the batch. A request with less gets some too many, which
        do not pass its cutoff; one without any gets padding.

        Args:
            work: the batch; its user states are those of ``with_context``.
            part: the items.
            trie: of the same part.
        """
        width = int(work.semantic_k.max())
        asking = torch.nonzero(work.semantic_k).flatten()
        context = work.user_state[asking, -self.spec.decoder.hidden :]
        eligible = eligible_slots(
            part, work.scan[asking], work.verify[asking], work.exclude[asking]
        )
        found = _best(
            [generate(self.decoder, context, one, eligible, width) for one in trie.tries()], width
        )
        if len(asking) == len(work.semantic_k):
            return found
        batch = len(work.semantic_k)
        everyone = Generated(
            scores=found.scores.new_full((batch, width), float("-inf")),
            item_ids=found.item_ids.new_full((batch, width), -1),
            slots=found.slots.new_full((batch, width), -1),
            expanded=found.expanded.new_zeros(batch),
            exact=found.exact.new_ones(batch),
        )
        for all_rows, rows in zip(everyone, found, strict=True):
            all_rows[asking] = rows
        return everyone


def _best(found: Sequence[Generated], width: int) -> Generated:
    """Return the best of what was found in tries of different items; ``width`` results."""
    if len(found) == 1:
        return found[0]
    scores = torch.cat([one.scores for one in found], 1)
    item_ids = torch.cat([one.item_ids for one in found], 1)
    slots = torch.cat([one.slots for one in found], 1)
    best = select_topk(scores, item_ids, width)
    missing = best.positions < 0
    return Generated(
        scores=best.scores,
        item_ids=best.item_ids,
        slots=slots.gather(1, best.positions.clamp(min=0)).masked_fill_(missing, -1),
        expanded=torch.stack([one.expanded for one in found]).sum(0),
        exact=torch.stack([one.exact for one in found]).all(0),
    )

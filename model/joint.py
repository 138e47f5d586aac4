"""Training through the index: items in int8, centroids as parameters, lists that queries agree on.

The towers see the items as the index will score them, in int8 codes. The centroids learn with the
towers: an item belongs to all clusters, by a softmax over its inner products with the centroids,
so that a loss over clusters has a gradient with respect to items and centroids. Four terms shape
the clusters: items lie near their centroids, clusters hold equally many items, the items that a
query scores best lie in the clusters that it probes first, and these are not the longest ones.

Shapes: B positions of a batch, H heads, n items of a batch, D embedding dimension, C clusters.

Source: Bengio, Leonard and Courville, "Estimating or Propagating Gradients Through Stochastic
Neurons for Conditional Computation", 2013, section 4 (straight-through); Zhan et al., "Learning
Discrete Representations via Constrained Clustering for Effective and Efficient Dense Retrieval",
WSDM 2022, section 4 (balanced clusters within retrieval training); Xiao et al., "Distill-VQ:
Learning Retrieval Oriented Vector Quantization By Distilling Knowledge from Dense Embeddings",
SIGIR 2022, section 3 (the scores of the embeddings teach the index).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from silvershard.kernels import quantize_rows
from silvershard.model.joint_config import JointConfig

_SMALLEST_SHARE = 1e-9


def straight_through(items: Tensor) -> Tensor:
    """Items as their int8 codes say, with the gradient of the items themselves.

    Args:
        items: ``(n, D)`` float32, finite.

    Returns:
        ``codes * scale`` of every row, ``(n, D)`` float32; its gradient is passed to ``items``
        unchanged.
    """
    exact = items.detach()
    codes, scales = quantize_rows(exact)
    coded = codes.float() * scales[:, None]
    # An item less itself is exactly 0, so that the value has the bits of the coded form.
    return coded + (items - exact)


def soft_assignment(similarity: Tensor, temperature: float) -> Tensor:
    """Shares ``(n, C)`` of each item in the clusters, rows sum to 1; nearly one-hot where cold."""
    return torch.softmax(similarity / temperature, 1)


class JointIndex(nn.Module):
    """The centroids of an index in training, and the loss that shapes them.

    Args:
        config: weights and temperatures.
        pull: weight of the distance of items from their centroids.
        centroids: ``(C, D)`` float32 to begin with.
    """

    def __init__(self, config: JointConfig, pull: float, centroids: Tensor) -> None:
        super().__init__()
        self._config = config
        self._pull = pull
        self.centroids = nn.Parameter(centroids.clone())

    def forward(
        self, query: Tensor, items: Tensor, scores: Tensor, log_odds: Tensor, temperature: float
    ) -> Tensor:
        """Loss of a batch, a scalar.

        The gradient reaches items and centroids, not the queries: a query that moves towards its
        clusters loses the order of its best items, which was measured to cost a tenth of NDCG@10.

        Args:
            query: ``(B, H, D)`` unit queries.
            items: ``(m, D)`` unit items whose last n were drawn by ``log_odds``.
            scores: ``(B, H, n)`` inner products of queries and the last n items.
            log_odds: ``(n,)`` log probability of drawing each of them.
            temperature: of the softmax over scores in the towers' own loss.
        """
        config, rows = self._config, query.detach().flatten(0, 1)  # (B * H, D)
        centroids = functional.normalize(self.centroids, dim=1)
        similarity = items @ centroids.T  # (m, C)
        shares = soft_assignment(similarity, config.assignment_temperature)
        pull = (1.0 - (shares * similarity).sum(1)).mean()
        drawn = shares[len(shares) - len(log_odds) :]  # (n, C)
        # Weighted by the inverse of their odds, the drawn items stand for the whole catalogue.
        held = torch.softmax(-log_odds, 0) @ drawn  # (C,)
        uneven = (held * (held.clamp(min=_SMALLEST_SHARE) * len(held)).log()).sum()
        steep = scores.detach().flatten(0, 1) * (config.sharpness / temperature)
        wanted = torch.softmax(steep - log_odds, 1) @ drawn  # (B * H, C)
        routed = torch.log_softmax(rows @ centroids.T / config.routing_temperature, 1)
        missed = -(wanted * routed).sum(1).mean()
        # Items that a probe reads, as a multiple of the mean list: without this term the lists that
        # most queries want grow, and recall is paid for with reading.
        read = (routed.exp().mean(0) * held).sum() * len(held)
        return (
            self._pull * pull
            + config.balance * uneven
            + config.routing * missed
            + config.reading * read
        )

"""The weights that towers start their training from.

Shapes: N items, n interactions, D embedding dimension.
"""

import torch
from torch import Tensor

from silvershard.model.bags import Bags, inputs_of
from silvershard.model.training_config import TrainingConfig
from silvershard.model.two_tower import TwoTower
from silvershard.model.two_tower_config import HISTORY_TABLE, RECENT_TABLE, SESSION

_CONTENT_SCALE = 0.4
_ID_NOISE = 0.02
_POOL_SCALE = 0.3
_ITEM_TEXT_SCALE = 1.5
_QUERY_TEXT_SCALE = 3.0


@torch.no_grad()
def fill_weights(
    model: TwoTower, items: Tensor, users: Tensor, item_rows: Tensor, config: TrainingConfig
) -> None:
    """Start the tables of items from a factorisation of the interactions, in place.

    Args:
        model: whose tables and head are filled; the other weights stay.
        items: ``(n,)`` int64 item of each interaction.
        users: ``(n,)`` int64 user of each interaction, ascending.
        item_rows: ``(N,)`` int64 table row of each item.
        config: the recipe.
    """
    dim = config.dim
    for tables in (model.user_tables, model.item_tables):
        for name in tables.features:
            tables.weight(name).normal_(std=_CONTENT_SCALE * dim**-0.5)
    factors = _item_factors(items, users, item_rows.shape[0], dim)
    ids = model.item_tables.weight(config.item)
    ids[item_rows] = factors + _ID_NOISE * torch.randn_like(factors)
    for name in (HISTORY_TABLE, RECENT_TABLE):
        model.user_tables.weight(name)[item_rows] = factors
    if model.session_table is not None:
        session = model.session_table.weight(SESSION)
        session.normal_(std=_CONTENT_SCALE * dim**-0.5)
        session[item_rows] = factors
    # Each head starts as a weighted sum of the pooled features, so that histories start out near
    # the items that share their factors.
    model.user_head.weight.zero_()
    model.user_head.bias.zero_()
    for begin in range(0, model.config.profile_dim, dim):
        # The history and its newest ids are the first two parts of the profile.
        scale = 1.0 if begin < 2 * dim else _POOL_SCALE
        for head in range(len(model.config.heads)):
            block = model.user_head.weight[begin:, head * dim :]
            block[:dim, :dim].diagonal().fill_(scale)
    # Numbers say little of a user at first, and nothing of an item.
    for numbers, scale in ((model.user_features.numbers, _CONTENT_SCALE), (model.item_numbers, 0)):
        for name in numbers.names:
            layer = numbers.projection(name).projection
            layer.bias.zero_()
            layer.weight.zero_()
            layer.weight[: layer.in_features, : layer.out_features].normal_(std=scale * dim**-0.5)


@torch.no_grad()
def fill_text_weights(model: TwoTower, items: Bags, queries: Bags, item_rows: Tensor) -> None:
    """Start both projections of texts from the principal axes of those that ask, in place.

    So a text is near the items whose texts are like it before anything is learnt. The axes are
    turned to where texts lie nearest to the vectors of their items, which turns no text away from
    another: so histories are near the texts of what goes with them.

    Args:
        model: with an encoder of texts; its other weights are filled already.
        items: inputs of the projection of items' texts.
        queries: inputs of the projection of the texts that ask for items.
        item_rows: ``(N,)`` int64 table row of each item.

    Source:
        Schoenemann, A generalized solution of the orthogonal Procrustes problem, 1966.
    """
    assert model.text is not None
    dim, begin = model.config.dim, model.config.text_column
    numbers = _given(queries, model.text.query.width).double()
    axes = torch.linalg.eigh(numbers.T @ numbers).eigenvectors.flip(1)[:, :dim].float()  # (E, d)
    vectors = model.item_tables.weight(model.config.item)[item_rows]
    texts = inputs_of(items, model.text.item.width)[:, 1:] @ axes  # (N, d)
    left, _, right = torch.linalg.svd((texts.T @ vectors).double(), full_matrices=False)
    axes = axes @ (left @ right).float()  # (E, D)
    for projection, bags, scale in (
        (model.text.item, items, _ITEM_TEXT_SCALE),
        (model.text.query, queries, _QUERY_TEXT_SCALE),
    ):
        projected = _given(bags, projection.width) @ axes
        length = torch.linalg.vector_norm(projected, dim=1).sum() / max(len(projected), 1)
        layer = projection.projection
        layer.bias.zero_()
        layer.weight.zero_()
        layer.weight[1 : 1 + len(axes), : axes.shape[1]] = axes * (scale / length.clamp(min=1e-6))
    for head in range(len(model.config.heads)):
        block = model.user_head.weight[begin : begin + dim, head * dim : (head + 1) * dim]
        block.zero_().diagonal().fill_(1.0)


def _given(bags: Bags, width: int) -> Tensor:
    """The numbers ``(n, W)`` of those bags that have any."""
    inputs = inputs_of(bags, width)
    return inputs[inputs[:, 0] > 0, 1:]


def _item_factors(items: Tensor, users: Tensor, num_items: int, dim: int) -> Tensor:
    """Factors ``(N, D)`` float32 of the degree-normalised interaction matrix, mean length 1.

    Rows of items without interactions are zero. Normalising items by the fourth root of their
    degree keeps part of their popularity.
    """
    _, user = torch.unique_consecutive(users, return_inverse=True)
    num_users = int(user[-1]) + 1
    of_user = torch.bincount(user).float()
    of_item = torch.bincount(items, minlength=num_items).float()
    values = of_user[user] ** -0.5 * of_item[items] ** -0.25
    matrix = torch.sparse_coo_tensor(
        torch.stack([user, items]), values, (num_users, num_items), check_invariants=False
    ).coalesce()
    rank = min(dim, num_users, num_items)
    _, strength, right = torch.svd_lowrank(matrix, q=rank, niter=4)
    factors = torch.zeros(num_items, dim)
    factors[:, :rank] = right * strength
    lengths = torch.linalg.vector_norm(factors, dim=1)
    scaled: Tensor = factors / lengths[lengths > 0].mean().clamp(min=1e-6)
    return scaled

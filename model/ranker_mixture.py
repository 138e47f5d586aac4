"""The mixture-of-logits reranker: gated inner products of several embeddings of user and item.

Shapes: as in ``ranker_interface``; n = B * U candidates, I item components, J user components,
E component dimension, C = I * J logits of a pair.

Source: Zhai et al., "Revisiting Neural Retrieval on Accelerators", KDD 2023, sections 3 and 4.
"""

import math

import torch
from torch import Tensor, nn

from silvershard.model.dense import PaddedLinear, padded
from silvershard.model.ranker_arithmetic import (
    group_indicator,
    group_lengths,
    joined,
    linear,
    product,
    request_product,
    softmax_powers,
)
from silvershard.model.ranker_config import MixtureOfLogitsConfig
from silvershard.model.ranker_interface import Prepared, Ranker, RankerShape, retriever_skip

_LOG2_E = math.log2(math.e)


class MixtureOfLogitsRanker(Ranker):
    """Inner products of unit-length components, mixed by gates of user, item and their logits.

    ``logit_t = skip_t + scale_t * sum_c gate_tc * cosine_c / temperature``, where ``gate_t`` is a
    softmax over the C pairs of components. The tasks share components and the hidden layers of the
    gate; each has a gate of its own, so a task costs C outputs and no further inner products.
    Signals take part in the item's components and in its part of the gate.
    """

    user_groups: Tensor
    item_groups: Tensor
    task_groups: Tensor

    def __init__(self, config: MixtureOfLogitsConfig, shape: RankerShape) -> None:
        super().__init__(shape)
        self.config = config
        pairs = config.user_components * config.item_components
        hidden, tasks = config.gate_hidden, shape.num_tasks
        user_inputs = shape.num_heads * shape.dim + shape.state_dim
        self.user = PaddedLinear(user_inputs, config.user_components * config.component_dim)
        self.user_hidden = PaddedLinear(user_inputs, hidden)
        self.user_gate = PaddedLinear(hidden, tasks * pairs)
        self.item_width = config.item_components * config.component_dim
        # One product makes the components and the hidden layer of the item's part of the gate.
        self.item = PaddedLinear(shape.dim + shape.num_signals, self.item_width + hidden)
        self.cross_hidden = PaddedLinear(pairs + shape.num_heads, hidden)
        self.gate = PaddedLinear(2 * hidden, tasks * pairs)
        self.scale = nn.Parameter(torch.zeros(tasks))
        self.skip = retriever_skip(shape.num_heads, tasks)
        for name, groups, size in (
            ("user_groups", config.user_components, config.component_dim),
            ("item_groups", config.item_components, config.component_dim),
            ("task_groups", tasks, pairs),
        ):
            self.register_buffer(name, group_indicator(groups, size), persistent=False)
        self.request_floats = (
            3 * (user_inputs + hidden + tasks * pairs)
            + 3 * padded(config.user_components) * config.component_dim
        )
        self.candidate_floats = (
            3 * (shape.dim + shape.num_signals)
            + 4 * (self.item_width + 2 * hidden + tasks * pairs)
            + 3 * config.item_components * padded(config.user_components)
        )

    def prepare(self, query: Tensor, user_state: Tensor) -> Prepared:
        """Return unit components ``(B, E, padded(J))`` and the user's gate ``(B, T * C)``."""
        config = self.config
        given = torch.cat([query.flatten(1), user_state], 1)
        components = self.user(given)  # (B, J * E)
        lengths = group_lengths(components, self.user_groups, config.user_components)
        components = components.view(-1, config.user_components, config.component_dim)
        unit = (components / lengths[:, :, None]).transpose(1, 2)
        extra = padded(config.user_components) - config.user_components
        gate = self.user_gate(torch.relu(self.user_hidden(given)))
        return torch.nn.functional.pad(unit, (0, extra)), gate

    def score(self, prepared: Prepared, items: Tensor, refined: Tensor, signals: Tensor) -> Tensor:
        """Return the logits ``(B, U, T)``."""
        config, tasks = self.config, self.shape.num_tasks
        users, user_gate = prepared
        batch, width = refined.shape[:2]
        item = linear(self.item, joined(items, self.scaled(signals)))
        components = item[:, : self.item_width].contiguous()
        lengths = group_lengths(components, self.item_groups, config.item_components)  # (n, I)
        rows = components.view(batch, width * config.item_components, config.component_dim)
        products = request_product(rows, users)[:, :, : config.user_components]
        cosines = products.reshape(batch, width, config.item_components, -1)
        cosines = (cosines / lengths.view(batch, width, -1, 1)).flatten(2)  # (B, U, C)
        cross_hidden = linear(self.cross_hidden, joined(cosines, refined))
        hidden = torch.cat([item[:, self.item_width :], cross_hidden], 1).relu_()
        gates = linear(self.gate, hidden).view(batch, width, -1) + user_gate[:, None]
        weights = softmax_powers(gates.mul_(_LOG2_E).view(batch * width, tasks, -1))  # (n, T, C)
        total = product(weights.flatten(1), self.task_groups)[:, :tasks]
        mixed = weights * cosines.view(batch * width, 1, -1)
        mixed = product(mixed.flatten(1), self.task_groups)[:, :tasks]
        learned = mixed / total * (self.scale / config.temperature)
        return learned.add_(linear(self.skip, joined(refined))).view(batch, width, -1)

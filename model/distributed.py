"""The towers on several processes, by TorchRec's DistributedModelParallel.

This module and ``embeddings.py`` know TorchRec, and it alone knows torch.distributed. It imports
both only when towers are divided.

TorchRec's planner cuts the tables over the processes by table and by column; the dense parts are on
all of them (DistributedDataParallel). Tables keep TorchRec's dense kernel, whose gradients are
ordinary ones, so that the optimizer is that of one process: FBGEMM's fused Adam passes over rows
that a batch does not name, while Adam goes on moving them.

Shapes: B positions of a batch, m items of a batch, H heads, D embedding dimension, W processes.

Source: Ivchenko et al., "TorchRec: a PyTorch Domain Library for Recommendation Systems", RecSys
2022, section 2.
"""

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from silvershard.model.bags import Bags, Sequences
from silvershard.model.distributed_step import BothTowers, dropout_seed, share_of
from silvershard.model.embeddings import PooledTables, SequenceTables
from silvershard.model.training_batches import UserBatch, load_optimizer_state, optimizer_state
from silvershard.model.two_tower import History, TwoTower

T = TypeVar("T")
L = TypeVar("L", Bags, Sequences)

# Share of the memory of a device that is left to activations and the dense parts.
_RESERVED = 0.15
_SMALLEST_CUT = 8
"""Widths that this does not divide are not cut by column: the halves must be whole fours."""


class Peers(NamedTuple):
    """The processes of a training, as one of them sees them."""

    rank: int
    """Of this process, from 0, which leads."""
    size: int
    """W."""
    device: torch.device
    """Where this process computes embeddings."""


@contextlib.contextmanager
def joined(
    meeting: Path, rank: int, size: int, *, device: str, timeout_s: float
) -> Iterator[Peers]:
    """Meet the other processes of a training on this machine, and leave them in the end.

    Args:
        meeting: a file that does not exist, through which they find each other.
        rank: of this process, in [0, size).
        size: W.
        device: cpu for gloo; cuda for NCCL, one GPU per process.
        timeout_s: how long one process waits for another before it fails.

    Raises:
        RuntimeError: if another process does not come, or leaves.
    """
    import torch.distributed as dist

    place = torch.device(device, rank) if device == "cuda" else torch.device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo",
        init_method=f"file://{meeting.absolute()}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout_s),
    )
    try:
        yield Peers(rank, size, place)
    finally:
        dist.destroy_process_group()


class ValueTables(nn.Module):
    """``SequenceTables`` as pooled tables: every value is a bag of its own, with weight 1.

    TorchRec's sequence tables have no dense kernel on CPUs; the rows that they would give are these
    sums of one row, exactly.
    """

    def __init__(self, tables: SequenceTables) -> None:
        super().__init__()
        weights = {name: tables.weight(name) for name in tables.features}
        self.features = tables.features
        self.values = PooledTables({name: len(one) for name, one in weights.items()}, tables.dim)
        with torch.no_grad():
            for name, weight in weights.items():
                self.values.weight(name).copy_(weight)

    def forward(self, sequences: Mapping[str, Sequences]) -> dict[str, Tensor]:
        """Return the embedding of each value in order, ``(n, D)`` float32 per feature."""
        # One value more than there are: a process without any takes part in the exchange too.
        rows = {name: functional.pad(one.rows, (0, 1)) for name, one in sequences.items()}
        ones = {name: torch.ones_like(one) for name, one in rows.items()}
        found = self.values(
            {name: Bags(rows[name], ones[name].float(), ones[name]) for name in rows}
        )
        return {name: one[:-1] for name, one in found.items()}


class _Piece(NamedTuple):
    """Part of a parameter that a process holds."""

    at: tuple[slice, ...]
    """Where it is in the whole parameter."""
    rows: slice
    """Where it is in the parameter of this process."""


class _Sent(NamedTuple):
    """A piece on its way to the process that leads."""

    name: str
    at: tuple[slice, ...]
    values: Tensor


_WHOLE: tuple[_Piece, ...] = (_Piece((slice(None),), slice(None)),)


class DistributedStep:
    """The towers of a model that several processes train.

    Every process holds the whole model, which gave the initial weights and gets the present ones
    where it leads; lookups, gradients and the state of the optimizer are divided.
    """

    def __init__(self, model: TwoTower, peers: Peers) -> None:
        self.device = peers.device
        self.leads = peers.rank == 0
        self._peers = peers
        self._model = model
        named = {id(one): name for name, one in model.named_parameters()}
        self._names = [named[id(one)] for one in model.tower_parameters()]
        self._objects = _object_group(peers)
        # TorchRec fills its tables with random numbers before they get their weights.
        with torch.random.fork_rng(devices=[]):
            self._towers = _divided(model, set(self._names), peers)
        present = dict(self._towers.named_parameters())
        held = {
            name: present[_divided_name(name)]
            for name in self._names
            if _divided_name(name) in present
        }
        self._held = list(held)
        self.parameters = list(held.values())
        self._pieces = self._find_pieces()
        with torch.no_grad():
            for name, own in held.items():
                own.copy_(self._own_part(name, model.get_parameter(name).detach()))

    def _find_pieces(self) -> dict[str, tuple[_Piece, ...]]:
        """What this process holds of each parameter."""
        state = self._towers.state_dict()
        pieces = {}
        for name, own in zip(self._held, self.parameters, strict=True):
            table = state[_divided_name(name)]
            pieces[name] = _WHOLE
            if hasattr(table, "local_shards"):
                pieces[name] = tuple(_piece_of(shard, own) for shard in table.local_shards())
        return pieces

    def embed(
        self, users: UserBatch, items: Mapping[str, Bags], seed: int
    ) -> tuple[Tensor, Tensor]:
        """Return the embeddings of the whole batch, of which this process computes its share."""
        history, dropout, peers = users.history, users.dropout, self._peers
        own = UserBatch(
            History(
                bags={name: part_of(one, peers) for name, one in history.bags.items()},
                session=part_of(history.session, peers),
            ),
            dropout[share_of(len(dropout), peers.rank, peers.size)].to(peers.device),
        )
        bags = {name: part_of(one, peers) for name, one in items.items()}
        self._towers.train()
        # What the towers make on their way belongs where their tables are.
        with dropout_seed(seed, peers.rank), peers.device:
            query, embedded = self._towers(own, bags)
        num_items = len(next(iter(items.values())).lengths)
        return gathered(query, len(dropout), peers), gathered(embedded, num_items, peers)

    def synchronise(self) -> None:
        """Bring the present weights into the model of the process that leads."""
        held = zip(self._held, self.parameters, strict=True)
        whole = self._collect({name: own.detach() for name, own in held})
        with torch.no_grad():
            for name, weight in whole.items():
                self._model.get_parameter(name).copy_(weight)

    def agree(self, answer: Callable[[], T]) -> T:
        """Return what the process that leads answers; the others do not ask."""
        import torch.distributed as dist

        said = [answer() if self.leads else None]
        dist.broadcast_object_list(said, src=0, group=self._objects)
        return cast(T, said[0])

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """Return the whole state where this process leads, else part of it."""
        by_kind: dict[str, dict[str, Tensor]] = {}
        whole: dict[str, Tensor] = {}
        further = len(self._names) - len(self._held)
        for key, value in optimizer_state(optimizer).items():
            number, kind = key.split(".", 1)
            if int(number) < len(self._held):
                by_kind.setdefault(kind, {})[self._held[int(number)]] = value
            else:
                whole[f"{int(number) + further}.{kind}"] = value
        for kind, tensors in by_kind.items():
            if next(iter(tensors.values())).ndim:
                found = self._collect(tensors)
            else:
                # A count of steps, which all parameters share.
                found = dict.fromkeys(self._names, next(iter(tensors.values())))
            numbers = {name: number for number, name in enumerate(self._names)}
            whole |= {f"{numbers[name]}.{kind}": one for name, one in found.items()}
        return whole

    def load_optimizer_state(
        self, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
    ) -> None:
        """Continue from the whole state of an optimizer, of any number of processes."""
        own: dict[str, Tensor] = {}
        further = len(self._names) - len(self._held)
        places = {name: place for place, name in enumerate(self._held)}
        for key, value in tensors.items():
            number, kind = key.split(".", 1)
            if int(number) >= len(self._names):
                own[f"{int(number) - further}.{kind}"] = value
            elif (name := self._names[int(number)]) in places:
                own[f"{places[name]}.{kind}"] = self._own_part(name, value) if value.ndim else value
        load_optimizer_state(optimizer, own)

    def _own_part(self, name: str, whole: Tensor) -> Tensor:
        """What this process holds of a tensor like a parameter, laid out as it holds that."""
        part = torch.empty(self.parameters[self._held.index(name)].shape)
        for piece in self._pieces[name]:
            part[piece.rows] = whole[piece.at]
        return part

    def _collect(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors by name of a parameter where this process leads, else nothing.

        Args:
            tensors: laid out as this process holds the parameters.
        """
        import torch.distributed as dist

        sent = [
            _Sent(name, piece.at, tensor[piece.rows].cpu())
            for name, tensor in tensors.items()
            for piece in self._pieces[name]
            if self.leads or self._pieces[name] is not _WHOLE
        ]
        received: list[Any] = [None] * self._peers.size
        dist.gather_object(sent, received if self.leads else None, dst=0, group=self._objects)
        whole: dict[str, Tensor] = {}
        for name, at, values in (one for part in received for one in part or ()):
            if name not in whole:
                whole[name] = torch.empty(self._model.get_parameter(name).shape)
            whole[name][at] = values
        return whole


def _piece_of(shard: Any, own: Tensor) -> _Piece:
    """The place of a shard of TorchRec in its table and in the parameter that holds it."""
    offsets, sizes = shard.metadata.shard_offsets, shard.metadata.shard_sizes
    at = tuple(slice(one, one + size) for one, size in zip(offsets, sizes, strict=True))
    # The shards of a table that a process holds lie one after another in one tensor.
    first = (shard.tensor.storage_offset() - own.storage_offset()) // own.shape[1]
    return _Piece(at, slice(first, first + sizes[0]))


def _divided_name(name: str) -> str:
    """The name of a tower's parameter among those of the divided towers."""
    return "model." + name.replace(
        "session_table.tables.embeddings.", "session_table.values.tables.embedding_bags."
    )


def _object_group(peers: Peers) -> Any:
    """The group through which processes exchange what is not on their devices; None: all."""
    import torch.distributed as dist

    return None if peers.device.type == "cpu" else dist.new_group(backend="gloo")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Use TorchRec without its warnings about how it imports modules and calls torch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _divided(model: TwoTower, learned: set[str], peers: Peers) -> nn.Module:
    """Return a copy of the towers of a model, cut over the processes; its tables are empty.

    Args:
        model: on CPU.
        learned: names of the parameters that are trained.
        peers: the processes.
    """
    with _quiet():
        import torch.distributed as dist
        from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
        from torchrec.distributed.model_parallel import (
            DefaultDataParallelWrapper,
            DistributedModelParallel,
        )
        from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
        from torchrec.distributed.planner.stats import NoopEmbeddingStats
        from torchrec.distributed.planner.storage_reservations import (
            FixedPercentageStorageReservation,
        )
        from torchrec.distributed.planner.types import (
            KernelConfig,
            TopologyFactory,
            TrainerConfig,
        )
    dim = model.config.dim
    own = copy.deepcopy(model)
    for name, parameter in own.named_parameters():
        parameter.requires_grad_(name in learned)
    if isinstance(own.session_table, SequenceTables):
        own.session_table = cast(Any, ValueTables(own.session_table))
    towers = BothTowers(own)
    cuts = ["table_wise"] if dim % _SMALLEST_CUT else ["table_wise", "column_wise"]
    limits = ParameterConstraints(
        sharding_types=cuts, compute_kernels=["fused"], min_partition=dim // 2
    )
    tables = [part for part in towers.modules() if isinstance(part, PooledTables)]
    sharders = [EmbeddingBagCollectionSharder()]
    planner = EmbeddingShardingPlanner(
        topology=TopologyFactory.create_topology(
            TrainerConfig(world_size=peers.size, local_world_size=peers.size),
            kernel_config=KernelConfig(compute_device=peers.device.type),
        ),
        constraints={name: limits for part in tables for name in part.features},
        storage_reservation=FixedPercentageStorageReservation(_RESERVED),
        stats=NoopEmbeddingStats(),
    )
    plan = planner.collective_plan(towers, sharders, dist.group.WORLD)
    for module in plan.plan.values():
        for table in module.values():
            # The planner knows the dense kernel for data parallelism only; it runs here as well.
            table.compute_kernel = "dense"
    with _quiet():
        divided: nn.Module = DistributedModelParallel(
            towers,
            device=peers.device,
            plan=plan,
            sharders=sharders,
            data_parallel_wrapper=DefaultDataParallelWrapper(static_graph=False),
        )
    return divided


class _Gathered(torch.autograd.Function):
    """The rows of all processes, of which each has the gradient of its own.

    Every process computes one and the same loss from all rows, so that no gradient needs to be
    sent. It is multiplied by W, because TorchRec and DistributedDataParallel average over W.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor, total: int, peers: Peers) -> Tensor:
        import torch.distributed as dist

        ctx.share, ctx.size = share_of(total, peers.rank, peers.size), peers.size
        counts = [share_of(total, rank, peers.size) for rank in range(peers.size)]
        lengths = [one.stop - one.start for one in counts]
        padded = own.new_zeros(max(lengths), *own.shape[1:])
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(parts, padded)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0][ctx.share] * ctx.size, None, None


def gathered(own: Tensor, total: int, peers: Peers) -> Tensor:
    """Return the ``total`` rows of all processes; each has computed its share of them."""
    rows: Tensor = _Gathered.apply(own, total, peers)  # type: ignore[no-untyped-call]
    return rows


def part_of(one: L, peers: Peers) -> L:
    """The share of these bags or sequences that a process has, on its device."""
    lengths = one.lengths
    share = share_of(len(lengths), peers.rank, peers.size)
    first = int(lengths[: share.start].sum())
    values = slice(first, first + int(lengths[share].sum()))
    parts = {
        name: getattr(one, name)[share if name == "lengths" else values].to(peers.device)
        for name in one._fields
    }
    return one._replace(**parts)

"""Ids to embeddings: vocabularies, bags of rows, and the TorchRec tables that hold them.

Beside ``distributed`` this is the one module that knows TorchRec; it imports it when tables are
built.

Bags are pooled with weights, sequences keep one row per value. Both come in float32, which trains,
and quantised, which serves: in one piece, or cut over the devices of one process as a plan says,
with the same bits.

Shapes: B bags or sequences, n values of all of them together, D embedding dimension, W bytes of a
quantised row.
"""

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from silvershard.model.bags import Bags, Sequences, check_lookup
from silvershard.model.placement import (
    TIERS,
    Kind,
    Precision,
    Proposal,
    Sharding,
    TableOptions,
    TablePlan,
    TableTopology,
    Tier,
    check_cuda,
    plan_of,
)
from silvershard.model.quantized_rows import QuantizedModule, sizes_of
from silvershard.model.record_pool import RecordPool

_SHARDINGS: Mapping[Sharding, str] = {cut: f"{cut}_wise" for cut in get_args(Sharding)}
_KERNELS: Mapping[Tier, str] = {
    "hbm": "quant",
    "host": "quant_uvm",
    "host_cached": "quant_uvm_caching",
}


class PooledTables(nn.Module):
    """One embedding table per feature and the weighted sums of its rows, by TorchRec.

    A bag is summed in the order of its values, whatever other bags there are.
    """

    def __init__(self, rows: Mapping[str, int], dim: int) -> None:
        super().__init__()
        with _quiet():
            from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, PoolingType
        self.features = tuple(rows)
        self.tables: nn.Module = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(
                    name=name,
                    num_embeddings=num_rows,
                    embedding_dim=dim,
                    feature_names=[name],
                    pooling=PoolingType.SUM,
                )
                for name, num_rows in rows.items()
            ],
            is_weighted=True,
        )

    def weight(self, feature: str) -> nn.Parameter:
        """The table of a feature, ``(rows, D)`` float32."""
        return self.get_parameter(f"tables.embedding_bags.{feature}.weight")

    def forward(self, bags: Mapping[str, Bags]) -> dict[str, Tensor]:
        """Return the weighted sum of each bag, ``(B, D)`` float32 per feature.

        Args:
            bags: B bags for each of the features; B may be 0.
        """
        if not bags[self.features[0]].lengths.shape[0]:
            return {name: self.weight(name)[:0] for name in self.features}
        pooled = _by_key(self.tables(_batch(bags, self.features)))
        return {name: pooled[name] for name in self.features}


class SequenceTables(nn.Module):
    """One embedding table per feature and the row of each value, by TorchRec."""

    def __init__(self, rows: Mapping[str, int], dim: int) -> None:
        super().__init__()
        with _quiet():
            from torchrec import EmbeddingCollection, EmbeddingConfig
        self.features = tuple(rows)
        self.dim = dim
        self._rows = dict(rows)
        self.tables: nn.Module = EmbeddingCollection(
            tables=[
                EmbeddingConfig(
                    name=name, num_embeddings=num_rows, embedding_dim=dim, feature_names=[name]
                )
                for name, num_rows in rows.items()
            ]
        )

    def weight(self, feature: str) -> nn.Parameter:
        """The table of a feature, ``(rows, D)`` float32."""
        return self.get_parameter(f"tables.embeddings.{feature}.weight")

    def forward(self, sequences: Mapping[str, Sequences]) -> dict[str, Tensor]:
        """Return the embedding of each value in order, ``(n, D)`` float32 per feature.

        Args:
            sequences: B sequences for each of the features; B may be 0.

        Raises:
            FieldError: if the features are others, or a row is not in its table.
        """
        if not check_lookup(sequences, self._rows):
            return {name: self.weight(name)[:0] for name in self.features}
        found = self.tables(_batch(sequences, self.features))
        return {name: found[name].values() for name in self.features}


def _batch(given: Mapping[str, Bags | Sequences], features: Sequence[str]) -> Any:
    """Return these features as TorchRec takes them."""
    from torchrec import KeyedJaggedTensor

    chosen = [given[name] for name in features]
    weights = [one.weights for one in chosen if isinstance(one, Bags)]
    return KeyedJaggedTensor(
        keys=list(features),
        values=torch.cat([one.rows for one in chosen]),
        weights=torch.cat(weights) if weights else None,
        lengths=torch.cat([one.lengths for one in chosen]),
    )


def _by_key(found: Any) -> dict[str, Tensor]:
    """Return the columns of each key; their order is TorchRec's business."""
    parts = found.values().split(found.length_per_key(), 1)
    return dict(zip(found.keys(), parts, strict=True))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Import TorchRec without the warnings about modules that it and fbgemm name themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def _collection(
    kind: Kind, rows: Mapping[str, int], dim: int, precision: Precision, device: str = "cpu"
) -> Any:
    """Return TorchRec's quantised collection of these tables."""
    with _quiet():
        from torchrec import EmbeddingBagConfig, EmbeddingConfig, PoolingType
        from torchrec.modules.embedding_configs import DataType
        from torchrec.quant.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
    data_type = DataType.INT8 if precision == "int8" else DataType.INT4
    given = {
        "device": torch.device(device),
        "register_tbes": True,
        "quant_state_dict_split_scale_bias": True,
        "row_alignment": 1,
    }
    sizes = [
        {
            "name": name,
            "num_embeddings": num_rows,
            "embedding_dim": dim,
            "feature_names": [name],
            "data_type": data_type,
        }
        for name, num_rows in rows.items()
    ]
    if kind == "sequence":
        return EmbeddingCollection([EmbeddingConfig(**size) for size in sizes], **given)
    bags = [EmbeddingBagConfig(**size, pooling=PoolingType.SUM) for size in sizes]
    return EmbeddingBagCollection(bags, is_weighted=True, **given)


class QuantizedTables(QuantizedModule):
    """``PooledTables`` in int8 or int4: the same bags, outputs that differ by rounding.

    Every row has a scale and a bias of its own. A bag is summed in the order of its values,
    whatever other bags there are.

    Args:
        rows: rows of the table of each feature.
        dim: D, a multiple of 4 for int8 and of 8 for int4.
        precision: of the codes.

    Raises:
        FieldError: if the sizes do not fit; it names the table or the argument.
    """

    kind = "pooled"
    _folder = "embedding_bags"

    def __init__(self, rows: Mapping[str, int], dim: int, precision: Precision) -> None:
        super().__init__(rows, dim, precision)
        self._gathered: tuple[str, ...] = ()
        self._pool: list[RecordPool] = []
        self._build()

    def _build(self) -> None:
        self._hold(_collection(self.kind, self._rows, self.dim, self.precision), self.features)

    @classmethod
    def from_float(cls, tables: PooledTables, precision: Precision) -> "QuantizedTables":
        """Return these tables quantised.

        Raises:
            FieldError: naming the table that has a value which is NaN or beyond the range of
                float16, or ``dim`` where it does not fit the precision.
        """
        weights = {name: tables.weight(name) for name in tables.features}
        quantized = QuantizedTables(*sizes_of(weights), precision)
        quantized.quantize(weights)
        return quantized

    def forward(self, bags: Mapping[str, Bags]) -> dict[str, Tensor]:
        """Return the weighted sum of each bag, ``(B, D)`` float32 per feature.

        Args:
            bags: B bags for each of the features; B may be 0.

        Raises:
            FieldError: if the features are others, or a row is not in its table.
        """
        if not check_lookup(bags, self._rows):
            return {name: torch.zeros(0, self.dim) for name in self.features}
        pooled = self._pooled_rows(bags) if self._gathered else {}
        for lookup, features in self._lookups:
            pooled |= _by_key(lookup(_batch(bags, features)))
        return {name: pooled[name] for name in self.features}

    def _pooled_rows(self, bags: Mapping[str, Bags]) -> dict[str, Tensor]:
        """Bring the records of a batch together in the order of the bags, then pool them."""
        chosen = {name: bags[name] for name in self._gathered}
        (pool,) = self._pool
        return pool(
            chosen, {name: self._stored[name].take(one.rows) for name, one in chosen.items()}
        )


class ShardedTables(QuantizedTables):
    """``QuantizedTables`` cut over the devices of one process; the same bits for every plan.

    TorchRec looks up what is cut by table and by column. What is cut by row lies in TorchRec's
    shards too, but is not pooled by them: they add sums of parts, which differ in the last bits.
    Its records are brought together and pooled as those of one table. The state is that of
    ``QuantizedTables`` of the same sizes.

    One thread looks up at a time. On CUDA the records that are brought together are pooled on the
    host; plans for CUDA are tested, but these lookups have only run on CPU devices.

    Raises:
        TablePlanError: if the plan is one of sequences.
    """

    def __init__(self, plan: TablePlan) -> None:
        self.plan = plan_of(self.kind, plan)
        super().__init__(plan.rows, plan.dim, plan.precision)

    def _build(self) -> None:
        placed = {table.name: table for table in self.plan.tables}
        self._gathered = tuple(name for name in placed if placed[name].sharding == "row")
        fused = tuple(name for name in placed if placed[name].sharding != "row")
        if fused:
            self._hold(_sharded_collection(self.plan, fused), fused)
        if self._gathered:
            self._hold(_sharded_collection(self.plan, self._gathered), ())
            self._pool = [RecordPool(len(self._gathered), self.dim, self.precision)]


class QuantizedSequences(QuantizedModule):
    """``SequenceTables`` in int8 or int4; sizes and errors are those of ``QuantizedTables``."""

    kind = "sequence"
    _folder = "embeddings"

    def __init__(self, rows: Mapping[str, int], dim: int, precision: Precision) -> None:
        super().__init__(rows, dim, precision)
        self._build()

    def _build(self) -> None:
        self._hold(_collection(self.kind, self._rows, self.dim, self.precision), self.features)

    @classmethod
    def from_float(cls, tables: SequenceTables, precision: Precision) -> "QuantizedSequences":
        """Return these tables quantised.

        Raises:
            FieldError: as ``QuantizedTables.from_float``.
        """
        weights = {name: tables.weight(name) for name in tables.features}
        quantized = QuantizedSequences(*sizes_of(weights), precision)
        quantized.quantize(weights)
        return quantized

    def forward(self, sequences: Mapping[str, Sequences]) -> dict[str, Tensor]:
        """Return the embedding of each value in order, ``(n, D)`` float32 per feature.

        Args:
            sequences: B sequences for each of the features; B may be 0.

        Raises:
            FieldError: if the features are others, or a row is not in its table.
        """
        if not check_lookup(sequences, self._rows):
            return {name: torch.zeros(0, self.dim) for name in self.features}
        ((lookup, features),) = self._lookups
        found = lookup(_batch(sequences, features))
        return {name: found[name].values() for name in self.features}


class ShardedSequences(QuantizedSequences):
    """``QuantizedSequences`` cut by table or by row over the devices of one process.

    The bits are those of one piece for every plan, and so is the state. TorchRec has no
    column-wise lookup of sequences on CPU, so no plan has one.

    Raises:
        TablePlanError: if the plan is one of pooled tables.
    """

    def __init__(self, plan: TablePlan) -> None:
        self.plan = plan_of(self.kind, plan)
        super().__init__(plan.rows, plan.dim, plan.precision)

    def _build(self) -> None:
        self._hold(_sharded_collection(self.plan, self.features), self.features)


def _sharded_collection(plan: TablePlan, names: Sequence[str]) -> Any:
    """Return TorchRec's sharded collection of these tables, its memory not filled."""
    device = plan.topology.device
    if device == "cuda":
        check_cuda(plan.topology.num_devices)
    with _quiet():
        from torchrec.distributed.global_settings import set_propogate_device
        from torchrec.distributed.types import (
            EnumerableShardingSpec,
            ParameterSharding,
            ShardingEnv,
            ShardMetadata,
        )
    # Without it TorchRec takes every device for a GPU.
    set_propogate_device(True)
    chosen = {table.name: table for table in plan.tables if table.name in names}
    parameters = {}
    for name, table in chosen.items():
        shards = [
            ShardMetadata(
                shard_offsets=[shard.first_row, shard.first_column],
                shard_sizes=[shard.num_rows, shard.num_columns],
                placement=f"rank:{shard.device}/{device}"
                + (f":{shard.device}" if device == "cuda" else ""),
            )
            for shard in table.shards
        ]
        parameters[name] = ParameterSharding(
            sharding_type=_SHARDINGS[table.sharding],
            compute_kernel=_kernel(table.tier, device),
            ranks=[shard.device for shard in table.shards],
            sharding_spec=EnumerableShardingSpec(shards),
        )
    sizes = {name: table.num_rows for name, table in chosen.items()}
    whole = _collection(plan.kind, sizes, plan.dim, plan.precision, "meta")
    # For quantised tables TorchRec drops a ratio per table; FBGEMM has one cache per device anyway.
    ratio = plan.cache_ratio_of(names)
    settings = {} if ratio is None else {"cache_load_factor": ratio}
    return _sharder(plan.kind, settings).shard(
        whole,
        parameters,
        ShardingEnv.from_local(plan.topology.num_devices, 0),
        torch.device(device),
    )


def propose_placement(
    kind: Kind,
    rows: Mapping[str, int],
    dim: int,
    precision: Precision,
    topology: TableTopology,
    allowed: Mapping[str, TableOptions],
    batch_size: int,
) -> dict[str, Proposal] | None:
    """Return where TorchRec's planner puts each table, None if it finds no place for them.

    Args:
        kind: pooled bags, or sequences.
        rows: rows of the table of each feature.
        dim: D.
        precision: of the codes.
        topology: the devices and their budgets, in bytes of records.
        allowed: what the planner may choose from, for every table.
        batch_size: B of a lookup, for its cost model and buffers.
    """
    with _quiet():
        from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
        from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
        from torchrec.distributed.planner.shard_estimators import (
            EmbeddingPerfEstimator,
            EmbeddingStorageEstimator,
        )
        from torchrec.distributed.planner.stats import NoopEmbeddingStats
        from torchrec.distributed.planner.storage_reservations import (
            FixedPercentageStorageReservation,
        )
        from torchrec.distributed.planner.types import (
            KernelConfig,
            PlannerError,
            TopologyFactory,
            TrainerConfig,
        )
        from torchrec.distributed.types import CacheParams
    devices = TopologyFactory.create_topology(
        TrainerConfig(
            world_size=topology.num_devices,
            local_world_size=topology.num_devices,
            hbm_cap_bytes=topology.hbm_bytes,
            ddr_cap_bytes=topology.host_bytes_per_device,
        ),
        kernel_config=KernelConfig(compute_device=topology.device),
    )
    constraints = {
        name: ParameterConstraints(
            sharding_types=[_SHARDINGS[sharding] for sharding in option.shardings],
            compute_kernels=[_kernel(tier, topology.device) for tier in option.tiers],
            min_partition=option.columns,
            pooling_factors=[option.values_per_bag],
            is_weighted=kind == "pooled",
            cache_params=CacheParams(load_factor=option.cache_ratio),
        )
        for name, option in allowed.items()
    }
    settings = {"topology": devices, "batch_size": batch_size, "constraints": constraints}
    costs = EmbeddingPerfEstimator(devices, constraints, is_inference=True)
    sizes = EmbeddingStorageEstimator(devices, constraints)
    planner = EmbeddingShardingPlanner(
        **settings,
        enumerator=EmbeddingEnumerator(**settings, estimator=[costs, sizes]),
        storage_reservation=FixedPercentageStorageReservation(0.0),
        stats=NoopEmbeddingStats(),
        debug=False,
    )
    model = nn.ModuleDict({"tables": _collection(kind, rows, dim, precision, "meta")})
    try:
        plan = planner.plan(model, [_sharder(kind, {})]).plan["tables"]
    except PlannerError:
        return None
    shardings = {name: sharding for sharding, name in _SHARDINGS.items()}
    tiers = {_kernel(tier, topology.device): tier for tier in TIERS[topology.device]}
    return {
        name: Proposal(
            shardings[placed.sharding_type],
            tiers[placed.compute_kernel],
            [
                (shard.placement.rank(), *shard.shard_offsets, *shard.shard_sizes)
                for shard in placed.sharding_spec.shards
            ],
        )
        for name, placed in plan.items()
    }


def _kernel(tier: Tier, device: str) -> str:
    """Return TorchRec's name of a tier; all memory of a CPU has the one that means HBM on a GPU."""
    return _KERNELS["hbm" if device == "cpu" else tier]


def _sharder(kind: Kind, settings: dict[str, Any]) -> Any:
    """Return TorchRec's sharder of pooled tables or of sequences."""
    with _quiet():
        from torchrec.distributed.quant_embedding import QuantEmbeddingCollectionSharder
        from torchrec.distributed.quant_embeddingbag import QuantEmbeddingBagCollectionSharder

    class BagSharder(QuantEmbeddingBagCollectionSharder):  # type: ignore[misc]
        def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
            kernels: list[str] = super().compute_kernels(sharding_type, compute_device_type)
            passed = sharding_type == _SHARDINGS["row"]
            # What is cut by row is read past a cache.
            return [one for one in kernels if not (passed and one == _KERNELS["host_cached"])]

    return (BagSharder if kind == "pooled" else QuantEmbeddingCollectionSharder)(settings)

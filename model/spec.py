"""What compiling, planning and checking requests needs of a generation, without its tensors."""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from silvershard.model.limits import MAX_ANN_K
from silvershard.model.planes import PlaneDictionary
from silvershard.model.schema import Schema
from silvershard.model.semantic_config import MAX_SEMANTIC_K, SemanticSpec


class SearchDefaults(BaseModel):
    """Search settings of a generation, chosen when it is published."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    probes: int = Field(ge=1, description="clusters probed per query embedding")
    ann_k: int = Field(ge=1, le=MAX_ANN_K, description="candidates per head that pass the scan cut")
    semantic_k: int = Field(
        default=0,
        ge=0,
        le=MAX_SEMANTIC_K,
        description="candidates of the decoder of semantic ids, beside those of the heads",
    )
    k_max: int = Field(default=100_000, ge=1, le=100_000, description="largest k of a request")
    max_exclusions: int = Field(
        default=100_000, ge=0, description="largest number of excluded ids of a request"
    )


class ServingSpec(BaseModel):
    """One generation as its clients and routers see it; part of the snapshot's manifest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(min_length=1, description="logical model name")
    generation: int = Field(ge=1, description="number of this published version of the whole model")
    documents: int = Field(ge=0, description="items in this generation at its cut")
    dim: int = Field(ge=1, le=1024, description="embedding dimension D")
    num_clusters: int = Field(ge=1, description="clusters C of the global centroids")
    num_partitions: int = Field(ge=1, description="hash partitions P of the catalogue")
    partition_documents: tuple[int, ...] = Field(description="items in each partition")
    page_slots: int = Field(description="slots G of a page: 64 or 128")
    # Named `item_schema` because pydantic reserves `schema`.
    item_schema: Schema = Field(description="features, attributes, signals, fields, heads, tasks")
    planes: PlaneDictionary = Field(description="filter planes, columns and Bloom settings")
    defaults: SearchDefaults = Field(description="search settings used when a request has none")
    semantic: SemanticSpec | None = Field(
        default=None, description="semantic ids and their decoder; none without"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.page_slots not in (64, 128):
            raise ValueError(f"page_slots must be 64 or 128, got {self.page_slots}")
        if self.num_partitions & (self.num_partitions - 1):
            raise ValueError(f"num_partitions must be a power of two, got {self.num_partitions}")
        if len(self.partition_documents) != self.num_partitions:
            raise ValueError(
                f"partition_documents must have {self.num_partitions} entries, "
                f"got {len(self.partition_documents)}"
            )
        if sum(self.partition_documents) != self.documents:
            raise ValueError(
                f"partition_documents must sum to documents={self.documents}, "
                f"got {sum(self.partition_documents)}"
            )
        if self.defaults.probes > self.num_clusters:
            raise ValueError(
                f"defaults.probes must be at most num_clusters={self.num_clusters}, "
                f"got {self.defaults.probes}"
            )
        if self.defaults.semantic_k and self.semantic is None:
            raise ValueError(
                "defaults.semantic_k must be 0 without semantic ids, "
                f"got {self.defaults.semantic_k}"
            )
        return self

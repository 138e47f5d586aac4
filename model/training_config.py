"""What a person decides about training; free of torch, so that the command line starts at once."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from silvershard.model.encoder_config import SequenceEncoderConfig, check_encoder
from silvershard.model.ranker_config import MLPConfig, RankerConfig


class TrainingConfig(BaseModel):
    """What a person decides about training."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    history: str = Field(default="history", description="user feature that lists item ids")
    item: str = Field(default="movie_id", description="item feature whose ids the history names")
    pooled: tuple[str, ...] = Field(
        default=("genres",), description="item features pooled over the history"
    )
    min_rating: dict[str, float] = Field(
        default={"liked": 4.0},
        description="least rating of a positive, by head or task; every interaction where none",
    )
    threads: int = Field(
        default=1,
        ge=1,
        le=1024,
        description="threads of torch; on busy cores one is several times faster than two, which "
        "wait for each other",
    )
    dim: int = Field(default=64, ge=1, le=1024, description="embedding dimension")
    recent: int = Field(default=3, ge=1, description="last ids that are also pooled by themselves")
    half_life: float = Field(default=10.0, gt=0, description="ids after which a weight has halved")
    steps: int = Field(default=450, ge=1, description="batches that train the towers")
    batch: int = Field(default=512, ge=1, description="positions of a batch")
    negatives: int = Field(default=2048, ge=1, description="sampled items that a batch shares")
    negative_power: float = Field(
        default=0.5, ge=0, le=1, description="negatives are drawn by popularity to this power"
    )
    user_power: float = Field(
        default=0.5, ge=0, le=1, description="users are drawn by their positions to this power"
    )
    schedule: Literal["linear", "cosine", "constant"] = Field(
        default="linear", description="how learning rates fall after the warm-up, to 0 but constant"
    )
    warm_up: int = Field(
        default=50, ge=0, description="steps in which learning rates rise, at most a tenth of all"
    )
    evaluate_every: int = Field(
        default=0,
        ge=0,
        description="tower steps between evaluations, of which the best counts; 0: none, the last "
        "step counts; the reranker is always evaluated five times",
    )
    patience: int = Field(
        default=0,
        ge=0,
        description="evaluations without a new best after which towers (with evaluate_every) or "
        "reranker stop; 0: never",
    )
    learning_rate: float = Field(default=3e-3, gt=0, description="of Adam, at its highest")
    temperature: float = Field(default=0.12, gt=0, description="of the softmax over cosines")
    dropout: float = Field(default=0.2, ge=0, lt=1, description="of the pooled user features")
    history_dropout: float = Field(default=0.2, ge=0, lt=1, description="of ids of a history")
    empty_history: float = Field(
        default=0.03, ge=0, lt=1, description="positions that are trained without their history"
    )
    item_dropout: float = Field(
        default=0.1, ge=0, lt=1, description="items that are trained without their id"
    )
    clusters: int = Field(
        default=0,
        ge=0,
        description="clusters that items are pulled together in; 0: as many as the index will have",
    )
    cluster_pull: float = Field(default=16.0, ge=0, description="weight of the pull")
    cluster_start: float = Field(
        default=0.0, ge=0, le=1, description="share of the steps after which the pull begins"
    )
    encoder: SequenceEncoderConfig | None = Field(
        default=None,
        description="sequence encoder of the history, beside its pooled features; none without",
    )
    ranker: RankerConfig = Field(default_factory=MLPConfig, description="the reranker")
    ranker_share: float = Field(
        default=0.05,
        ge=0,
        lt=1,
        description="share of each user's interactions, the latest, that only the reranker learns",
    )
    ranker_steps: int = Field(default=150, ge=0, description="batches that train the reranker")
    ranker_batch: int = Field(default=128, ge=1, description="positions of a batch")
    ranker_hard: int = Field(default=32, ge=0, description="candidates that the towers rank high")
    ranker_random: int = Field(default=4, ge=1, description="candidates drawn by popularity")
    ranker_depth: int = Field(default=200, ge=1, description="ranks that hard candidates come from")
    ranker_learning_rate: float = Field(default=2e-3, gt=0, description="of Adam, at its highest")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.encoder is not None:
            check_encoder(self.encoder, dim=self.dim)
        if len(set(self.pooled)) != len(self.pooled):
            raise ValueError(f"pooled must name each feature once, got {list(self.pooled)}")
        return self

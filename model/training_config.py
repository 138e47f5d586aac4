"""What a person decides about training; free of torch, so that the command line starts at once."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from silvershard.model.encoder_config import SequenceEncoderConfig, check_encoder
from silvershard.model.joint_config import JointConfig
from silvershard.model.ranker_config import MLPConfig, RankerConfig, check_ranker, session_rows
from silvershard.model.semantic_config import SemanticTrainingConfig
from silvershard.model.text_config import TextTrainingConfig


class TrainingConfig(BaseModel):
    """What a person decides about training."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    history: str = Field(default="history", description="user feature that lists item ids")
    item: str = Field(default="movie_id", description="item feature whose ids the history names")
    pooled: tuple[str, ...] = Field(
        default=("genres",), description="item features pooled over the history"
    )
    user_features: tuple[str, ...] = Field(
        default=(),
        description="user features that the user tower reads beside the history; the MovieLens "
        "recipe has tags (the user's own, by how often) and activity (mean rating and number)",
    )
    user_feature_dropout: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="positions that are trained without a user feature, for each of them",
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
    processes: int = Field(
        default=1,
        ge=1,
        le=64,
        description="processes of this machine that train the towers together; the same model up "
        "to rounding and the dropout within an encoder",
    )
    device: Literal["cpu", "cuda"] = Field(
        default="cpu",
        description="where the towers are trained; cuda needs as many GPUs as there are processes",
    )
    process_timeout_s: float = Field(
        default=600.0,
        gt=0,
        description="seconds that one process waits for another before training fails",
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
    joint: JointConfig | None = Field(
        default=None,
        description="training through the index: its centroids learn with the towers, pull the "
        "items and are published; none: the items are clustered when they are published",
    )
    encoder: SequenceEncoderConfig | None = Field(
        default=None,
        description="sequence encoder of the history, beside its pooled features; none without",
    )
    text: TextTrainingConfig | None = Field(
        default=None,
        description="texts of items and requests, so that a sentence finds items too; none without",
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
    semantic: SemanticTrainingConfig | None = Field(
        default=None,
        description="semantic ids and their decoder, a further source of candidates; none without",
    )

    split: Literal["leave_last_out", "temporal"] = Field(
        default="leave_last_out",
        description="what is held out: the last interaction of each user and the one before it, or "
        "everything after one time",
    )
    test_share: float = Field(
        default=0.1,
        gt=0,
        lt=1,
        description="share of the interactions, the latest, that a temporal split tests with",
    )
    validation_share: float = Field(
        default=0.05,
        ge=0,
        lt=1,
        description="share of the interactions, the latest before those, that it validates with",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        held_out = self.test_share + self.validation_share
        if held_out >= 1:
            raise ValueError(
                f"test_share and validation_share must be less than 1 together, got {held_out:g}"
            )
        if self.joint is not None and self.cluster_start:
            raise ValueError(
                f"cluster_start must be 0 with joint, got {self.cluster_start:g}: "
                "centroids learn from the first step"
            )
        if self.processes > self.batch:
            raise ValueError(
                f"processes must be at most batch, {self.batch}, got {self.processes}: "
                "each of them has a share of it"
            )
        if self.encoder is not None:
            check_encoder(self.encoder, dim=self.dim)
        # Only the schema knows how many ids of a history are kept.
        check_ranker(self.ranker, dim=self.dim, session_length=session_rows(self.ranker))
        if len(set(self.pooled)) != len(self.pooled):
            raise ValueError(f"pooled must name each feature once, got {list(self.pooled)}")
        if len(set(self.user_features)) != len(self.user_features):
            raise ValueError(
                f"user_features must name each feature once, got {list(self.user_features)}"
            )
        return self

"""What a person decides about training through the index; free of torch."""

from pydantic import BaseModel, ConfigDict, Field


class JointConfig(BaseModel):
    """How the centroids of the index are trained with the towers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    assignment_temperature: float = Field(
        default=0.02, gt=0, description="of the softmax that assigns an item to clusters"
    )
    routing: float = Field(
        default=2.0,
        ge=0,
        description="weight of the loss that sends a query to the clusters of its best items",
    )
    routing_temperature: float = Field(
        default=0.05, gt=0, description="of the softmax that sends a query to clusters"
    )
    sharpness: float = Field(
        default=2.0,
        gt=0,
        description="how much steeper than in training the scores say which items are a query's "
        "best",
    )
    reading: float = Field(
        default=1.0, ge=0, description="weight of the items that a probe reads, in mean lists"
    )
    balance: float = Field(
        default=4.0, ge=0, description="weight of the divergence of cluster sizes from equal ones"
    )

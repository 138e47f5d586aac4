"""How many items each stage of a query handled."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Counts:
    """How many items each stage handled."""

    addressed: int
    """Documents of the generation."""
    probed: int
    """Live slots on the probed pages, summed over the heads."""
    eligible: int | None
    """Documents that the filter lets through over the whole catalogue; None when not counted."""
    ann_kept: int
    """Candidates that passed the global scan cut, summed over the heads."""
    reranked: int
    """Distinct items that were reranked."""
    semantic_kept: int = 0
    """Candidates of the decoder of semantic ids that passed their global cut."""

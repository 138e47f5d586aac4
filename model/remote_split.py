"""Taking tables out of a trained tower, to be served from elsewhere.

Shapes: D embedding dimension, W = D + 4 bytes of a record.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import pydantic
from torch import Tensor

from silvershard.model.quantized_rows import QuantizedModule, quantize_rows
from silvershard.model.remote_tables import PRECISION
from silvershard.model.two_tower import TwoTower
from silvershard.model.two_tower_config import SESSION, TwoTowerConfig


class Split(NamedTuple):
    """A tower without some of its tables, and these."""

    model: TwoTower
    """Asks its source for the rows of the tables; none is connected."""
    records: Mapping[str, Tensor]
    """``(rows, W)`` uint8 of each table that was taken out."""


def split_remote(tower: TwoTower, tables: Sequence[str]) -> Split:
    """Return a tower whose named user tables are remote, for serving, and their rows.

    The other tables keep their precision.

    Args:
        tower: with local tables only.
        tables: of the user tower, each once.

    Raises:
        ValueError: if a table is unknown, int4 or remote already, ``dim`` does not fit, or a table
            has a value that float16 cannot hold.
    """
    config = tower.config.model_dump() | {"remote": tuple(tables)}
    if tower.config.remote:
        raise ValueError(f"tables {list(tower.config.remote)} are remote already")
    try:
        made = TwoTower(TwoTowerConfig.model_validate(config))
    except pydantic.ValidationError as error:
        problem: str = error.errors()[0]["msg"]
        raise ValueError(problem.removeprefix("Value error, ")) from None
    records = {name: _records(tower, name) for name in tables}
    own = made.state_dict()
    made.load_state_dict({key: one for key, one in tower.state_dict().items() if key in own})
    return Split(made.requires_grad_(requires_grad=False).eval(), records)


def _records(tower: TwoTower, name: str) -> Tensor:
    tables = tower.session_table if name == SESSION else tower.user_tables
    assert tables is not None
    if not isinstance(tables, QuantizedModule):
        return quantize_rows(tables.weight(name), PRECISION, field=name)
    if tables.precision != PRECISION:
        raise ValueError(f"table {name} must be float32 or {PRECISION}, got {tables.precision}")
    return tables.records(name).clone()

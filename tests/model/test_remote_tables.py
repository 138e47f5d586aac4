from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from silvershard.model.bags import Bags, Sequences
from silvershard.model.embeddings import QuantizedSequences, QuantizedTables
from silvershard.model.errors import FieldError
from silvershard.model.quantized_rows import quantize_rows
from silvershard.model.remote_tables import FetchedRows, NoTables, RemoteTables, StoredRows

ROWS = {"films": 300, "genres": 20}
DIM = 16


class Lossy:
    """A source that lacks some rows of a table and gives its row 0 for them."""

    def __init__(self, records: Mapping[str, Tensor], table: str, lacks: Tensor) -> None:
        self.stored, self.table, self.lacks = StoredRows(records), table, lacks
        self.records = records
        self.asked: list[set[str]] = []

    def fetch(self, rows: Mapping[str, Tensor]) -> dict[str, FetchedRows]:
        self.asked.append(set(rows))
        found = self.stored.fetch(rows)
        if self.table in rows:
            lost = torch.isin(rows[self.table], self.lacks)
            records = found[self.table].records
            records[lost] = self.records[self.table][0]
            found[self.table] = FetchedRows(records, lost)
        return found


@pytest.fixture(scope="module")
def records() -> dict[str, Tensor]:
    torch.manual_seed(3)
    tables = {**ROWS, "session": 300}
    return {name: quantize_rows(torch.randn(size, DIM), "int8") for name, size in tables.items()}


def make_batch(lengths: list[int], seed: int = 0) -> tuple[dict[str, Bags], dict[str, Sequences]]:
    generator = torch.Generator().manual_seed(seed)
    count, per_bag = sum(lengths), torch.tensor(lengths, dtype=torch.int64)
    bags = {
        name: Bags(
            torch.randint(0, size, (count,), generator=generator),
            torch.randn(count, generator=generator),
            per_bag,
        )
        for name, size in ROWS.items()
    }
    rows = torch.randint(0, 300, (count,), generator=generator)
    return bags, {"session": Sequences(rows, per_bag)}


@pytest.fixture
def remote(records: dict[str, Tensor]) -> RemoteTables:
    made = RemoteTables(ROWS, {"session": 300}, DIM)
    made.connect(StoredRows(records))
    return made


def local_tables(records: dict[str, Tensor]) -> tuple[QuantizedTables, QuantizedSequences]:
    pooled, sequences = (
        QuantizedTables(ROWS, DIM, "int8"),
        QuantizedSequences({"session": 300}, DIM, "int8"),
    )
    for module in (pooled, sequences):
        module.load_state_dict({key: records[key.split(".")[-2]] for key in module.state_dict()})
    return pooled, sequences


@pytest.mark.parametrize("lengths", [[3], [0], [], [5, 0, 40, 1], [2] * 33])
def test_remote_rows_give_the_bits_of_local_tables(
    remote: RemoteTables, records: dict[str, Tensor], lengths: list[int]
) -> None:
    pooled, sequences = local_tables(records)
    bags, session = make_batch(lengths)
    looked, wanted = remote(bags, session), pooled(bags)
    for name in ROWS:
        assert torch.equal(looked.pooled[name], wanted[name])
    assert torch.equal(looked.sequences["session"], sequences(session)["session"])
    assert looked.fallback == (False,) * len(lengths)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("batch", [2, 7, 33])
def test_a_user_gets_the_same_bits_alone_and_in_any_batch(
    remote: RemoteTables, batch: int, num_threads: int
) -> None:
    lengths = [(7 * at) % 11 for at in range(batch)]
    bags, session = make_batch(lengths, seed=batch)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        together = remote(bags, session)
        starts = torch.tensor(lengths).cumsum(0).tolist()
        for at in range(batch):
            one = {name: bag.take(torch.tensor([at])) for name, bag in bags.items()}
            part = slice(starts[at] - lengths[at], starts[at])
            rows = session["session"].rows[part]
            alone = remote(one, {"session": Sequences(rows, torch.tensor([lengths[at]]))})
            for name in ROWS:
                assert torch.equal(alone.pooled[name][0], together.pooled[name][at])
            assert torch.equal(alone.sequences["session"], together.sequences["session"][part])
    finally:
        torch.set_num_threads(before)


def test_only_users_of_lost_rows_fall_back(records: dict[str, Tensor]) -> None:
    remote = RemoteTables(ROWS, {"session": 300}, DIM)
    source = Lossy(records, "genres", torch.tensor([4, 5]))
    remote.connect(source)
    bags, session = make_batch([2, 1, 0, 2])
    bags["genres"] = bags["genres"]._replace(rows=torch.tensor([1, 2, 4, 5, 7]))
    looked = remote(bags, session)
    assert looked.fallback == (False, True, False, True)
    assert source.asked == [{"films", "genres", "session"}]
    bags["genres"] = bags["genres"]._replace(rows=torch.tensor([1, 2, 0, 0, 7]))
    assert torch.equal(remote(bags, session).pooled["genres"], looked.pooled["genres"])


def test_tables_may_be_pooled_only_or_sequences_only(records: dict[str, Tensor]) -> None:
    bags, session = make_batch([2, 3])
    pooled, sequences = RemoteTables(ROWS, {}, DIM), RemoteTables({}, {"session": 300}, DIM)
    for module in (pooled, sequences):
        module.connect(StoredRows(records))
    assert set(pooled(bags, {}).pooled) == set(ROWS)
    assert pooled(bags, {}).sequences == {}
    assert sequences({}, session).sequences["session"].shape == (5, DIM)
    assert sequences({}, session).pooled == {}


def test_a_lookup_without_a_source_is_refused() -> None:
    bags, session = make_batch([2])
    with pytest.raises(RuntimeError, match="no source is connected"):
        RemoteTables(ROWS, {"session": 300}, DIM)(bags, session)


def test_rows_beyond_a_table_are_refused_before_they_are_asked_for(
    remote: RemoteTables,
) -> None:
    bags, session = make_batch([1])
    bags["films"] = bags["films"]._replace(rows=torch.tensor([300]))
    with pytest.raises(FieldError, match="films: rows must be from 0 to 299, got 300"):
        remote(bags, session)


def test_records_of_another_number_or_width_are_refused(records: dict[str, Tensor]) -> None:
    bags, _ = make_batch([2])
    remote = RemoteTables(ROWS, {}, DIM)

    class Short(StoredRows):
        def fetch(self, rows: Mapping[str, Tensor]) -> dict[str, Any]:
            found = super().fetch(rows)
            return found | {"films": found["films"]._replace(records=found["films"].records[1:])}

    remote.connect(Short(records))
    with pytest.raises(FieldError, match=r"films: the source must give records \(2, 20\), got"):
        remote(bags, {})
    remote.connect(_Silent())
    with pytest.raises(FieldError, match=r"must give records \(2, 20\), got none"):
        remote(bags, {})


class _Silent:
    def fetch(self, rows: Mapping[str, Tensor]) -> dict[str, FetchedRows]:
        return {}


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(FieldError, match="dim: must be a multiple of 4 for int8, got 6"):
        RemoteTables({"films": 3}, {}, 6)
    with pytest.raises(FieldError, match="films: must have at least 1 row, got 0"):
        RemoteTables({"films": 0}, {}, 8)


def test_a_remote_table_has_no_parameters(remote: RemoteTables) -> None:
    assert dict(remote.state_dict()) == {}
    with pytest.raises(ValueError, match="table films is remote"):
        NoTables().weight("films")
    assert NoTables()({}) == {}


def test_written_rows_are_looked_up_from_then_on(records: dict[str, Tensor]) -> None:
    stored = {name: one.clone() for name, one in records.items()}
    made = RemoteTables(ROWS, {"session": 300}, DIM)
    values = torch.randn(3, DIM)
    rows = torch.tensor([7, 2, 5])
    name = next(iter(ROWS))
    with pytest.raises(RuntimeError, match=f"table {name} is remote and no source is connected"):
        made.write(name, 1, rows, values)
    made.connect(StoredRows(stored))
    assert made.write(name, 1, rows, values)
    assert not made.write("other", 1, rows, values)
    assert torch.equal(stored[name][rows], quantize_rows(values, "int8"))
    untouched = torch.tensor([row for row in range(ROWS[name]) if row not in (7, 2, 5)])
    assert torch.equal(stored[name][untouched], records[name][untouched])

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from silvershard.cluster.config import PingSection
from silvershard.cluster.table_client import RemoteTable
from silvershard.cluster.table_config import RemoteTableSection, ShardTables
from silvershard.cluster.table_map import TableEntry, TableShardMap, map_path
from silvershard.cluster.table_server import TableServer
from silvershard.cluster.table_source import RemoteRows, RemoteSources, settings_of
from silvershard.model.quantized_rows import quantize_rows
from silvershard.model.remote_split import split_remote
from silvershard.model.remote_tables import StoredRows
from silvershard.shard.errors import StateError
from silvershard.shard.load import load_executor
from silvershard.shard.table import TableShard
from silvershard.shard.table_files import RowFile

TABLES = ("history", "recent", "history_genres")
CLIENT = RemoteTableSection(
    deadline_ms=10_000,
    poll_ms=5,
    cache_mib=0,
    ping=PingSection(every_ms=20, suspect_after=50, eject_after=500),
)


GENERATION = 5


class Tier:
    """The servers of some tables on one event loop, and the maps of them in a folder."""

    def __init__(
        self, loop: Any, folder: Path, records: dict[str, torch.Tensor], num_shards: int
    ) -> None:
        self._loop = loop
        self.folder = folder
        self.num_shards = num_shards
        self.files = []
        for name, rows in records.items():
            path = folder / f"{name}.safetensors"
            save_file({"records": rows}, path)
            self.files.append(RowFile(name, path, len(rows), rows.shape[1] - 4, ()))
        self.servers: dict[tuple[str, int], TableServer] = {}
        self.version = 0
        self.changes: list[tuple[str, Any]] = []
        map_path(folder, GENERATION, "").parent.mkdir()
        for shard in range(num_shards):
            self.start(shard)
        self.write()

    @property
    def maps(self) -> dict[str, Path]:
        return {file.name: map_path(self.folder, GENERATION, file.name) for file in self.files}

    def start(self, shard: int) -> None:
        for file in self.files:
            table = TableShard.from_file(file.plan(self.num_shards), shard, file.path)
            for name, change in self.changes:
                if name == file.name:
                    table.apply(*change)
            server = self.servers[file.name, shard] = TableServer(table)
            self._loop.call(server.start())

    def change(self, table: str, *change: Any) -> None:
        """Change rows as a log does, in every process."""
        self.changes.append((table, change))
        for (name, _), server in self.servers.items():
            if name == table:
                server.table.apply(*change)
                server.advanced()

    def stop(self, shard: int) -> None:
        for file in self.files:
            self._loop.call(self.servers[file.name, shard].stop(0))

    def write(self, *leave_out: int) -> None:
        self.version += 1
        for file in self.files:
            entries = tuple(
                TableEntry(
                    shard=shard,
                    address=self.servers[file.name, shard].address,
                    epoch=self.servers[file.name, shard].epoch,
                    rows=len(file.plan(self.num_shards).span(shard)),
                    pid=1,
                )
                for shard in range(self.num_shards)
                if shard not in leave_out
            )
            TableShardMap(
                version=self.version, plan=file.plan(self.num_shards), entries=entries
            ).write_atomic(self.maps[file.name])

    def close(self) -> None:
        for shard in range(self.num_shards):
            self.stop(shard)


@pytest.fixture
def make_tier(loop_thread: Any, tmp_path: Path) -> Iterator[Callable[..., Tier]]:
    made: list[Tier] = []

    def make(records: dict[str, torch.Tensor], num_shards: int = 2) -> Tier:
        folder = tmp_path / f"tier-{len(made)}"
        folder.mkdir()
        made.append(Tier(loop_thread, folder, records, num_shards))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def follow() -> Iterator[Callable[..., RemoteRows]]:
    made: list[RemoteRows] = []

    def make(tier: Tier, timeout_s: float = 20.0, **changes: Any) -> RemoteRows:
        client = CLIENT.model_copy(update=changes)
        made.append(RemoteRows.follow(tier.maps, client, timeout_s=timeout_s))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture(scope="module")
def records() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        "films": quantize_rows(torch.randn(400, 16), "int8"),
        "genres": quantize_rows(torch.randn(9, 16), "int8"),
    }


def until(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "it never came true"
        time.sleep(0.005)


@pytest.mark.parametrize("num_shards", [1, 2, 3])
def test_remote_rows_are_those_of_this_process(
    make_tier: Any, follow: Any, records: dict[str, torch.Tensor], num_shards: int
) -> None:
    source, local = follow(make_tier(records, num_shards)), StoredRows(records)
    for count in (0, 1, 50, 1000):
        rows = {name: torch.randint(0, len(one), (count,)) for name, one in records.items()}
        found, wanted = source.fetch(rows), local.fetch(rows)
        for name in records:
            assert torch.equal(found[name].records, wanted[name].records)
            assert torch.equal(found[name].defaulted, wanted[name].defaulted)
    some = torch.arange(8)[::2]
    assert torch.equal(source.fetch({"genres": some})["genres"].records, records["genres"][:8:2])


def test_all_tables_are_asked_before_the_first_is_waited_for(
    make_tier: Any, follow: Any, records: dict[str, torch.Tensor]
) -> None:
    source = follow(make_tier(records))
    order: list[str] = []
    for name, table in source.tables.items():
        submit = table.submit

        def noted(ids: Any, name: str = name, submit: Any = submit) -> Any:
            order.append(f"ask {name}")
            pending = submit(ids)
            finish = pending.records
            pending.records = lambda: (order.append(f"wait {name}"), finish())[1]
            return pending

        table.submit = noted
    source.fetch({name: torch.arange(5) for name in records})
    assert order == ["ask films", "ask genres", "wait films", "wait genres"]


def test_written_rows_are_those_of_this_process_from_then_on(
    make_tier: Any, follow: Any, records: dict[str, torch.Tensor]
) -> None:
    tier = make_tier(records, 3)
    local = StoredRows({name: one.clone() for name, one in records.items()})
    sources = [follow(tier, cache_mib=1), follow(tier)]
    generator = np.random.default_rng(0)
    everything = {name: torch.arange(len(one)) for name, one in records.items()}
    for version in range(1, 8):
        for source in sources:
            source.fetch({"films": torch.from_numpy(generator.integers(0, 400, 60))})
        rows = generator.permutation(400)[:30]
        values = generator.standard_normal((30, 16)).astype(np.float32)
        tier.change("films", version, rows, values)
        for one in (*sources, local):
            one.write("films", version, torch.from_numpy(rows), torch.from_numpy(values))
        wanted = local.fetch(everything)
        for source in sources:
            found = source.fetch(everything)
            for name in records:
                assert torch.equal(found[name].records, wanted[name].records)
                assert not found[name].defaulted.any()
    assert sources[0].counts()["films"].lookups == 14


def test_a_table_of_another_name_is_refused(
    make_tier: Any, follow: Any, records: dict[str, torch.Tensor]
) -> None:
    source = follow(make_tier(records))
    with pytest.raises(StateError, match=r"table tags must be one of \['films', 'genres'\]"):
        source.fetch({"tags": torch.arange(2)})


def test_maps_may_come_later_than_who_follows_them(
    make_tier: Any, follow: Any, records: dict[str, torch.Tensor]
) -> None:
    tier = make_tier(records)
    tier.maps["genres"].unlink()
    found: list[RemoteRows] = []
    thread = threading.Thread(target=lambda: found.append(follow(tier)))
    thread.start()
    tier.write()
    thread.join(20)
    assert not found[0].fetch({"genres": torch.arange(9)})["genres"].defaulted.any()


def test_a_map_that_never_comes_is_an_error(
    make_tier: Any, follow: Any, records: dict[str, torch.Tensor]
) -> None:
    tier = make_tier(records)
    tier.maps["genres"].unlink()
    with pytest.raises(StateError, match=r"genres\.json"):
        follow(tier, timeout_s=0.0)


def test_a_process_that_is_lost_at_the_start_is_said_and_healed_later(
    make_tier: Any, follow: Any, records: dict[str, torch.Tensor], caplog: Any
) -> None:
    tier = make_tier(records)
    tier.write(1)
    with caplog.at_level(logging.WARNING):
        source = follow(tier, timeout_s=0.2)
    # On a busy machine the other one may not be connected either.
    assert re.search(r"shards \[(0, )?1\] of table films cannot be asked yet", caplog.text)
    rows = {"films": torch.arange(100)}
    assert source.fetch(rows)["films"].defaulted.any()
    tier.write()
    until(lambda: not source.fetch(rows)["films"].defaulted.any())


def test_a_shard_without_remote_tables_has_no_source() -> None:
    settings = settings_of(ShardTables(sharding={"history": "row"}, host_bytes=7))
    assert settings.sources is None
    assert (settings.sharding, settings.host_bytes) == ({"history": "row"}, 7)


@pytest.fixture
def split(generation: Any) -> Any:
    return split_remote(generation.model, TABLES)


def test_answers_say_that_default_rows_were_used_and_heal(
    make_tier: Any, make_cluster: Any, generation: Any, split: Any
) -> None:
    tier = make_tier(dict(split.records))
    sources = settings_of(ShardTables(maps=str(tier.folder), client=CLIENT)).sources
    assert isinstance(sources, RemoteSources)
    source = sources.open(GENERATION, TABLES)
    executors = [load_executor(generation.path, shard, 2) for shard in range(2)]
    split.model.remote.connect(source)
    for executor in executors:
        executor._retriever.model = split.model
    ids = generation.catalogue.item_ids
    try:
        client = make_cluster(2, executors=executors).client(timeout_s=30)
        queries = [
            {"features": {"history": ids[at : at + 12].tolist()}, "k": 20}
            for at in range(0, 60, 12)
        ]
        before = [client.retrieve(**query) for query in queries]
        assert all(one.coverage.reasons == () and not one.coverage.degraded for one in before)

        tier.stop(0)
        until(lambda: not source.tables["recent"]._links[0].reached)
        lost = [client.retrieve(**query) for query in queries]
        assert all(one.coverage.reasons == ("EMBEDDING_FALLBACK",) for one in lost)
        assert all(one.coverage.degraded and one.coverage.documents == 1.0 for one in lost)
        assert all(len(one.item_ids) == 20 for one in lost)
        assert any(
            one.scores.tobytes() != was.scores.tobytes()
            for one, was in zip(lost, before, strict=True)
        )
        assert sources.counts()["history"].defaulted > 0

        tier.start(0)
        tier.write()
        until(lambda: source.tables["recent"]._links[0].reached)
        until(lambda: not client.retrieve(**queries[0]).coverage.degraded)
        after = [client.retrieve(**query) for query in queries]
        for one, was in zip(after, before, strict=True):
            assert one.coverage.reasons == ()
            assert one.item_ids.tolist() == was.item_ids.tolist()
            assert one.scores.tobytes() == was.scores.tobytes()
    finally:
        source.close()


def test_only_requests_whose_rows_were_lost_are_degraded(
    split: Any,
) -> None:
    stored, lost = StoredRows(split.records), torch.tensor([3, 4])

    class Lossy:
        def fetch(self, rows: Any) -> Any:
            found = stored.fetch(rows)
            return {
                name: one._replace(defaulted=torch.isin(rows[name], lost))
                for name, one in found.items()
            }

    split.model.remote.connect(Lossy())
    known = split.model.vocabulary("movie").keys.tolist()
    encoded = split.model.encode(
        [{"history": [known[0]]}, {"history": [known[0], known[2]]}, {}, {"history": known[3:4]}]
    )
    assert encoded.fallback == (False, True, False, True)


def test_closing_the_source_closes_every_table(
    make_tier: Any, records: dict[str, torch.Tensor]
) -> None:
    tier = make_tier(records)
    source = RemoteRows({name: RemoteTable.follow(path) for name, path in tier.maps.items()})
    source.close()
    with pytest.raises(StateError, match="was closed"):
        source.fetch({"films": torch.arange(3)})


def test_every_generation_is_at_a_version_of_its_own_and_what_nobody_holds_is_closed(
    make_tier: Any, records: dict[str, torch.Tensor]
) -> None:
    tier = make_tier(records)
    sources = RemoteSources(tier.folder, CLIENT, timeout_s=20.0)
    first, second = (sources.open(GENERATION, ("films",)) for _ in range(2))
    rows, values = np.arange(5), np.ones((5, 16), dtype=np.float32)
    tier.change("films", 3, rows, values)
    first.write("films", 3, torch.from_numpy(rows), torch.from_numpy(values))
    asked = {"films": torch.from_numpy(rows)}
    wanted = quantize_rows(torch.from_numpy(values), "int8")
    assert torch.equal(first.fetch(asked)["films"].records, wanted)
    assert torch.equal(second.fetch(asked)["films"].records, records["films"][:5])
    assert sources.counts()["films"].lookups == 2

    table = first.tables["films"]
    del first
    until(lambda: not table._thread.is_alive())
    until(lambda: len(sources._open) == 1)
    assert sources.counts()["films"].lookups == 2
    with pytest.raises(StateError, match=r"gen-000006.*films\.json"):
        RemoteSources(tier.folder, CLIENT, timeout_s=0.0).open(GENERATION + 1, ("films",))
    second.close()

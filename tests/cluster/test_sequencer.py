import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError

from silvershard.cluster import retrieval_pb2
from silvershard.cluster.feed_block import FeedBlock, RoomReport
from silvershard.cluster.live_generation import LiveGeneration, load_live_generation
from silvershard.cluster.mutation_codec import logged_from
from silvershard.cluster.sequencer import MAX_VERSION, Sequencer, Write
from silvershard.cluster.update_log import NO_ITEM, UpdateLog, open_log
from silvershard.cluster.update_message import mutation_to
from silvershard.cluster.updates import ItemDelete, ItemPatch, ItemUpsert, TableRows, Update
from silvershard.shard.errors import Fenced, LogUnavailable
from silvershard.shard.mutations import Delete, Patch, RowChange, Upsert
from silvershard.shard.partition import shard_partitions

NEW = 5
NOW_MS = 1_700_000_000_000


class Clock:
    def __init__(self) -> None:
        self.now_ms = NOW_MS

    def __call__(self) -> int:
        return self.now_ms


class Scene:
    """A sequencer over a real log, asked in one thread."""

    def __init__(self, log: UpdateLog, live: LiveGeneration, **options: Any) -> None:
        self.clock = Clock()
        self.log = log
        self.live = live
        self.sequencer = Sequencer(log, live, unix_ms=self.clock, **options)

    @property
    def held(self) -> int:
        """An item of the snapshot."""
        return int(self.live.item_ids[7])

    def writes(self, *updates: Update) -> tuple[dict[int, list[Write]], list[Any]]:
        checked = self.sequencer.check([mutation_to(update) for update in updates])
        parts: dict[int, list[Write]] = {}
        for write in checked.writes:
            parts.setdefault(write.partition, []).append(write)
        return parts, list(checked.rejected)

    def apply(self, *updates: Update) -> tuple[dict[int, int], dict[int, Any]]:
        """Positions by log partition, and rejections by index."""
        parts, rejected = self.writes(*updates)
        positions = {}
        for partition, writes in parts.items():
            (outcome,) = self.sequencer.commit(partition, [writes])
            rejected += outcome.rejected
            if outcome.position:
                positions[partition] = outcome.position
        return positions, {one.index: one for one in rejected}

    def accept(self, *updates: Update) -> int:
        positions, rejected = self.apply(*updates)
        assert not rejected, rejected
        return positions[0]

    def refuse(self, update: Update, code: str) -> Any:
        positions, rejected = self.apply(update)
        assert not positions
        assert rejected[0].code == code, rejected
        return rejected[0]

    def logged(self, partition: int = 0) -> list[Any]:
        return [logged_from(one.payload) for one in self.log.read(partition, 0, 10_000)]


@pytest.fixture(scope="module")
def live(generation: Any) -> LiveGeneration:
    return load_live_generation(generation.path)


@pytest.fixture
def make_log(tmp_path: Path) -> Iterator[Callable[..., UpdateLog]]:
    logs: list[UpdateLog] = []

    def make(num_partitions: int = 1, name: str = "log") -> UpdateLog:
        logs.append(open_log(f"sqlite://{tmp_path}/{name}.db", num_partitions))
        return logs[-1]

    yield make
    for log in logs:
        log.close()


@pytest.fixture
def make_scene(live: LiveGeneration, make_log: Any) -> Callable[..., Scene]:
    def make(num_partitions: int = 1, **options: Any) -> Scene:
        return Scene(make_log(num_partitions), live, **options)

    return make


@pytest.fixture
def scene(make_scene: Any) -> Scene:
    made: Scene = make_scene()
    return made


def test_versions_are_assigned_one_after_the_other(scene: Scene) -> None:
    assert scene.accept(ItemUpsert(NEW)) == 1
    assert scene.accept(ItemPatch(NEW, signals={"popularity": 0.5})) == 2
    assert scene.accept(ItemDelete(NEW)) == 3
    assert [one.version for one in scene.logged()] == [1, 2, 3]
    assert [type(one) for one in scene.logged()] == [Upsert, Patch, Delete]
    assert scene.logged()[1].values.signals == {"popularity": 0.5}


def test_an_item_of_the_snapshot_has_no_version_and_starts_at_one(scene: Scene) -> None:
    scene.accept(ItemPatch(scene.held, signals={"popularity": 0.5}))
    assert [one.version for one in scene.logged()] == [1]


def test_the_same_version_again_is_acked_and_not_logged_again(scene: Scene) -> None:
    first = scene.accept(ItemUpsert(NEW, version=7))
    scene.accept(ItemUpsert(NEW + 1))
    assert scene.accept(ItemUpsert(NEW, version=7)) == first
    assert len(scene.logged()) == 2


def test_a_delete_and_its_opposite_never_share_a_version(scene: Scene) -> None:
    scene.accept(ItemUpsert(NEW, version=7))
    refusal = scene.refuse(ItemDelete(NEW, version=7), "ABORTED")
    assert refusal.current_version == 7
    assert "version 7 is of another change" in refusal.reason
    gone = scene.accept(ItemDelete(NEW, version=8))
    assert scene.accept(ItemDelete(NEW, version=8)) == gone
    scene.refuse(ItemUpsert(NEW, version=8), "ABORTED")
    assert len(scene.logged()) == 2


def test_a_test_and_set_that_is_sent_again_is_acked(scene: Scene) -> None:
    scene.accept(ItemUpsert(NEW, version=3))
    assert scene.accept(ItemPatch(NEW, version=4, if_version=3)) == 2
    assert scene.accept(ItemPatch(NEW, version=4, if_version=3)) == 2


def test_a_version_below_the_newest_is_refused_with_the_newest(scene: Scene) -> None:
    scene.accept(ItemUpsert(NEW, version=7))
    refusal = scene.refuse(ItemUpsert(NEW, version=6), "ABORTED")
    assert refusal.current_version == 7
    assert refusal.reason == "version 6 is not above that of item 5, which is version 7"
    assert scene.accept(ItemUpsert(NEW, version=20)) == 2
    assert scene.accept(ItemUpsert(NEW)) == 3
    assert scene.logged()[-1].version == 21


def test_if_version_must_be_the_version_of_the_item(scene: Scene) -> None:
    scene.accept(ItemUpsert(NEW, if_version=0))
    assert scene.refuse(ItemPatch(NEW, if_version=2), "ABORTED").current_version == 1
    assert scene.refuse(ItemUpsert(NEW, if_version=0), "ABORTED").current_version == 1
    scene.accept(ItemPatch(NEW, if_version=1))
    scene.accept(ItemDelete(NEW, if_version=2))
    assert scene.refuse(ItemUpsert(NEW, if_version=2), "ABORTED").current_version == 3


def test_if_version_zero_wants_an_item_that_does_not_exist(scene: Scene) -> None:
    refusal = scene.refuse(ItemUpsert(scene.held, if_version=0), "ABORTED")
    assert refusal.current_version == 0
    assert "without a version" in refusal.reason
    scene.accept(ItemDelete(scene.held))
    scene.accept(ItemUpsert(scene.held, if_version=0))
    assert [one.version for one in scene.logged()] == [1, 2]


def test_a_deleted_item_is_replaced_at_the_version_of_its_delete(scene: Scene) -> None:
    scene.accept(ItemDelete(scene.held))
    assert "deleted it" in scene.refuse(ItemUpsert(scene.held, if_version=5), "ABORTED").reason
    scene.accept(ItemUpsert(scene.held, if_version=1))


def test_a_patch_needs_its_item(scene: Scene) -> None:
    assert "no item 5" in scene.refuse(ItemPatch(NEW), "NOT_FOUND").reason
    scene.refuse(ItemPatch(NEW, version=9), "NOT_FOUND")
    scene.accept(ItemUpsert(NEW))
    scene.accept(ItemPatch(NEW))
    scene.accept(ItemDelete(NEW))
    scene.refuse(ItemPatch(NEW), "NOT_FOUND")


def test_a_delete_of_nothing_is_kept_only_with_a_version(scene: Scene) -> None:
    scene.refuse(ItemDelete(NEW), "NOT_FOUND")
    assert scene.accept(ItemDelete(NEW, version=4)) == 1
    assert scene.refuse(ItemUpsert(NEW, version=3), "ABORTED").current_version == 4
    assert scene.accept(ItemDelete(NEW)) == 1
    assert scene.accept(ItemDelete(NEW, version=6)) == 2
    assert [one.version for one in scene.logged()] == [4, 6]


def test_mutations_of_one_item_in_a_request_see_each_other(scene: Scene) -> None:
    positions, rejected = scene.apply(
        ItemPatch(NEW),
        ItemUpsert(NEW),
        ItemPatch(NEW, if_version=1),
        ItemPatch(NEW, if_version=1),
        ItemDelete(NEW),
        ItemDelete(NEW),
        ItemPatch(NEW),
        ItemUpsert(NEW, version=9),
        ItemUpsert(NEW, version=9),
    )
    assert {index: one.code for index, one in rejected.items()} == {
        0: "NOT_FOUND",
        3: "ABORTED",
        6: "NOT_FOUND",
    }
    assert positions == {0: 4}
    assert [one.version for one in scene.logged()] == [1, 2, 3, 9]


def test_calls_of_one_group_see_each_other_in_order(scene: Scene) -> None:
    calls = [scene.writes(ItemUpsert(NEW))[0][0], scene.writes(ItemPatch(NEW))[0][0]]
    first, second = scene.sequencer.commit(0, calls)
    assert (first.position, second.position) == (1, 2)
    again = scene.sequencer.commit(0, [scene.writes(ItemPatch(NEW, version=2))[0][0]])
    assert again[0].position == 2


def test_a_bad_mutation_never_fails_its_batch(scene: Scene) -> None:
    positions, rejected = scene.apply(
        ItemUpsert(NEW, signals={"popularity": float("nan")}),
        ItemUpsert(NEW + 1, attributes={"colour": ["red"]}),
        ItemUpsert(NEW + 2, attributes={"year": [1990, 1991]}),
        ItemUpsert(NEW + 3, embedding=[0.0] * 32),
        ItemUpsert(NEW + 4),
    )
    assert sorted(rejected) == [0, 1, 2, 3]
    assert {one.code for one in rejected.values()} == {"INVALID_ARGUMENT"}
    assert "signals.popularity" in rejected[0].reason
    assert "colour" in rejected[1].reason
    assert positions == {0: 1}


def test_a_message_without_an_operation_is_refused(scene: Scene) -> None:
    (refusal,) = scene.sequencer.check([retrieval_pb2.Mutation(version=3)]).rejected
    assert (refusal.code, refusal.reason[:3]) == ("INVALID_ARGUMENT", "op:")


@pytest.mark.parametrize("field", ["version", "item_id"])
def test_numbers_beyond_their_range_are_refused(scene: Scene, field: str) -> None:
    message = retrieval_pb2.Mutation(upsert=retrieval_pb2.ItemUpsert(item_id=NEW))
    setattr(message if field == "version" else message.upsert, field, (1 << 64) - 1)
    (refusal,) = scene.sequencer.check([message]).rejected
    assert refusal.reason.startswith(f"{field}: must be")


def test_the_largest_version_still_has_a_next_one(scene: Scene) -> None:
    scene.accept(ItemUpsert(NEW, version=MAX_VERSION))
    scene.accept(ItemDelete(NEW))
    assert scene.logged()[-1].version == MAX_VERSION + 1


def test_what_is_logged_has_its_version_and_no_test(scene: Scene) -> None:
    scene.accept(ItemUpsert(NEW, if_version=0, ttl_s=2.5, features={"movie": [3]}))
    (record,) = scene.log.read(0, 0, 10)
    assert b"if_version" not in record.payload
    assert logged_from(record.payload) == scene.logged()[0]
    assert scene.logged()[0].expires_unix_ms == NOW_MS + 2500
    assert scene.logged()[0].values.features == {"movie": (3,)}
    assert (record.item_id, record.version, record.logged_unix_ms) == (NEW, 1, NOW_MS)


def test_an_item_is_deleted_when_its_time_is_over(scene: Scene) -> None:
    scene.accept(ItemUpsert(NEW, ttl_s=1.0), ItemUpsert(NEW + 1))
    scene.clock.now_ms += 900
    assert scene.sequencer.expire(0) == 0
    scene.clock.now_ms += 200
    assert scene.sequencer.expire(0) == 1
    assert scene.sequencer.expire(0) == 0
    assert scene.logged()[-1] == Delete(NEW, 2)
    scene.refuse(ItemPatch(NEW), "NOT_FOUND")
    scene.accept(ItemPatch(NEW + 1))


def test_a_patch_keeps_the_time_of_its_item_and_an_upsert_replaces_it(scene: Scene) -> None:
    scene.accept(ItemUpsert(NEW, ttl_s=1.0), ItemUpsert(NEW + 1, ttl_s=1.0))
    scene.accept(ItemPatch(NEW), ItemUpsert(NEW + 1))
    scene.clock.now_ms += 5000
    assert scene.sequencer.expire(0) == 1
    assert scene.logged()[-1] == Delete(NEW, 3)


@pytest.mark.parametrize("seconds", [0.0, 1e10])
def test_a_ttl_has_limits(scene: Scene, seconds: float) -> None:
    refusal = scene.refuse(ItemUpsert(NEW, ttl_s=seconds), "INVALID_ARGUMENT")
    assert refusal.reason.startswith("ttl: must be above 0 and at most")


def test_rows_of_a_table_are_versioned_by_table(scene: Scene) -> None:
    (name, (num_rows, dim)) = next(iter(scene.live.tables.items()))
    rows = TableRows(name, [0, num_rows - 1], np.ones((2, dim)), version=4)
    assert scene.accept(rows) == 1
    assert scene.accept(rows) == 1
    scene.accept(TableRows(name, [1], np.zeros((1, dim))))
    refusal = scene.refuse(TableRows(name, [1], np.zeros((1, dim)), version=2), "ABORTED")
    assert refusal.current_version == 5
    first, second = scene.logged()
    assert isinstance(first, RowChange)
    assert first.rows == (0, num_rows - 1)
    assert (first.values == 1).all()
    assert (first.version, second.version) == (4, 5)
    assert [one.item_id for one in scene.log.read(0, 0, 9)] == [NO_ITEM, NO_ITEM]


def test_rows_of_unknown_tables_are_refused(scene: Scene) -> None:
    refusal = scene.refuse(TableRows("nothing", [0], np.zeros((1, 4))), "INVALID_ARGUMENT")
    assert refusal.reason.startswith("table:")


def test_every_log_partition_gets_its_own_items(make_scene: Any) -> None:
    scene = make_scene(4)
    updates = [ItemUpsert(item_id) for item_id in range(100)]
    positions, rejected = scene.apply(*updates)
    assert not rejected
    assert sorted(positions) == [0, 1, 2, 3]
    assert sum(positions.values()) == 100
    found = {one.item_id for partition in range(4) for one in scene.logged(partition)}
    assert found == set(range(100))
    again, rejected = scene.apply(*[ItemPatch(item_id) for item_id in range(100)])
    assert not rejected
    assert again == {partition: 2 * last for partition, last in positions.items()}


def room(shard: int, taken: int, *cut: int, slots: int = 100, replica: int = 0) -> RoomReport:
    return RoomReport(shard, replica, slots, taken, cut)


def test_upserts_wait_for_room_and_deletes_and_patches_pass(make_scene: Any) -> None:
    feed = FeedBlock(0.9, 0.1)
    scene = make_scene(feed=feed)
    assert "has not said yet" in scene.refuse(ItemUpsert(NEW), "RESOURCE_EXHAUSTED").reason
    feed.report([room(0, 88, 0)])
    scene.accept(ItemUpsert(1), ItemUpsert(2))
    refusal = scene.refuse(ItemUpsert(3), "RESOURCE_EXHAUSTED")
    assert refusal.reason.startswith("shard 0 holds 90.0% of the items that it has room for")
    assert "refused from 90.0% until it is below 80.0%" in refusal.reason
    scene.refuse(ItemUpsert(1), "RESOURCE_EXHAUSTED")
    scene.accept(ItemPatch(1), ItemDelete(2), ItemPatch(scene.held))
    feed.report([room(0, 85, 5)])
    scene.refuse(ItemUpsert(3), "RESOURCE_EXHAUSTED")
    feed.report([room(0, 79, 5)])
    scene.accept(ItemUpsert(3))


def test_only_the_shard_without_room_refuses(make_scene: Any, live: LiveGeneration) -> None:
    feed = FeedBlock(0.9, 0.1)
    scene = make_scene(feed=feed, num_shards=3)
    feed.report([room(0, 10, 0), room(1, 95, 0), room(2, 10, 0)])
    _, rejected = scene.apply(*[ItemUpsert(item_id) for item_id in range(60)])
    parts, _ = scene.writes(*[ItemUpsert(item_id) for item_id in range(60)])
    full = shard_partitions(1, 3, live.spec.num_partitions)
    assert sorted(rejected) == [one.number for one in parts[0] if one.home in full]
    assert 10 < len(rejected) < 30


def test_a_shard_is_found_as_the_partitions_are_dealt_out(make_scene: Any) -> None:
    for num_shards in (1, 2, 3, 5, 7, 64):
        scene = make_scene(num_shards=num_shards)
        num_partitions = scene.live.spec.num_partitions
        for shard in range(num_shards):
            for home in shard_partitions(shard, num_shards, num_partitions):
                assert scene.sequencer._shard_of(home) == shard


def test_the_fenced_sequencer_acks_nothing_after(
    scene: Scene, live: LiveGeneration, make_log: Any
) -> None:
    scene.accept(ItemUpsert(NEW))
    other = Scene(make_log(), live)
    with pytest.raises(Fenced):
        scene.apply(ItemPatch(NEW))
    assert scene.sequencer.fenced is not None
    with pytest.raises(Fenced):
        scene.apply(ItemUpsert(NEW, version=1))
    with pytest.raises(Fenced):
        scene.sequencer.expire(0)
    assert other.accept(ItemPatch(NEW)) == 2
    assert len(other.logged()) == 2


class Refusing:
    """A log whose next append fails, before or after it is stored."""

    def __init__(self, log: UpdateLog, *, stored: bool) -> None:
        self._log, self._stored, self.fails = log, stored, True

    def append(self, *arguments: Any) -> int:
        if not self.fails:
            return self._log.append(*arguments)
        self.fails = False
        if self._stored:
            self._log.append(*arguments)
        raise LogUnavailable("sqlite:///log", "gone")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)


@pytest.mark.parametrize("stored", [False, True])
def test_what_became_of_a_failed_append_is_asked_of_the_log(
    live: LiveGeneration, make_log: Any, stored: bool
) -> None:
    feed = FeedBlock(0.9, 0.1)
    feed.report([room(0, 0, 0)])
    scene = Scene(Refusing(make_log(), stored=stored), live, feed=feed)  # type: ignore[arg-type]
    with pytest.raises(LogUnavailable):
        scene.apply(ItemUpsert(NEW, version=4))
    assert scene.accept(ItemUpsert(NEW, version=4)) == 1
    assert scene.accept(ItemPatch(NEW)) == 2
    assert [one.version for one in scene.logged()] == [4, 5]


class Late:
    """A log in which one append has no answer, and is tried when the next decision is made."""

    def __init__(self, log: UpdateLog) -> None:
        self._log = log
        self.is_slow = self.was_fenced = False
        self._late: Any = None

    def append(self, *arguments: Any) -> int:
        if not self.is_slow:
            return self._log.append(*arguments)
        self.is_slow, self._late = False, arguments
        raise LogUnavailable("sqlite:///log", "no answer")

    def heads(self, *arguments: Any) -> Any:
        found = self._log.heads(*arguments)
        if self._late is not None:
            late, self._late = self._late, None
            try:
                self._log.append(*late)
            except Fenced:
                self.was_fenced = True
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)


def test_nothing_gets_into_the_log_behind_a_decision(live: LiveGeneration, make_log: Any) -> None:
    log: Any = Late(make_log())
    scene = Scene(log, live)
    scene.accept(ItemUpsert(NEW), ItemDelete(NEW))
    epochs, log.is_slow = scene.sequencer.epochs, True
    with pytest.raises(LogUnavailable):
        scene.apply(ItemUpsert(NEW))
    assert scene.accept(ItemDelete(NEW)) == 2
    assert log.was_fenced
    assert log.heads(0, [NEW])[NEW].deleted
    assert scene.sequencer.epochs > epochs


@pytest.mark.parametrize("call", ["commit", "expire"])
def test_a_sequencer_without_an_answer_leaves_the_log_to_its_successor(
    live: LiveGeneration, make_log: Any, call: str
) -> None:
    log: Any = Late(make_log())
    scene = Scene(log, live)
    log.is_slow = True
    with pytest.raises(LogUnavailable):
        scene.apply(ItemUpsert(NEW))
    other = Scene(make_log(), live)
    with pytest.raises(Fenced):
        _ = scene.apply(ItemUpsert(NEW)) if call == "commit" else scene.sequencer.expire(0)
    assert scene.sequencer.fenced is not None
    assert other.accept(ItemUpsert(NEW + 1)) == 1


@pytest.fixture(scope="module")
def other(publish_model: Any) -> LiveGeneration:
    """A generation that has lost items of ``live``."""
    return load_live_generation(publish_model().path)


@pytest.fixture(scope="module")
def lost(live: LiveGeneration, other: LiveGeneration) -> list[int]:
    """The items that it has lost."""
    return sorted(set(live.item_ids.tolist()) - set(other.item_ids.tolist()))


def test_an_item_that_was_patched_alone_is_what_the_live_generation_says(
    scene: Scene, live: LiveGeneration, other: LiveGeneration, lost: list[int]
) -> None:
    scene.accept(*[ItemPatch(item_id) for item_id in lost[:3]])
    scene.accept(ItemPatch(lost[0], version=9))
    scene.sequencer.follow(other, 1)
    for item_id in lost[:4]:
        scene.refuse(ItemPatch(item_id), "NOT_FOUND")
        scene.refuse(ItemDelete(item_id), "NOT_FOUND")
    # Sent again it is what it was.
    assert scene.accept(ItemPatch(lost[0], version=9)) == 4
    scene.accept(ItemUpsert(lost[1], if_version=0))
    scene.accept(ItemDelete(lost[2], version=7))
    scene.sequencer.follow(live, 1)
    scene.accept(ItemPatch(lost[0]), ItemPatch(lost[1]), ItemPatch(lost[3]))
    scene.refuse(ItemPatch(lost[2]), "NOT_FOUND")


def test_an_item_that_was_upserted_or_deleted_is_so_in_every_generation(
    scene: Scene, live: LiveGeneration, other: LiveGeneration, lost: list[int]
) -> None:
    both = int(other.item_ids[0])
    assert both in live.item_ids
    scene.accept(ItemUpsert(NEW), ItemPatch(NEW))
    scene.accept(ItemPatch(lost[0]), ItemUpsert(lost[0]), ItemPatch(lost[0]))
    scene.accept(ItemPatch(both), ItemDelete(both))
    for generation in (other, live):
        scene.sequencer.follow(generation, 1)
        scene.accept(ItemPatch(NEW), ItemPatch(lost[0]))
        scene.refuse(ItemPatch(both), "NOT_FOUND")
        scene.refuse(ItemUpsert(NEW, if_version=0), "ABORTED")
        assert scene.accept(ItemDelete(both)) == 7


def test_another_number_of_shards_has_room_once_each_of_them_has_said_so(
    make_scene: Any, live: LiveGeneration
) -> None:
    feed = FeedBlock(0.9, 0.1)
    scene = make_scene(feed=feed, num_shards=2)
    feed.report([RoomReport(shard, 0, 1000, 10, (0,)) for shard in range(2)])
    scene.accept(ItemUpsert(NEW))
    scene.sequencer.follow(live, 2)
    scene.accept(ItemUpsert(NEW + 1))
    scene.sequencer.follow(live, 3)
    items = [ItemUpsert(NEW + 2 + number) for number in range(40)]
    writes = [one for part in scene.writes(*items)[0].values() for one in part]
    # Those of every shard, also of the numbers that there were before.
    assert all(scene.sequencer.awaits_room([one]) for one in writes)
    scene.refuse(items[0], "RESOURCE_EXHAUSTED")
    feed.report([RoomReport(shard, 0, 1000, 10, (0,)) for shard in range(3)])
    assert not scene.sequencer.awaits_room(writes)
    scene.accept(*items)


def test_outcomes_are_counted_by_operation_and_code(scene: Scene) -> None:
    scene.apply(
        ItemUpsert(NEW, ttl_s=1),
        ItemPatch(NEW + 1),
        ItemDelete(NEW + 2, version=2, urgent=True),
        ItemUpsert(NEW, signals={"nothing": 1.0}),
    )
    scene.clock.now_ms += 2000
    scene.sequencer.expire(0)
    assert scene.sequencer.counts() == {
        ("upsert", "OK"): 1,
        ("upsert", "INVALID_ARGUMENT"): 1,
        ("patch", "NOT_FOUND"): 1,
        ("delete", "OK"): 1,
        ("expiry", "OK"): 1,
    }
    assert [one.urgent for one in scene.log.read(0, 0, 9)] == [False, True, False]


def test_random_bytes_and_fields_give_clean_rejections(scene: Scene) -> None:
    generator = np.random.default_rng(0)
    template = mutation_to(
        ItemUpsert(
            NEW,
            attributes={"genre": ["Drama"], "year": 1990, "price": 2.5},
            signals={"popularity": 0.5},
            fields={"title": "Film", "year": None},
            features={"movie": [3], "genres": ["Drama"]},
            ttl_s=5,
        )
    )
    seeds = [
        template,
        mutation_to(ItemPatch(NEW, attributes={"maker": [1, 2]})),
        mutation_to(ItemDelete(NEW, version=3)),
        mutation_to(TableRows("history", [1, 2], np.ones((2, 4)))),
    ]
    checked = accepted = 0
    for turn in range(4000):
        data = bytearray(seeds[turn % len(seeds)].SerializeToString())
        for _ in range(int(generator.integers(1, 6))):
            data[int(generator.integers(len(data)))] = int(generator.integers(256))
        message = retrieval_pb2.Mutation()
        try:
            message.ParseFromString(bytes(data))
        except DecodeError:
            continue
        found = scene.sequencer.check([message])
        checked += 1
        accepted += len(found.writes)
        assert len(found.writes) + len(found.rejected) == 1
        assert all(one.code == "INVALID_ARGUMENT" and one.reason for one in found.rejected)
        for write in found.writes:
            scene.sequencer.commit(0, [[write]])
    assert checked > 1000
    assert accepted > 100
    assert len(scene.logged()) > 50


def test_tensors_that_are_not_what_they_say_are_refused(scene: Scene) -> None:
    name, (_, dim) = next(iter(scene.live.tables.items()))
    good = struct.pack(f"<{dim}f", *range(dim))

    def reason(**tensor: Any) -> str:
        values = retrieval_pb2.Tensor(**{"shape": [1, dim], "data": good, **tensor})
        rows = retrieval_pb2.RowUpdate(table=name, rows=[0], values=values)
        rejected = scene.sequencer.check([retrieval_pb2.Mutation(rows=rows)]).rejected
        return rejected[0].reason if rejected else ""

    assert reason() == ""
    assert "must have 2 dimensions" in reason(shape=[dim])
    assert "bytes for its shape" in reason(data=good[:-1])
    assert "bytes for its shape" in reason(shape=[2**32 - 1, 2**32 - 1])
    assert "must be F32, F16 or BF16" in reason(dtype=3)
    assert "must be F32, F16 or BF16" in reason(dtype=77)
    assert reason(dtype=2, data=np.ones(dim, "<u2").tobytes()) == ""
    assert "finite" in reason(data=struct.pack(f"<{dim}f", *[float("nan")] * dim))


def test_threads_on_the_same_items_lose_no_ack_and_versions_only_grow(make_scene: Any) -> None:
    scene = make_scene(2)
    acked: list[tuple[int, int]] = []
    locks = [threading.Lock() for _ in range(2)]

    def client(seed: int) -> None:
        generator = np.random.default_rng(seed)
        for _ in range(40):
            ids = generator.integers(0, 10, 5).tolist()
            parts, _ = scene.writes(*[ItemUpsert(item_id) for item_id in ids])
            for partition, writes in parts.items():
                with locks[partition]:
                    (outcome,) = scene.sequencer.commit(partition, [writes])
                assert not outcome.rejected
                acked.append((partition, outcome.position))

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(acked)) == len(acked)
    total = 0
    for partition in range(2):
        records = scene.log.read(partition, 0, 10_000)
        total += len(records)
        assert {position for at, position in acked if at == partition} <= {
            one.position for one in records
        }
        versions: dict[int, int] = {}
        for one in records:
            assert one.version == versions.get(one.item_id, 0) + 1
            versions[one.item_id] = one.version
    assert total == 8 * 40 * 5


def test_nothing_is_logged_while_the_log_is_stalled(make_scene: Any, suffer: Any) -> None:
    scene = make_scene(faults=suffer("stall", "sequencer"))
    with pytest.raises(LogUnavailable, match="stalled by fault a"):
        scene.apply(ItemUpsert(NEW))
    with pytest.raises(LogUnavailable, match="stalled by fault a"):
        scene.sequencer.expire(0)
    suffer("stall", "sequencer", state="cleared")
    # Its epoch is the same: no append was without an answer.
    assert scene.accept(ItemUpsert(NEW)) == 1

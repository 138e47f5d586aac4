from typing import Any

import numpy as np
import pytest

from silvershard.cluster import update_pb2
from silvershard.cluster.mutation_codec import logged, logged_batch, logged_from
from silvershard.cluster.signal_records import SignalRecords
from silvershard.cluster.update_message import mutation_to
from silvershard.cluster.updates import ItemDelete, ItemPatch, ItemUpsert, Update
from silvershard.shard.mutations import Mutation

NAMES = ("popularity", "trend", "Größe")


def payload(update: Update, version: int) -> bytes:
    return logged(mutation_to(update), version)


def patch(draw: np.random.Generator, names: tuple[str, ...] = NAMES) -> ItemPatch:
    signals = {name: float(draw.normal()) for name in names}
    return ItemPatch(int(draw.integers(1, 1 << 63)), signals=signals)


def one_by_one(payloads: list[bytes], signals: SignalRecords) -> list[Mutation]:
    """Return what a batch is read as, one by one in the order of the log."""
    batch, refused = logged_batch(payloads, signals)
    assert refused == []
    placed = list(batch.placed)
    for patches in batch.patches:
        placed += patches.one_by_one()
    return [mutation for _, mutation in sorted(placed, key=lambda pair: pair[0])]


def test_what_is_read_in_columns_is_what_the_generated_code_reads() -> None:
    draw = np.random.default_rng(0)
    updates: list[Update] = []
    for _ in range(300):
        kind = int(draw.integers(0, 10))
        updates.append(
            ItemDelete(int(draw.integers(1, 99)))
            if kind == 0
            else ItemUpsert(5, signals={"trend": 1.0}, attributes={"topic": [3]})
            if kind == 1
            else patch(draw, NAMES[: 1 + kind % 3])
        )
    versions = (1 << draw.integers(0, 62, len(updates))).tolist()
    payloads = [payload(*pair) for pair in zip(updates, versions, strict=True)]
    signals = SignalRecords()
    wanted = [logged_from(one) for one in payloads]
    assert one_by_one(payloads, signals) == wanted
    found, others = signals.read(payloads)
    assert sum(len(patches.places) for patches in found) + len(others) == 300
    assert len(others) < 200
    # What was learnt from one batch is used for the next.
    assert one_by_one(payloads[::-1], signals) == wanted[::-1]


def test_every_order_in_which_a_payload_may_be_written_is_read_alike() -> None:
    draw = np.random.default_rng(1)
    plain = [payload(patch(draw, NAMES[:2]), 300) for _ in range(20)]
    odd = []
    for one in plain:
        record = update_pb2.LoggedMutation.FromString(one)
        body = record.mutation.patch.SerializeToString()
        # The version first, then the patch.
        mutation = b"\x50\xac\x02\x12" + bytes([len(body)]) + body
        odd.append(b"\x0a" + bytes([len(mutation)]) + mutation)
    assert all(len(one) == len(plain[0]) for one in odd)
    mixed = [one for pair in zip(plain, odd, strict=True) for one in pair]
    signals = SignalRecords()
    assert one_by_one(mixed, signals) == [logged_from(one) for one in mixed]
    assert signals.read(mixed)[1] == []


def wrapped(mutation: bytes) -> bytes:
    return b"\x0a" + bytes([len(mutation)]) + mutation


ID = b"\x09" + (7).to_bytes(8, "little")
SIGNAL = b"\x22\x08\x0a\x01a\x15" + np.float32(0.5).tobytes()


def patched(body: bytes, behind: bytes = b"\x50\x03") -> bytes:
    return wrapped(b"\x12" + bytes([len(body)]) + body + behind)


@pytest.mark.parametrize(
    "made",
    [
        patched(ID + SIGNAL + SIGNAL),  # a name twice
        patched(SIGNAL),  # no item
        patched(ID + ID + SIGNAL),
        patched(ID + b"\x22\x03\x0a\x01a"),  # no value
        patched(ID + SIGNAL, b""),  # no version
        patched(ID + SIGNAL, b"\x50\x03\x50\x04"),
        patched(ID + SIGNAL, b"\x50\x03\x58\x01"),  # a field that is not known here
        patched(ID + SIGNAL, b"\x50" + b"\xff" * 9 + b"\x01"),  # a negative version
        patched(ID + SIGNAL) + b"\x10\x05",  # it expires
        patched(ID + b"\x22\x09\x0a\x02\xc3\x28\x15" + bytes(4)),  # no UTF-8
        patched(ID + SIGNAL)[:-1],
        wrapped(b"\x1a\x09" + ID + b"\x50\x03"),  # a delete
        b"\xff" * 20,
        b"",
    ],
)
def test_a_payload_of_any_doubt_is_left_to_the_generated_code(made: bytes) -> None:
    signals = SignalRecords()
    assert signals.read([made] * 9) == ([], list(range(9)))


def test_a_shape_fits_no_payload_that_differs_in_more_than_numbers() -> None:
    signals = SignalRecords()
    usual = patched(ID + SIGNAL)
    (found,), others = signals.read([usual] * 9)
    assert (found.names, found.values.tolist(), others) == (("a",), [[0.5]] * 9, [])
    assert found.item_ids.tolist() == [7] * 9
    assert found.versions.tolist() == [3] * 9
    for at in range(len(usual)):
        changed = bytearray(usual)
        changed[at] ^= 0x80
        batch: list[Any] = [bytes(changed), *[usual] * 9]
        (found, *more), others = signals.read(batch)
        if others == [0]:
            continue
        whole = sorted(place for one in (found, *more) for place in one.places.tolist())
        assert whole == list(range(10))
        assert one_by_one(batch, signals) == [logged_from(one) for one in batch]


def test_few_payloads_of_a_length_and_too_many_shapes_are_read_one_by_one() -> None:
    signals = SignalRecords()
    assert signals.read([patched(ID + SIGNAL)] * 7) == ([], list(range(7)))
    assert signals.read([]) == ([], [])
    for number in range(12):
        name = bytes([97 + number])
        found, others = signals.read([patched(ID + SIGNAL.replace(b"a", name))] * 9)
        assert (len(found), len(others)) == ((1, 0) if number < 8 else (0, 9))

import struct
from collections.abc import Callable
from typing import Any

import pytest
import torch

from silvershard.cluster import shard_pb2, tensors
from silvershard.model.compiled_request import compile_request
from silvershard.model.request import Request
from silvershard.model.retriever import assemble
from silvershard.model.types import Cutoffs, RoundOne, RoundTwo, Work

SPECIAL = torch.tensor(
    [[float("-inf"), float("inf"), -0.0, 0.0, 1e-45, -1e-38, 3.4028234e38, 1 / 3]]
)
EXTREMES = torch.tensor([[-(2**63), 2**63 - 1, -1, 0, 1, 2**53 + 1, -(2**31), 2**62]])


def crossed(message: shard_pb2.TensorMap) -> shard_pb2.TensorMap:
    return shard_pb2.TensorMap.FromString(message.SerializeToString())


def assert_same_bits(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert got.dtype == wanted.dtype
    assert got.shape == wanted.shape
    assert got.numpy().tobytes() == wanted.contiguous().numpy().tobytes()


@pytest.mark.parametrize(
    "tensor",
    [
        SPECIAL,
        SPECIAL.half(),
        EXTREMES,
        EXTREMES.int(),
        EXTREMES.to(torch.int8),
        torch.empty(0, 3),
        torch.empty(2, 0, 4, dtype=torch.int64),
        torch.tensor(3.5),
        SPECIAL.T,
        torch.arange(24.0).view(2, 3, 4)[:, 1:, ::2],
    ],
    ids=lambda tensor: f"{tensor.dtype}{tuple(tensor.shape)}",
)
def test_a_tensor_crosses_the_wire_bit_for_bit(tensor: torch.Tensor) -> None:
    form = tensors._Form(tensor.dtype, "ABCD"[: tensor.ndim])
    found = tensors.from_map(crossed(tensors.to_map({"x": tensor})), {"x": form})
    assert_same_bits(found["x"], tensor)


def test_the_bytes_are_little_endian_and_row_major() -> None:
    message = tensors.to_map({"x": torch.tensor([[1.0, 2.0], [3.0, 4.0]])})
    assert message.data == struct.pack("<4f", 1, 2, 3, 4)
    assert message.layout == "x f32 2 2"


def test_every_tensor_begins_at_a_multiple_of_eight_bytes() -> None:
    message = tensors.to_map({"a": torch.tensor([1, 2, 3]).to(torch.int8), "b": torch.tensor([5])})
    assert message.data == struct.pack("<3b5xq", 1, 2, 3, 5)
    forms = {"a": tensors._Form(torch.int8, "A"), "b": tensors._Form(torch.int64, "B")}
    found = tensors.from_map(crossed(message), forms)
    assert [found["a"].tolist(), found["b"].tolist()] == [[1, 2, 3], [5]]


def test_what_arrives_may_be_changed_without_changing_the_message() -> None:
    message = tensors.to_map({"count": torch.tensor([1, 2])})
    found = tensors.from_map(message, tensors.COUNT)["count"]
    found += 1
    assert tensors.from_map(message, tensors.COUNT)["count"].tolist() == [1, 2]


def line(change: Callable[[str], str]) -> Any:
    def apply(message: shard_pb2.TensorMap) -> None:
        lines = message.layout.split("\n")
        message.layout = "\n".join(
            change(one) if one.startswith("scores") else one for one in lines
        )

    return apply


def says(text: str) -> Any:
    return line(lambda _: text)


def data(length: int) -> Any:
    def apply(message: shard_pb2.TensorMap) -> None:
        message.data = bytes(length)

    return apply


def drop(message: shard_pb2.TensorMap) -> None:
    message.layout = message.layout.split("\n")[0]


def empty(message: shard_pb2.TensorMap) -> None:
    message.Clear()


@pytest.mark.parametrize(
    ("garble", "complaint"),
    [
        (data(39), "'item_ids' (1, 3), 'scores' (1, 3) need 40 bytes, got 39"),
        (data(44), "need 40 bytes, got 44"),
        (data(0), "need 40 bytes, got 0"),
        (says("scores f32 3 1"), "dimension B must be"),
        (says("scores f32 1 999999999"), "dimension C must be"),
        (says("scores f32 1 9999999999"), "tells no shape"),
        (says("scores f32 1 -3"), "tells no shape"),
        (says("scores f32 1 ٣"), "tells no shape"),
        (says("scores f32 1  3"), "tells no shape"),
        (says("scores f32 3"), "must have 2 dimensions, got (3,)"),
        (says("scores f64 1 3"), "dtype must be f32, got 'f64'"),
        (says("scores i32 1 3"), "dtype must be f32, got 'i32'"),
        (says("scores"), "dtype must be f32, got ''"),
        (says("points f32 1 3"), "'points' is unexpected"),
        (line(lambda one: f"{one}\n{one}"), "'scores' is unexpected"),
        (drop, "'scores' is missing"),
        (empty, "'scores' is missing"),
    ],
)
def test_a_garbled_message_is_refused(garble: Any, complaint: str) -> None:
    cutoffs = Cutoffs(torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.int64))
    # Both tensors name the same sizes; the one that comes last is at fault.
    message = tensors.to_map({"item_ids": cutoffs.item_ids, "scores": cutoffs.scores})
    garble(message)
    with pytest.raises(tensors.TensorError) as raised:
        tensors.cutoffs_from_map(crossed(message))
    assert complaint in str(raised.value)


def test_a_dtype_without_a_form_is_refused() -> None:
    with pytest.raises(tensors.TensorError, match="float64 has no form"):
        tensors.to_map({"x": torch.zeros(1, dtype=torch.float64)})


@pytest.fixture
def work(whole: Any, generation: Any) -> Work:
    requests = [
        Request(features={"history": [1, 2]}, k=3, filter="year > 1990", exclude_ids=[5]),
        Request(k=7),
    ]
    compiled = [compile_request(one, whole.spec) for one in requests]
    encoded = whole.encode([one.features for one in compiled])
    plans = [one.plan(whole.spec, 10) for one in compiled]
    return assemble(compiled, plans, encoded.embedding, encoded.user_state)


def test_work_crosses_the_wire_bit_for_bit(work: Work) -> None:
    found = tensors.work_from_map(crossed(tensors.work_to_map(work)))
    for name, tensor in work._asdict().items():
        assert_same_bits(getattr(found, name), tensor)


def test_all_shards_are_sent_one_message_and_the_next_batch_another(work: Work) -> None:
    message = tensors.work_to_map(work)
    assert tensors.work_to_map(work) is message
    other = work._replace(k=work.k + 1)
    assert tensors.work_from_map(tensors.work_to_map(other)).k.tolist() == other.k.tolist()
    assert tensors.work_from_map(tensors.work_to_map(work)).k.tolist() == work.k.tolist()
    ones = torch.ones(1, 2)
    cutoffs = Cutoffs(ones, ones.long())
    assert tensors.cutoffs_to_map(cutoffs) is tensors.cutoffs_to_map(cutoffs)
    lower = Cutoffs(ones / 2, ones.long())
    found = tensors.cutoffs_from_map(tensors.cutoffs_to_map(lower))
    assert found.scores.tolist() == lower.scores.tolist()


def test_work_that_asks_for_fewer_than_no_semantic_candidates_is_refused(work: Work) -> None:
    fewer = work._replace(semantic_k=torch.tensor([0, -1]))
    with pytest.raises(tensors.TensorError, match="'semantic_k': must be at least 0, got -1"):
        tensors.work_from_map(tensors.work_to_map(fewer))


@pytest.mark.parametrize("name", ["k", "ann_k", "probes"])
def test_work_that_asks_for_nothing_is_refused(work: Work, name: str) -> None:
    empty = work._replace(**{name: torch.tensor([5, 0])})
    with pytest.raises(tensors.TensorError, match=f"'{name}': must be at least 1, got 0"):
        tensors.work_from_map(tensors.work_to_map(empty))


def test_work_without_requests_is_refused(work: Work) -> None:
    nobody = Work(*(tensor[:0] for tensor in work))
    with pytest.raises(tensors.TensorError, match="at least one request"):
        tensors.work_from_map(tensors.work_to_map(nobody))


def test_rounds_cross_the_wire_bit_for_bit_and_their_times_apart(whole: Any, work: Work) -> None:
    first, candidates = whole.open(work)
    second = whole.close(work, candidates, whole.merge.cutoffs([first], work.ann_k))
    times = {"ann": 5}
    got_first = tensors.round_one_from_map(crossed(tensors.round_to_map(first)), times)
    got_second = tensors.round_two_from_map(crossed(tensors.round_to_map(second)), times)
    assert got_first.times == got_second.times == times
    for got, wanted in ((got_first, first), (got_second, second)):
        for name in wanted._fields[:-1]:
            assert_same_bits(getattr(got, name), getattr(wanted, name))


def test_a_round_with_nan_is_refused(whole: Any, work: Work) -> None:
    first, candidates = whole.open(work)
    second = whole.close(work, candidates, whole.merge.cutoffs([first], work.ann_k))
    bad_first = first._replace(scores=first.scores * float("nan"))
    bad_second = second._replace(values=second.values * float("nan"))
    with pytest.raises(tensors.TensorError, match="'scores': must not hold NaN"):
        tensors.round_one_from_map(tensors.round_to_map(bad_first), {})
    odd = first._replace(semantic_scores=torch.full((2, 1), float("nan")))
    odd = odd._replace(semantic_item_ids=torch.zeros(2, 1, dtype=torch.int64))
    with pytest.raises(tensors.TensorError, match="'semantic_scores': must not hold NaN"):
        tensors.round_one_from_map(tensors.round_to_map(odd), {})
    with pytest.raises(tensors.TensorError, match="'values': must not hold NaN"):
        tensors.round_two_from_map(tensors.round_to_map(bad_second), {})


def test_warnings_cross_by_user() -> None:
    reply = shard_pb2.ShardReply()
    tensors.add_warnings(reply, [("a", "b"), ()])
    assert tensors.warnings_of(reply, 2) == [("a", "b"), ()]
    with pytest.raises(tensors.TensorError, match="must be of 3 users, got 2"):
        tensors.warnings_of(reply, 3)


def test_rounds_are_namedtuples_of_the_declared_forms() -> None:
    assert tuple(tensors.WORK) == Work._fields
    assert tuple(tensors.CUTOFFS) == Cutoffs._fields
    assert (*tensors.ROUND_ONE, "times") == RoundOne._fields
    assert (*tensors.ROUND_TWO, "times") == RoundTwo._fields

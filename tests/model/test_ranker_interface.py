from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from silvershard.model import ranker_interface
from silvershard.model.dense import PaddedLinear
from silvershard.model.ranker import build_ranker
from silvershard.model.ranker_config import (
    MixtureOfLogitsConfig,
    MLPConfig,
    RankerConfig,
    SelfAttentionConfig,
)
from silvershard.model.ranker_interface import TEMPORARY_BYTES, Ranker, retriever_skip
from silvershard.model.ranker_session import pack_session, session_width

DIM, STATE, SIGNALS, TASKS, PAGES, SLOTS = 24, 20, 3, 2, 8, 64
CONFIGS = (
    MLPConfig(),
    SelfAttentionConfig(session_rows=9, hidden=40),
    MixtureOfLogitsConfig(user_components=3, item_components=2, component_dim=10, gate_hidden=20),
)
PER_CANDIDATE = ("items", "slots", "refined", "signals")


def build(config: RankerConfig, dim: int = DIM, session_length: int = 9) -> Ranker:
    """A ranker in which every learned part takes part."""
    torch.manual_seed(5)
    made = build_ranker(
        config,
        dim=dim,
        num_heads=2,
        state_dim=STATE,
        session_length=session_length,
        num_signals=SIGNALS,
        num_tasks=TASKS,
    )
    made.requires_grad_(requires_grad=False)
    made.signal_mean.uniform_()
    made.signal_scale.uniform_()
    for name, parameter in made.named_parameters():
        if name in ("out.bias", "scale"):
            parameter.normal_()
        if name == "out.weight":
            parameter[: 32 if isinstance(config, MLPConfig) else dim, :TASKS].normal_()
    return made.eval()


@pytest.fixture(params=CONFIGS, ids=lambda config: config.kind)
def ranker(request: pytest.FixtureRequest) -> Ranker:
    return build(request.param)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def cached(made: Ranker, batch: int, width: int, seed: int = 8) -> dict[str, Any]:
    """Arguments of ``rank_slots`` with padding in places, and sessions of every length."""
    generator = torch.Generator().manual_seed(seed)
    dim, rows = made.shape.dim, made.session_rows
    state = torch.randn(batch, STATE, generator=generator)
    if rows:
        sessions = torch.randn(batch, rows, dim, generator=generator)
        packed = pack_session(sessions, torch.arange(batch) % (rows + 1))
        state = torch.cat([state, packed], 1)
    return {
        "query": torch.randn(batch, 2, dim, generator=generator),
        "user_state": state,
        "cache": torch.randn(PAGES, SLOTS, dim, generator=generator).half(),
        "slots": torch.randint(-1, PAGES * SLOTS, (batch, width), generator=generator),
        "refined": torch.randn(batch, width, 2, generator=generator),
        "signals": torch.rand(batch, width, SIGNALS, generator=generator),
    }


def gathered(given: dict[str, Any]) -> dict[str, Any]:
    """The same candidates as arguments of ``forward``."""
    rows = given["cache"].float().flatten(0, 1)
    items = rows[given["slots"].clamp(min=0)]
    rest = {name: value for name, value in given.items() if name not in ("cache", "slots")}
    return {**rest, "items": items}


def part(given: dict[str, Any], requests: Any, columns: Any = slice(None)) -> dict[str, Any]:
    """Only these requests and, of each of them, only these candidates."""
    taken = {}
    for name, value in given.items():
        taken[name] = value if name == "cache" else value[requests]
        if name in PER_CANDIDATE:
            taken[name] = taken[name][:, columns]
    return taken


def test_cached_candidates_have_the_logits_of_their_items(ranker: Ranker) -> None:
    given = cached(ranker, 6, 40)
    real = given["slots"] >= 0
    found, expected = ranker.rank_slots(**given), ranker(**gathered(given))
    assert found.shape == (6, 40, TASKS)
    assert torch.allclose(found[real], expected[real], atol=1e-4, rtol=1e-5)
    assert not torch.allclose(found[real], expected[real].roll(1, 0), atol=1e-2)


def test_logits_with_gradients_agree_with_those_without(ranker: Ranker) -> None:
    given = gathered(cached(ranker, 6, 40))
    expected = ranker(**given)
    ranker.requires_grad_()
    tracked = ranker(**given)
    assert tracked.requires_grad
    assert torch.allclose(tracked.detach(), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("batch", [1, 2, 7, 33])
def test_a_candidate_has_the_same_bits_alone_and_in_any_company(
    ranker: Ranker, threads: int, batch: int
) -> None:
    given = cached(ranker, batch, 37)
    together = ranker.rank_slots(**given)
    items = gathered(given)
    forward = ranker(**items)
    generator = torch.Generator().manual_seed(1)
    order, places = torch.randperm(batch, generator=generator), torch.randperm(37)
    assert torch.equal(ranker.rank_slots(**part(given, order, places)), together[order][:, places])
    assert torch.equal(ranker(**part(items, order, places)), forward[order][:, places])
    for request in range(0, batch, 4):
        mine = slice(request, request + 1)
        for columns in (slice(0, 1), slice(5, 7), slice(3, 36), slice(0, 37)):
            alone = part(given, mine, columns)
            assert torch.equal(ranker.rank_slots(**alone), together[mine, columns])
            alone = part(items, mine, columns)
            assert torch.equal(ranker(**alone), forward[mine, columns])


def test_the_thread_count_does_not_change_a_bit(ranker: Ranker) -> None:
    given = cached(ranker, 3, 3000)
    before = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(ranker.rank_slots(**given))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


@pytest.mark.parametrize("budget", [1, 1 << 20, 5 << 20])
def test_tiles_of_any_size_give_the_same_bits(
    ranker: Ranker, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    given = cached(ranker, 5, 700)
    together, forward = ranker.rank_slots(**given), ranker(**gathered(given))
    calls = []
    score = ranker.score_slots

    def counted(*args: Any) -> Tensor:
        calls.append(args)
        return score(*args)

    monkeypatch.setattr(ranker_interface, "TEMPORARY_BYTES", budget)
    monkeypatch.setattr(ranker, "score_slots", counted)
    assert torch.equal(ranker.rank_slots(**given), together)
    assert torch.equal(ranker(**gathered(given)), forward)
    assert len(calls) > 1


def test_padding_gets_zeros_and_changes_nothing_else(ranker: Ranker) -> None:
    given = cached(ranker, 3, 20)
    given["slots"][:, 15:] = -1
    padding, before = given["slots"] < 0, given["slots"].clone()
    found = ranker.rank_slots(**given)
    assert torch.equal(given["slots"], before)
    assert not found[padding].any()
    for value in (torch.nan, torch.inf, -torch.inf):
        spoilt = {name: tensor.clone() for name, tensor in given.items()}
        spoilt["refined"][padding] = value
        spoilt["signals"][padding] = value
        assert torch.equal(ranker.rank_slots(**spoilt), found)
    assert torch.equal(ranker.rank_slots(**part(given, slice(None), slice(0, 15))), found[:, :15])


def test_a_row_of_the_cache_without_numbers_spoils_its_own_logits_only(ranker: Ranker) -> None:
    given = cached(ranker, 3, 20)
    given["slots"][given["slots"] == 0] = 1
    expected = ranker.rank_slots(**given)
    given["slots"][1, 4] = 0
    given["cache"][0, 0] = torch.nan
    found = ranker.rank_slots(**given)
    assert found[1, 4].isnan().all()
    found[1, 4] = expected[1, 4]
    assert torch.equal(found, expected)


def test_every_input_is_read(ranker: Ranker) -> None:
    given = gathered(cached(ranker, 4, 20))
    before = ranker(**given)
    for name in given:
        changed = {**given, name: given[name].clone()}
        if name == "user_state":
            changed[name][:, :STATE] += 1.0
        else:
            changed[name] += 1.0
        assert not torch.allclose(before, ranker(**changed), atol=1e-4), name


def test_an_empty_batch_or_no_candidates_give_no_logits(ranker: Ranker) -> None:
    for batch, width in ((0, 4), (3, 0), (0, 0)):
        given = cached(ranker, batch, width)
        assert ranker.rank_slots(**given).shape == (batch, width, TASKS)
        assert ranker(**gathered(given)).shape == (batch, width, TASKS)


def test_an_empty_cache_ranks_padding(ranker: Ranker) -> None:
    given = cached(ranker, 2, 3)
    given["cache"], given["slots"] = given["cache"][:0], torch.full((2, 3), -1)
    assert not ranker.rank_slots(**given).any()


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("query", (2, 3, DIM)),
        ("query", (2, 2, DIM + 1)),
        ("user_state", (2, STATE - 1)),
        ("user_state", (1, STATE)),
        ("refined", (2, 5, 3)),
        ("refined", (2, 4, 2)),
        ("signals", (2, 5, SIGNALS + 1)),
        ("cache", (PAGES, SLOTS, DIM - 1)),
        ("slots", (3, 5)),
        ("slots", (2,)),
    ],
)
def test_other_shapes_are_refused_by_name(
    ranker: Ranker, name: str, shape: tuple[int, ...]
) -> None:
    given = cached(ranker, 2, 5)
    given[name] = torch.zeros(shape, dtype=given[name].dtype)
    with pytest.raises(ValueError, match=f"{name} must be .*, got"):
        ranker.rank_slots(**given)


def test_items_of_another_shape_are_refused(ranker: Ranker) -> None:
    given = gathered(cached(ranker, 2, 5))
    for items in (given["items"][..., 1:], given["items"][1:], given["items"][0]):
        with pytest.raises(ValueError, match=r"items must be \(2, U, 24\), got"):
            ranker(**{**given, "items": items})


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)
def test_training_reaches_every_parameter(config: RankerConfig) -> None:
    torch.manual_seed(5)
    made = build_ranker(
        config,
        dim=DIM,
        num_heads=2,
        state_dim=STATE,
        session_length=9,
        num_signals=SIGNALS,
        num_tasks=TASKS,
    )
    given = gathered(cached(made, 12, 9))
    before = {name: value.clone() for name, value in made.named_parameters()}
    # The last layer starts at zero, so the second step is the first that reaches what feeds it.
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss = torch.nn.functional.softplus(made(**given) * torch.randn(12, 9, TASKS)).mean()
        loss.backward()
        optimizer.step()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 1e-9, name
        assert not torch.equal(parameter, before[name]), name
    for layer in made.modules():
        if isinstance(layer, PaddedLinear):
            assert not layer.weight[layer.in_features :].any()
            assert not layer.weight[:, layer.out_features :].any()


def test_gradients_reach_the_towers_through_the_ranker(ranker: Ranker) -> None:
    given = gathered(cached(ranker, 4, 6))
    for name in ("query", "user_state", "items", "refined"):
        given[name].requires_grad_()
    ranker(**given).square().sum().backward()
    for name in ("query", "user_state", "items", "refined"):
        assert torch.isfinite(given[name].grad).all(), name
        assert given[name].grad.any(), name


def most_allocated(run: Any) -> int:
    """Bytes that were allocated and not yet freed, at their highest while ``run`` goes on."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        kept = run()
    del kept
    held = most = 0
    kineto = profiled.profiler.kineto_results  # type: ignore[union-attr]
    events = [event for event in kineto.events() if event.name() == "[memory]"]
    assert events
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.parametrize(("batch", "width"), [(1, 100_000), (1500, 1), (40, 1500)])
@pytest.mark.parametrize(
    "config",
    [MLPConfig(), SelfAttentionConfig(), MixtureOfLogitsConfig()],
    ids=lambda config: config.kind,
)
def test_memory_is_bounded_whatever_is_ranked(config: RankerConfig, batch: int, width: int) -> None:
    made = build(config, dim=64, session_length=31)
    given = cached(made, batch, width)
    result = 4 * batch * width * TASKS
    assert most_allocated(lambda: made.rank_slots(**given)) < TEMPORARY_BYTES + result


def test_the_stated_size_of_a_candidate_is_no_less_than_it_takes(ranker: Ranker) -> None:
    given = cached(ranker, 1, 4096)
    prepared = ranker.prepare_slots(given["query"], given["user_state"])
    rest = (given["cache"], given["slots"], given["refined"], given["signals"])
    taken = most_allocated(lambda: ranker.score_slots(prepared, *rest)) / 4
    assert taken <= 4096 * ranker.candidate_floats <= 2 * taken


def test_the_stated_size_of_a_request_is_no_less_than_it_takes(ranker: Ranker) -> None:
    given = cached(ranker, 512, 1)
    taken = most_allocated(lambda: ranker.prepare_slots(given["query"], given["user_state"])) / 4
    assert taken <= 512 * ranker.request_floats <= 4 * taken


def test_the_skip_follows_the_head_of_each_task_or_their_mean() -> None:
    refined = torch.randn(5, 3)
    assert torch.allclose(retriever_skip(3, 3)(refined), 10 * refined - 10)
    mean = 10 * refined.mean(1, keepdim=True) - 10
    assert torch.allclose(retriever_skip(3, 2)(refined), mean.expand(-1, 2))


def test_the_state_of_a_session_is_as_wide_as_stated(ranker: Ranker) -> None:
    assert cached(ranker, 1, 1)["user_state"].shape[1] == STATE + session_width(
        ranker.session_rows, DIM
    )

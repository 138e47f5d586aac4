from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from silvershard.kernels import fixed_dot
from silvershard.model.catalogue import Ragged
from silvershard.model.placement import Precision
from silvershard.model.ranker_session import unpack_session
from silvershard.model.registry import build
from silvershard.model.two_tower import TwoTower, recency_weights
from silvershard.model.two_tower_config import TwoTowerConfig

NUM_FILMS = 120
GENRES = ("Comedy", "Drama", "Horror", "Noir")


def config(**changes: Any) -> TwoTowerConfig:
    settings: dict[str, Any] = {
        "dim": 24,
        "heads": ("rated", "liked"),
        "tasks": ("rated", "liked"),
        "signals": ("popularity", "recency", "length"),
        "history": "history",
        "item": "film",
        "tables": (
            {"name": "film", "dtype": "int", "size": NUM_FILMS},
            {"name": "genres", "dtype": "string", "size": len(GENRES)},
            {"name": "year", "dtype": "int", "size": 10},
        ),
        "pooled": ({"feature": "genres", "width": 3},),
        "max_history": 20,
        "bands": 5,
    }
    return TwoTowerConfig.model_validate({**settings, **changes})


def film_features() -> dict[str, Ragged]:
    rng = np.random.default_rng(4)
    genres = [
        rng.choice(GENRES, rng.integers(0, 4), replace=False).tolist() for _ in range(NUM_FILMS)
    ]
    return {
        "film": Ragged.from_rows([[1000 + 3 * film] for film in range(NUM_FILMS)]),
        "genres": Ragged.from_rows(genres, dtype="string"),
        "year": Ragged.from_rows([[1990 + film % 10] for film in range(NUM_FILMS)]),
    }


@pytest.fixture(scope="module")
def model() -> TwoTower:
    torch.manual_seed(6)
    made = TwoTower(config())
    made.vocabulary("film").fill(range(1000, 1000 + 3 * NUM_FILMS, 3))
    made.vocabulary("genres").fill(GENRES)
    made.vocabulary("year").fill(range(1990, 2000))
    made.bands.copy_(torch.randint(5, made.bands.shape))
    links = made.links("genres")
    links[1:, 1] = torch.randint(-1, 5, (NUM_FILMS,))
    links[1:, 2] = torch.where(links[1:, 1] >= 0, torch.randint(-1, 5, (NUM_FILMS,)), -1)
    made.requires_grad_(requires_grad=False)
    for tables in (made.user_tables, made.item_tables):
        for name in tables.features:
            tables.weight(name).normal_()
    made.ranker.out.weight[:32, :2].normal_()
    return made.eval()


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def users(count: int) -> list[Mapping[str, Sequence[Any]]]:
    rng = np.random.default_rng(9)
    histories = [rng.integers(990, 1400, rng.integers(0, 30)).tolist() for _ in range(count - 2)]
    return [{}, {"history": []}, *({"history": history} for history in histories)]


def known(films: Sequence[int]) -> list[int]:
    return [1000 + 3 * film for film in films]


def test_embeddings_have_unit_length_and_the_declared_shapes(model: TwoTower) -> None:
    encoded = model.encode(users(7))
    assert encoded.embedding.shape == (7, 2, 24)
    assert encoded.user_state.shape == (7, model.config.state_dim)
    items = model.embed_items(film_features())
    assert items.shape == (NUM_FILMS, 24)
    for rows in (encoded.embedding, items):
        assert rows.dtype == torch.float32
        assert torch.allclose(fixed_dot(rows, rows), torch.ones(1))


@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 64])
def test_a_user_has_the_same_bits_alone_and_in_any_batch(
    model: TwoTower, threads: int, size: int
) -> None:
    batch = users(size) if size >= 2 else users(5)[4:]
    together = model.encode(batch)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(size))
    permuted = model.encode([batch[at] for at in order.tolist()])
    assert torch.equal(permuted.embedding, together.embedding[order])
    assert torch.equal(permuted.user_state, together.user_state[order])
    for at, user in enumerate(batch):
        alone = model.encode([user])
        assert torch.equal(alone.embedding[0], together.embedding[at])
        assert torch.equal(alone.user_state[0], together.user_state[at])
        assert alone.warnings[0] == together.warnings[at]


def test_an_item_has_the_same_bits_alone_and_in_any_batch(model: TwoTower, threads: int) -> None:
    features = film_features()
    together = model.embed_items(features)
    shuffled = np.random.default_rng(3).permutation(NUM_FILMS)
    for rows in (*np.arange(0, NUM_FILMS, 7)[:, None], shuffled, np.arange(7, 40)):
        taken = {name: column.take(rows) for name, column in features.items()}
        assert torch.equal(model.embed_items(taken), together[torch.from_numpy(rows)])


def test_items_beyond_one_chunk_have_the_same_bits(model: TwoTower) -> None:
    rows = np.arange(4096 + 50) % NUM_FILMS
    many = {name: column.take(rows) for name, column in film_features().items()}
    expected = model.embed_items(film_features())[torch.from_numpy(rows)]
    assert torch.equal(model.embed_items(many), expected)


def test_a_pair_has_the_same_logits_whatever_pairs_surround_it(
    model: TwoTower, threads: int
) -> None:
    encoded = model.encode(users(9))
    items = model.embed_items(film_features())
    pairs = items.expand(9, -1, -1)
    refined = fixed_dot(encoded.embedding[:, None], pairs[:, :, None])  # (B, U, H)
    signals = torch.rand(9, NUM_FILMS, 3, generator=torch.Generator().manual_seed(1))
    together = model.rank(encoded.embedding, encoded.user_state, pairs, refined, signals)
    assert together.shape == (9, NUM_FILMS, 2)
    for user in range(9):
        mine = (slice(user, user + 1), torch.arange(user, NUM_FILMS, 7))
        alone = model.rank(
            encoded.embedding[user : user + 1],
            encoded.user_state[user : user + 1],
            pairs[mine],
            refined[mine],
            signals[mine],
        )
        assert torch.equal(alone, together[mine])


@pytest.fixture(scope="module")
def attentive(model: TwoTower) -> TwoTower:
    """The same towers with a reranker that attends to the last five films."""
    torch.manual_seed(7)
    made = TwoTower(config(ranker={"kind": "self_attention", "session_rows": 5}))
    shared = {
        name: value for name, value in model.state_dict().items() if not name.startswith("ranker")
    }
    made.load_state_dict(shared, strict=False)
    made.share_history_table()
    return made.requires_grad_(requires_grad=False).eval()


def test_the_user_state_ends_with_the_session_that_the_ranker_attends_to(
    model: TwoTower, attentive: TwoTower
) -> None:
    histories: list[list[int]] = [[], known([4]), known(range(30, 42)), [5, *known([7, 9]), 6]]
    state = attentive.encode([{"history": history} for history in histories]).user_state
    pooled, session = state.split([3 * 24, 5 * 24 + 1], 1)
    assert torch.equal(pooled, model.encode([{"history": one} for one in histories]).user_state)
    rows, lengths = unpack_session(session, 24)
    assert lengths.tolist() == [0, 1, 5, 2]
    table = model.user_tables.weight("history")
    for request, films in enumerate(([], [4], range(37, 42), [7, 9])):
        expected = torch.zeros(5, 24)
        expected[: len(films)] = table[torch.tensor([*films], dtype=torch.int64) + 1]
        assert torch.equal(rows[request], expected)


def test_a_session_leaves_the_embeddings_as_they_are(model: TwoTower, attentive: TwoTower) -> None:
    assert torch.equal(attentive.encode(users(9)).embedding, model.encode(users(9)).embedding)
    assert attentive.config.state_dim == model.config.state_dim + 5 * 24 + 1
    assert attentive.encode([]).user_state.shape == (0, attentive.config.state_dim)


def test_a_session_is_the_same_alone_and_in_any_batch(attentive: TwoTower) -> None:
    batch = users(20)
    together = attentive.encode(batch).user_state
    for at, user in enumerate(batch):
        assert torch.equal(attentive.encode([user]).user_state[0], together[at])


@pytest.fixture(scope="module", params=["mean", "attention", "hstu"])
def sequential(request: pytest.FixtureRequest, model: TwoTower) -> TwoTower:
    """A tower with a sequence encoder of the last eight films, and a reranker of the last three."""
    torch.manual_seed(8)
    made = TwoTower(
        config(
            encoder={"kind": request.param, "max_length": 8},
            ranker={"kind": "self_attention", "session_rows": 3},
        )
    )
    kept = ("vocabularies", "user_tables", "item_tables", "links", "bands", "recency")
    shared = {name: one for name, one in model.state_dict().items() if name.startswith(kept)}
    made.load_state_dict(shared, strict=False)
    return made.requires_grad_(requires_grad=False).eval()


def test_the_encoded_history_stands_between_pooled_features_and_session(
    model: TwoTower, sequential: TwoTower
) -> None:
    histories: list[list[int]] = [[], known([4]), known(range(30, 42)), [5, *known([7, 9]), 6]]
    state = sequential.encode([{"history": history} for history in histories]).user_state
    pooled, encoded, session = state.split([3 * 24, 24, 3 * 24 + 1], 1)
    assert torch.equal(pooled, model.encode([{"history": one} for one in histories]).user_state)
    assert sequential.session_table is not None
    assert sequential.encoder is not None
    table = sequential.session_table.weight("session")
    for request, films in enumerate(([], [4], range(34, 42), [7, 9])):
        rows = torch.zeros(1, 8, 24)
        rows[0, : len(films)] = table[torch.tensor([*films], dtype=torch.int64) + 1]
        states = sequential.encoder(rows, torch.tensor([len(films)]))
        expected = states[0, len(films) - 1] if films else torch.zeros(24)
        assert torch.equal(encoded[request], expected)
        newest = unpack_session(session[request : request + 1], 24)[0][0]
        assert torch.equal(newest[: len(films)], rows[0, max(len(films) - 3, 0) : len(films)][:3])


def test_an_encoded_user_is_the_same_alone_and_in_any_batch(
    sequential: TwoTower, threads: int
) -> None:
    batch = users(33)
    together = sequential.encode(batch)
    for at, user in enumerate(batch):
        alone = sequential.encode([user])
        assert torch.equal(alone.user_state[0], together.user_state[at])
        assert torch.equal(alone.embedding[0], together.embedding[at])
    assert sequential.encode([]).user_state.shape == (0, sequential.config.state_dim)


def test_the_order_of_a_history_matters_to_an_encoder_that_knows_positions(
    sequential: TwoTower,
) -> None:
    one, other = known([1, 2, 3, 4, 5]), known([2, 1, 3, 4, 5])
    first, second = sequential.encode([{"history": one}, {"history": other}]).user_state
    encoded = slice(3 * 24, 4 * 24)
    moved = not torch.allclose(first[encoded], second[encoded], atol=1e-4)
    assert moved == (type(sequential.encoder).__name__ == "LayeredEncoder")


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_quantised_tower_is_close_to_the_float_one_and_loads_again(
    precision: Any, sequential: TwoTower, threads: int
) -> None:
    small = sequential.quantized(precision)
    assert small.config.table_precision == precision
    batch = users(20)
    together, floats = small.encode(batch), sequential.encode(batch)
    bound = 0.98 if precision == "int8" else 0.6
    assert fixed_dot(together.embedding, floats.embedding).min() > bound
    assert not torch.equal(together.embedding, floats.embedding)
    for at in (0, 7, 19):
        assert torch.equal(small.encode([batch[at]]).user_state[0], together.user_state[at])
    items, exact = small.embed_items(film_features()), sequential.embed_items(film_features())
    assert fixed_dot(items, exact).min() > bound
    assert not torch.equal(items, exact)
    again = build("two_tower", small.config.model_dump(mode="json"))
    again.load_state_dict(small.state_dict())
    assert torch.equal(again.encode(batch).user_state, together.user_state)
    tables = [name for name in small.state_dict() if "_table" in name and "weight" in name]
    assert len(tables) == 3 + 4 + 1
    assert all(small.state_dict()[name].dtype == torch.uint8 for name in tables)
    with pytest.raises(ValueError, match="only float tables are trained"):
        small.quantized(precision)


def test_a_history_without_known_ids_gets_the_default_embedding(model: TwoTower) -> None:
    encoded = model.encode([{}, {"history": []}, {"history": [5, 6]}, {"history": known([3])}])
    assert torch.equal(encoded.embedding[0], encoded.embedding[1])
    assert torch.equal(encoded.embedding[0], encoded.embedding[2])
    assert not torch.equal(encoded.embedding[0], encoded.embedding[3])


def test_unknown_ids_are_left_out_and_reported(model: TwoTower) -> None:
    encoded = model.encode([{"history": [1, *known([3]), 2]}, {"history": known([3])}])
    assert torch.equal(encoded.embedding[0], encoded.embedding[1])
    assert encoded.warnings == (("feature history: 2 of 3 values unknown",), ())


def test_only_the_last_known_ids_count_and_their_order_matters(model: TwoTower) -> None:
    films = known(range(40))
    long, last, other = (
        model.encode([{"history": history}]).embedding
        for history in (films, films[-20:], films[-20:][::-1])
    )
    assert torch.equal(long, last)
    assert not torch.allclose(last, other, atol=1e-3)


def test_the_user_state_is_what_the_tables_pool(model: TwoTower) -> None:
    films = [5, 9, 2, 7]
    state = model.encode([{"history": known(films)}]).user_state[0].view(3, 24)
    rows = torch.tensor(films) + 1
    weights = torch.tensor([0.5 ** ((3 - place) / 10.0) for place in range(4)])
    weights /= weights.sum()
    history = (model.user_tables.weight("history")[rows] * weights[:, None]).sum(0)
    recent = model.user_tables.weight("recent")[rows[1:]].mean(0)
    table = model.user_tables.weight("history_genres")
    genres = torch.zeros(24)
    for row, weight in zip(rows, weights, strict=True):
        links = model.links("genres")[row]
        genres += weight * table[links[links >= 0]].mean(0)
    assert torch.allclose(state[0], history, atol=1e-6)
    assert torch.allclose(state[1], recent, atol=1e-6)
    assert torch.allclose(state[2], genres, atol=1e-6)


def test_an_item_is_the_sum_of_what_its_features_pool(model: TwoTower) -> None:
    features = {
        "film": Ragged.from_rows([known([4])]),
        "genres": Ragged.from_rows([["Noir", "unheard of", "Comedy"]]),
        "year": Ragged.from_rows([[]]),
    }
    tables = model.item_tables
    genres = model.vocabulary("genres").rows(["Noir", "Comedy"])
    expected = (
        tables.weight("film")[5]
        + tables.weight("genres")[genres].mean(0)
        + tables.weight("year")[0]
        + tables.weight("popularity_band")[model.bands[5]]
    )
    found = model.embed_items(features)[0]
    assert torch.allclose(found, expected / expected.norm(), atol=1e-6)


def test_features_that_are_not_given_are_absent(model: TwoTower) -> None:
    film = {"film": Ragged.from_rows([known([4]), known([8])])}
    empty = Ragged.from_rows([[], []])
    words = Ragged.from_rows([[], []], dtype="string")
    whole = model.embed_items({**film, "genres": words, "year": empty})
    assert torch.equal(model.embed_items(film), whole)


def test_empty_batches_give_empty_results(model: TwoTower) -> None:
    encoded = model.encode([])
    assert encoded.embedding.shape == (0, 2, 24)
    assert encoded.warnings == ()
    none = {name: column.take(np.array([], np.int64)) for name, column in film_features().items()}
    assert model.embed_items(none).shape == (0, 24)


def test_item_features_of_other_lengths_are_refused(model: TwoTower) -> None:
    with pytest.raises(ValueError, match="feature year must have 2 rows, got 1"):
        model.embed_items(
            {"film": Ragged.from_rows([[1], [2]]), "year": Ragged.from_rows([[1990]])}
        )


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_rows_of_user_tables_and_sessions_are_written_in_place(
    attentive: TwoTower, precision: Precision
) -> None:
    tower = TwoTower(attentive.config).requires_grad_(requires_grad=False).eval()
    tower.load_state_dict(attentive.state_dict())
    if precision != "float32":
        tower = tower.quantized(precision)
    rows, values = torch.tensor([4, 2, 1, 3]), torch.linspace(-1, 1, 96).view(4, 24)
    films = [{"history": known([0, 2, 5])}]
    for table in ("history", "history_genres", "session"):
        before = tower.encode(films).user_state
        assert tower.update_rows(table, rows, values)
        assert not torch.equal(tower.encode(films).user_state, before)
    items = tower.embed_items(film_features())
    for other in ("film", "popularity_band", "unheard of"):
        assert not tower.update_rows(other, rows, values)
    assert torch.equal(tower.embed_items(film_features()), items)


def test_config_and_tensors_rebuild_the_model(model: TwoTower) -> None:
    again = build("two_tower", model.config.model_dump(mode="json"))
    again.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    assert isinstance(again, TwoTower)
    before, after = model.encode(users(6)), again.encode(users(6))
    assert torch.equal(before.embedding, after.embedding)
    assert torch.equal(model.embed_items(film_features()), again.embed_items(film_features()))


def test_gradients_reach_every_table() -> None:
    torch.manual_seed(0)
    made = TwoTower(config())
    made.vocabulary("film").fill(range(1000, 1000 + 3 * NUM_FILMS, 3))
    encoded = made.encode([{"history": known([1, 2])}, {}])
    items = made.embed_items(film_features())
    weights = torch.randn(2, NUM_FILMS)
    (encoded.embedding[:, 0] @ items.T * weights).sum().backward()
    tables: list[Tensor] = [
        *made.user_tables.parameters(),
        *made.item_tables.parameters(),
        made.user_head.weight,
    ]
    for parameter in tables:
        assert parameter.grad is not None
        assert torch.isfinite(parameter.grad).all()
        assert parameter.grad.any()


def test_recency_weights_halve_and_sum_to_one() -> None:
    weights = recency_weights(6, 2.0)
    assert weights.shape == (7, 6)
    assert weights[1].tolist() == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert torch.allclose(weights[1:].sum(1), torch.ones(6))
    assert weights[5, 2] / weights[5, 0] == pytest.approx(0.5)

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from silvershard.model.catalogue import Ragged, UserColumn
from silvershard.model.request import WeightedIds
from silvershard.model.schema import Schema, UserFeature
from silvershard.model.training_data import (
    Interactions,
    TrainingConfig,
    held_out,
    popularity_bands,
    prepare,
    users_of,
)

SCHEMA = Schema(
    user_features=(UserFeature(name="history", max_length=4),),
    item_features=(
        UserFeature(name="film", max_length=1),
        UserFeature(name="genres", dtype="string"),
    ),
    signals=("popularity",),
    heads=("rated", "liked"),
    tasks=("rated", "liked"),
)
FEATURES = {
    "film": Ragged.from_rows([[30], [10], [20], [40]]),
    "genres": Ragged.from_rows([["a", "b"], [], ["b"], ["c"]], dtype="string"),
}
SIGNALS = np.array([[0.0], [1.0], [2.0], [3.0]], dtype=np.float32)
SEEN = Interactions(
    user_ids=np.array([7, 7, 7, 7, 7, 9, 9]),
    item_ids=np.array([10, 20, 30, 40, 10, 20, 10]),
    ratings=np.array([4, 3, 5, 2, 4, 3.5, 4], dtype=np.float32),
)


def config(**changes: Any) -> TrainingConfig:
    return TrainingConfig(item="film", dim=8, ranker_share=0.2, **changes)


def test_the_model_knows_every_id_of_the_features() -> None:
    model, data = prepare(SCHEMA, FEATURES, SIGNALS, SEEN, config())
    assert model.config.max_history == 4
    assert data.item_rows.tolist() == [3, 1, 2, 4]
    assert model.vocabulary("genres").rows(["a", "b", "c", "d"]).min() == 0
    assert data.items.tolist() == [1, 2, 0, 3, 1, 2, 1]
    assert data.counts.tolist() == [1, 3, 2, 1]
    assert model.bands[data.item_rows].tolist() == [1, 3, 2, 1]


def test_the_genres_of_every_item_are_linked_to_its_row() -> None:
    model, data = prepare(SCHEMA, FEATURES, SIGNALS, SEEN, config())
    links = model.links("genres")[data.item_rows]
    rows = {name: int(model.vocabulary("genres").rows([name])[0]) for name in "abc"}
    assert links.tolist() == [[rows["a"], rows["b"]], [0, -1], [rows["b"], -1], [rows["c"], -1]]
    assert model.links("genres")[0].tolist() == [0, -1]


def test_the_latest_interactions_are_kept_for_the_reranker() -> None:
    _, data = prepare(SCHEMA, FEATURES, SIGNALS, SEEN, config())
    # A user with few interactions keeps all of them for the towers.
    assert data.tower_positions.tolist() == [1, 2, 3, 6]
    assert data.ranker_positions.tolist() == [4]


def test_without_a_share_the_reranker_learns_from_what_the_towers_learn() -> None:
    _, data = prepare(
        SCHEMA, FEATURES, SIGNALS, SEEN, config().model_copy(update={"ranker_share": 0.0})
    )
    assert data.tower_positions.tolist() == [1, 2, 3, 4, 6]
    assert data.ranker_positions.tolist() == data.tower_positions.tolist()


def test_ratings_decide_what_is_positive_for_a_head() -> None:
    _, data = prepare(SCHEMA, FEATURES, SIGNALS, SEEN, config())
    assert data.head_positive[:, 0].all()
    assert data.head_positive[:, 1].tolist() == [True, False, True, False, True, False, True]
    assert torch.equal(data.task_positive, data.head_positive)


def test_items_that_users_share_start_close_to_each_other() -> None:
    rng = np.random.default_rng(0)
    # Two groups of users and films that never meet.
    films = [rng.permutation(20)[:10] + 20 * (user % 2) for user in range(60)]
    seen = Interactions(
        np.repeat(np.arange(60), 10), np.concatenate(films), np.full(600, 5, np.float32)
    )
    features = {
        "film": Ragged.from_rows([[film] for film in range(40)]),
        "genres": Ragged.from_rows([[]] * 40, dtype="string"),
    }
    model, data = prepare(SCHEMA, features, np.zeros((40, 1), np.float32), seen, config())
    items = torch.nn.functional.normalize(
        model.item_tables.weight("film")[data.item_rows].detach(), dim=1
    )
    similarity = items @ items.T
    same = similarity[:20, :20].mean() + similarity[20:, 20:].mean()
    assert same > 4 * similarity[:20, 20:].abs().mean()


def test_signals_are_scaled_to_mean_zero_and_deviation_one() -> None:
    model, _ = prepare(SCHEMA, FEATURES, SIGNALS, SEEN, config())
    scaled = (torch.from_numpy(SIGNALS) - model.ranker.signal_mean) * model.ranker.signal_scale
    assert scaled.mean().item() == pytest.approx(0, abs=1e-6)
    assert scaled.std(correction=0).item() == pytest.approx(1)


def test_a_constant_signal_is_left_unscaled() -> None:
    model, _ = prepare(SCHEMA, FEATURES, np.ones((4, 1), np.float32), SEEN, config())
    assert model.ranker.signal_scale.tolist() == [1.0]


def test_held_out_users_have_their_whole_history() -> None:
    model, data = prepare(SCHEMA, FEATURES, SIGNALS, SEEN, config())
    following = Interactions(
        np.array([7, 8, 9]), np.array([20, 30, 40]), np.array([1, 2, 3], np.float32)
    )
    held = held_out(model, data, SEEN, following)
    assert held.lengths.tolist() == [5, 0, 2]
    assert held.targets.tolist() == [2, 0, 3]
    assert held.rows.tolist() == data.item_rows[data.items].tolist()
    assert held.seen.tolist() == [[0, 0, 0, 0, 0, 2, 2], data.items.tolist()]


def test_bands_rise_with_the_count_and_end_at_the_last() -> None:
    bands = popularity_bands(torch.tensor([0, 1, 3, 15, 10**6]), 8)
    assert bands.tolist() == [0, 1, 3, 6, 7]


@pytest.mark.parametrize(
    ("item_ids", "message"),
    [([10, 99], "must name items with features, got film 99"), ([10], "the same length")],
)
def test_interactions_without_items_are_refused(item_ids: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(
            SCHEMA,
            FEATURES,
            SIGNALS,
            Interactions(np.array([1, 1]), np.array(item_ids), np.ones(2, np.float32)),
            config(),
        )


def test_interactions_must_be_ordered_by_user() -> None:
    with pytest.raises(ValueError, match="user_ids must be ascending"):
        Interactions(np.array([2, 1]), np.array([10, 10]), np.ones(2, np.float32))


def test_users_with_one_interaction_each_cannot_train() -> None:
    with pytest.raises(ValueError, match="a user with at least two"):
        prepare(
            SCHEMA,
            FEATURES,
            SIGNALS,
            Interactions(np.array([1, 2]), np.array([10, 20]), np.ones(2, np.float32)),
            config(),
        )


def test_a_user_validates_once() -> None:
    model, data = prepare(SCHEMA, FEATURES, SIGNALS, SEEN, config())
    twice = Interactions(np.array([7, 7]), np.array([10, 20]), np.ones(2, np.float32))
    with pytest.raises(ValueError, match="at most one interaction per user"):
        held_out(model, data, SEEN, twice)


def test_a_history_that_the_schema_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="history must be a user feature of the schema, got 'h'"):
        prepare(SCHEMA, FEATURES, SIGNALS, SEEN, config(history="h"))


NUMBERS = UserFeature(name="age", kind="numbers", dtype="float", width=2)
FURTHER = SCHEMA.model_copy(
    update={
        "user_features": (
            *SCHEMA.user_features,
            UserFeature(name="tags", dtype="string"),
            NUMBERS,
            UserFeature(name="words", kind="text", dtype="string"),
        ),
        "item_features": (*SCHEMA.item_features, NUMBERS.model_copy(update={"name": "size"})),
    }
)
SIZED = {
    **FEATURES,
    "size": Ragged.from_rows([[1.0, 5.0], [], [3.0, 5.0], [5.0, 5.0]], dtype="float"),
}
USERS = np.unique(SEEN.user_ids)


def with_features(**columns: UserColumn) -> Interactions:
    return replace(SEEN, features=columns)


def tags(*rows: list[str]) -> UserColumn:
    weights = np.arange(1, 1 + sum(map(len, rows)), dtype=np.float32)
    return UserColumn(Ragged.from_rows(rows, dtype="string"), weights)


def ages(*rows: list[float]) -> UserColumn:
    return UserColumn(Ragged.from_rows(rows, dtype="float"))


def test_user_features_are_those_of_the_user_of_each_interaction() -> None:
    seen = with_features(tags=tags(["a", "b"], []), age=ages([1.0, 2.0], [3.0, 2.0]))
    model, data = prepare(FURTHER, SIZED, SIGNALS, seen, config(user_features=("age", "tags")))
    assert [one.name for one in model.config.user_ids] == ["tags"]
    assert model.user_features.vocabulary("tags").rows(["a", "b", "c"]).tolist()[2] == 0
    projection = model.user_features.numbers.projection("age")
    assert projection.mean.tolist() == [2.0, 2.0]
    assert projection.scale.tolist() == [1.0, 1.0]
    last = torch.tensor([len(SEEN.user_ids) - 1, 0])
    taken = data.users.take(last)
    assert sorted(taken) == ["numbers:age", "user_tags"]
    assert taken["user_tags"].lengths.tolist() == [1, 2]
    assert taken["user_tags"].weights.tolist() == [1.0, *np.array([1 / 3, 2 / 3], np.float32)]
    assert taken["numbers:age"].weights.tolist() == [1, 1, 0, 1, -1, 0]


def test_features_that_change_with_time_have_a_row_per_interaction() -> None:
    count = len(SEEN.user_ids)
    rows = np.arange(count, dtype=np.int64)[::-1].copy()
    column = ages(*([float(at), 0.0] for at in range(count)))
    seen = replace(SEEN, features={"age": column}, feature_rows=rows)
    model, data = prepare(FURTHER, SIZED, SIGNALS, seen, config(user_features=("age",)))
    inputs = data.users.take(torch.arange(count))["numbers:age"].weights.view(count, 3)[:, 1]
    assert (inputs.diff() < 0).all()
    alone = users_of(model, replace(seen, feature_rows=rows[::-1].copy())).rows
    assert alone.tolist() == list(range(count))


def test_numbers_of_items_are_standardised_by_those_that_have_them() -> None:
    model, _ = prepare(FURTHER, SIZED, SIGNALS, SEEN, config())
    projection = model.item_numbers.projection("size")
    assert projection.mean.tolist() == [3.0, 5.0]
    assert projection.scale.tolist() == pytest.approx([(3 / 8) ** 0.5, 1.0])
    assert [table.name for table in model.config.tables] == ["film", "genres"]


def test_held_out_users_have_the_features_that_come_with_them() -> None:
    seen = with_features(tags=tags(["a"], ["b"]))
    model, data = prepare(FURTHER, SIZED, SIGNALS, seen, config(user_features=("tags",)))
    following = Interactions(
        USERS, np.array([20, 40]), np.ones(2, np.float32), {"tags": tags(["b", "z"], [])}
    )
    held = held_out(model, data, seen, following)
    (known,) = model.user_features.vocabulary("tags").rows(["b"]).tolist()
    assert held.users["user_tags"].rows.tolist() == [known, 0]
    with pytest.raises(ValueError, match="interactions must have the user feature tags"):
        held_out(model, data, seen, replace(following, features={}))


def test_users_are_trained_on_the_ids_that_a_request_keeps() -> None:
    (short,) = (one for one in FURTHER.user_features if one.name == "tags")
    short = short.model_copy(update={"max_length": 2})
    schema = FURTHER.model_copy(update={"user_features": (*SCHEMA.user_features, short)})
    column = tags(["a", "b", "c", "d"], ["e"])
    assert column.weights is not None
    column.weights[2] = 0.0
    settings = config(user_features=("tags",))
    model, data = prepare(schema, SIZED, SIGNALS, with_features(tags=column), settings)
    assert model.config.user_ids[0].size == 3
    later = UserColumn(Ragged.from_rows([["e", "b", "c", "d"], ["e"]]), column.weights)
    following = Interactions(USERS, np.array([20, 40]), np.ones(2, np.float32), {"tags": later})
    held = held_out(model, data, SEEN, following)
    given = WeightedIds(["a", "b", "c", "d"], [1.0, 2.0, 0.0, 4.0])
    asked, warnings = model.user_features.of_requests(
        [schema.check_features({"tags": given}), schema.check_features({"tags": ["e"]})]
    )
    assert warnings == [[], []]
    trained = data.users.take(torch.tensor([0, len(SEEN.user_ids) - 1]))
    for found in (trained, held.users):
        for one, other in zip(found["user_tags"], asked["user_tags"], strict=True):
            assert torch.equal(one, other)


def test_without_further_features_there_are_none() -> None:
    _, data = prepare(SCHEMA, FEATURES, SIGNALS, SEEN, config())
    assert data.users.take(torch.tensor([0, 1])) == {}


@pytest.mark.parametrize(
    ("name", "column", "message"),
    [
        ("nobody", None, "user_features must name .*, which are tags, age, got 'nobody'"),
        ("words", None, "user_features must name .* got 'words'"),
        ("history", None, "user_features must name .* got 'history'"),
        ("tags", None, "interactions must have the user feature tags"),
        ("tags", ages([1.0, 1.0], []), "tags: must be object for dtype string, got float64"),
        ("age", tags(["a"], []), "age: must be float64 for dtype float, got object"),
        ("age", ages([1.0, 1.0], [2.0]), "age: must have 2 values or none, got 1 in row 1"),
        ("age", ages([1e39, 1.0], []), "age: position 0 must be a finite float32, got 1e"),
    ],
)
def test_wrong_user_features_are_named(name: str, column: UserColumn | None, message: str) -> None:
    seen = SEEN if column is None else with_features(**{name: column})
    with pytest.raises(ValueError, match=message):
        prepare(FURTHER, SIZED, SIGNALS, seen, config(user_features=(name,)))


@pytest.mark.parametrize(
    ("columns", "rows", "message"),
    [
        ({"tags": tags(["a"])}, None, "feature tags must have 2 rows, got 1"),
        ({"tags": tags(["a"]), "age": ages([], [])}, [0] * 7, "feature tags must have 2 rows"),
        ({"tags": tags(["a"])}, [0] * 6, r"feature_rows must be 7 rows in \[0, 1\), got 6"),
        ({"tags": tags(["a"])}, [0] * 6 + [1], r"feature_rows must be 7 rows in \[0, 1\)"),
    ],
)
def test_features_must_have_a_row_for_every_interaction(
    columns: dict[str, UserColumn], rows: list[int] | None, message: str
) -> None:
    places = None if rows is None else np.array(rows, dtype=np.int64)
    with pytest.raises(ValueError, match=message):
        replace(SEEN, features=columns, feature_rows=places)

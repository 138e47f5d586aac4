from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pytest
import torch

from silvershard.cluster import Coverage, Query, RequestRefused, Result
from silvershard.deploy import evaluate, recipe
from silvershard.deploy.config import load
from silvershard.deploy.errors import CommandError
from silvershard.deploy.state import StateDir
from silvershard.model.counts import Counts
from silvershard.model.request import Request
from silvershard.shard.load import load_retriever


class Setup:
    def __init__(self, root: Path, films: Path, **options: object) -> None:
        config = load(
            None,
            environ={},
            options={
                "training.steps": 8,
                "training.ranker_steps": 4,
                "training.dim": 16,
                "index.clusters": 16,
                **options,
            },
        )
        state = StateDir(root)
        self.prepared = recipe.prepare(config, data=films, environ={}, report=lambda _: None)
        recipe.train_model(state, config, self.prepared, progress=False)
        loaded = recipe.load_model(state.model_dir)
        self.snapshot = recipe.publish(state, config, self.prepared, loaded).path
        self.retriever, _ = load_retriever(self.snapshot)


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory, films_folder: Path) -> Setup:
    return Setup(tmp_path_factory.mktemp("state"), films_folder)


class OneProcess:
    """A client that answers from the module in this process."""

    retriever: Any
    asked: list[Query]
    sizes: list[int]
    refusal: RequestRefused | None = None

    def __init__(self, address: str, **_: object) -> None:
        assert address == "here"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def retrieve_batch(self, queries: Sequence[Query]) -> list[Result | RequestRefused]:
        if self.refusal is not None:
            return [self.refusal] * len(queries)
        self.asked += queries
        self.sizes.append(len(queries))
        answers = self.retriever(
            [
                Request(
                    features=query.features,
                    k=query.k,
                    exclude_ids=query.exclude_ids,
                    nprobe=query.nprobe,
                    value=query.value,
                )
                for query in queries
            ]
        )
        return [
            Result(
                item_ids=answer.item_ids.numpy(),
                scores=answer.scores.numpy(),
                task_scores={},
                fields={},
                coverage=Coverage(
                    documents=1.0,
                    shards_total=1,
                    shards_full=1,
                    shards_failed=0,
                    reasons=(),
                    shards=(),
                ),
                model="movielens",
                generation=1,
                content_hash="",
                shard_map_version=1,
                plan=str(answer.plan),
                exhausted=False,
                counts=Counts(0, 0, None, 0, 0),
                timings_us={"ann": 5 + at},
            )
            for at, answer in enumerate(answers)
        ]


@pytest.fixture
def client(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> type[OneProcess]:
    monkeypatch.setattr(OneProcess, "retriever", setup.retriever, raising=False)
    monkeypatch.setattr(OneProcess, "asked", [], raising=False)
    monkeypatch.setattr(OneProcess, "sizes", [], raising=False)
    monkeypatch.setattr(evaluate, "Client", OneProcess)
    return OneProcess


def test_only_users_with_a_held_out_item_are_tested(setup: Setup) -> None:
    users = evaluate.tested_users(setup.prepared)
    assert len(users.histories) == len(users.held_out) == 80
    data: Any = setup.prepared.data
    last = data.rated_movie_ids[data.user_ids == data.user_ids[0]]
    assert users.held_out[0] == [last[-1]]
    assert users.ratings[0] == [data.ratings[data.user_ids == data.user_ids[0]][-1]]
    assert users.histories[0] == last[:-1].tolist()
    assert users.features[0] == {"history": users.histories[0]}
    assert evaluate.cold_users(setup.prepared).histories == []


def test_positives_are_the_held_out_items_that_were_rated_high_enough() -> None:
    users = evaluate.Tested(
        [{}] * 3, [[]] * 3, [[1, 2], [3], [4, 5]], [[4.0, 5.0], [3.5], [2.0, 4.5]]
    )
    rows, wanted = users.positive(4.0)
    assert rows.tolist() == [0, 2]
    assert wanted == [[1, 2], [5]]
    assert users.positive(-np.inf)[1] == users.held_out
    assert users.positive(6.0)[1] == []


def test_an_evaluation_has_everything_the_tables_show(
    setup: Setup, client: type[OneProcess]
) -> None:
    found = evaluate.evaluate(
        setup.prepared, setup.snapshot, "here", max_requests=11, min_rating={"liked": 4.0}
    )
    assert max(client.sizes) == 11
    assert [row.name for row in found.rows] == [
        "popularity",
        "brute force fp32, no reranker",
        "silvershard, all clusters",
        "silvershard",
    ]
    for row in found.rows:
        for k in evaluate.DEPTHS:
            assert row.hit_rate[k].shape == row.ndcg[k].shape == row.recall[k].shape == (80,)
            assert (row.ndcg[k] <= row.hit_rate[k]).all()
            # One item of each user is held out.
            assert (row.hit_rate[k] == row.recall[k]).all()
        assert (row.hit_rate[10] <= row.hit_rate[20]).all()
        assert (row.hit_rate[20] <= row.hit_rate[100]).all()
        assert 0 < row.coverage[10] <= row.coverage[20] <= row.coverage[100] <= 1
    assert (found.users, found.held_out) == (80, 80)
    assert found.split == setup.prepared.split.summary
    assert found.cold == ()
    assert found.index_quality.depth == 400
    assert found.index_quality.probes * 8 <= found.index_quality.clusters
    assert found.index_quality.recall_deep >= 0.999
    assert 0.5 < found.index_quality.overlap <= 1.0


def test_heads_and_tasks_are_judged_alone_on_their_own_positives(
    setup: Setup, client: type[OneProcess]
) -> None:
    found = evaluate.evaluate(setup.prepared, setup.snapshot, "here", min_rating={"liked": 4.0})
    assert {query.value for query in client.asked} == {"", "rated", "liked"}
    assert [one.task for one in found.tasks] == ["rated", "liked"]
    data: Any = setup.prepared.data
    high = data.ratings[setup.prepared.split.test_rows] >= 4.0
    assert 0 < high.sum() < 80
    for one, users in zip(found.tasks, (80, int(high.sum())), strict=True):
        assert [row.name for row in one.rows] == ["head alone, brute force", "task alone", "value"]
        assert {row.users for row in one.rows} == {users}
    # The served value is the row of the main table, of the users that count.
    assert np.array_equal(found.tasks[1].rows[-1].ndcg[10], found.rows[-1].ndcg[10][high])
    answers = setup.retriever(
        [
            Request(features=query.features, k=100, exclude_ids=query.exclude_ids, value="liked")
            for query in client.asked[:80]
        ]
    )
    ranked = np.stack([answer.item_ids.numpy() for answer in answers])
    wanted = setup.prepared.split.test_item_ids
    assert (
        found.tasks[1].rows[1].hit_rate[10] == (ranked[:, :10] == wanted[:, None]).any(1)[high]
    ).all()


@pytest.fixture(scope="module")
def temporal(tmp_path_factory: pytest.TempPathFactory, films_folder: Path) -> Setup:
    shares = {"training.test_share": 0.3, "training.validation_share": 0.1}
    return Setup(
        tmp_path_factory.mktemp("temporal"),
        films_folder,
        **{"training.split": "temporal", **shares},
    )


def test_new_users_are_judged_apart(temporal: Setup, client: type[OneProcess]) -> None:
    prepared = temporal.prepared
    client.retriever = temporal.retriever
    found = evaluate.evaluate(prepared, temporal.snapshot, "here")
    cold = int(prepared.split.cold.sum())
    assert cold > 0
    assert found.users == int((prepared.split.test_rows >= 0).sum())
    assert found.held_out > found.users
    assert [(row.name, row.users) for row in found.cold] == [
        ("popularity", cold),
        ("silvershard", cold),
    ]
    asked = [query for query in client.asked if not query.features["history"]]
    assert len(asked) == cold
    assert found.split.startswith("temporal: ")
    # Several items of a user are held out, so that recall and hit rate are two things.
    assert (found.rows[-1].recall[100] <= found.rows[-1].hit_rate[100]).all()
    assert (found.rows[-1].recall[100] < found.rows[-1].hit_rate[100]).any()


def test_without_tested_users_there_is_no_evaluation(setup: Setup) -> None:
    split = replace(setup.prepared.split, test_rows=np.full(80, -1))
    with pytest.raises(CommandError, match="no user is tested"):
        evaluate.evaluate(setup.prepared._replace(split=split), setup.snapshot, "here")


def test_seen_items_are_excluded_and_all_clusters_probed_when_asked(
    setup: Setup, client: type[OneProcess]
) -> None:
    users = evaluate.tested_users(setup.prepared)
    served = evaluate.serve("here", users, "", batch=7, nprobe=16)
    for history, ranked, query in zip(users.histories, served.item_ids, client.asked, strict=True):
        assert not set(history) & set(ranked.tolist())
        assert list(query.exclude_ids) == history
        assert query.nprobe == 16
    assert max(client.sizes) == 7
    assert served.plan.startswith("all_pages(probes=16,")
    assert served.coverage == 1.0
    assert served.timings_us == {"ann": 8}


def test_a_refused_request_ends_the_evaluation(setup: Setup, client: type[OneProcess]) -> None:
    client.refusal = RequestRefused("UNAVAILABLE", "no shard answers")
    try:
        with pytest.raises(CommandError, match="no shard answers"):
            evaluate.serve("here", evaluate.tested_users(setup.prepared), "")
    finally:
        client.refusal = None


def test_popularity_ranks_unseen_items_by_training_counts(setup: Setup) -> None:
    users = evaluate.tested_users(setup.prepared)
    ranked = evaluate._popular(setup.prepared, users)
    counts = dict(
        zip(
            setup.prepared.catalogue.item_ids.tolist(),
            setup.prepared.popularity.counts.tolist(),
            strict=True,
        )
    )
    for history, row in zip(users.histories, ranked, strict=True):
        kept = row[row >= 0].tolist()
        assert not set(history) & set(kept)
        expected = sorted(set(counts) - set(history), key=lambda item: (-counts[item], item))
        assert kept == expected[: len(kept)]
        assert len(kept) == evaluate.LONG


def test_brute_force_is_the_best_product_over_the_heads(setup: Setup) -> None:
    items = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [1.0, 0.0]])
    queries = torch.tensor([[[1.0, 0.0], [0.0, 0.9]]])
    users = evaluate.Tested([{}], [[30]], [[10]], [[4.0]])
    ids = np.array([40, 20, 30, 10])
    ranked = evaluate._brute_force(items, queries, ids, users)
    assert ranked[0, :4].tolist() == [10, 40, 20, -1]


def test_rows_to_audit_are_spread_over_all(setup: Setup) -> None:
    assert evaluate._spread(3, 100) == [0, 1, 2]
    assert evaluate._spread(1000, 4) == [0, 250, 500, 750]

import json
from collections.abc import Sequence
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
    def __init__(self, root: Path, films: Path) -> None:
        config = load(
            None,
            environ={},
            options={
                "training.steps": 8,
                "training.ranker_steps": 4,
                "training.dim": 16,
                "index.clusters": 16,
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
    assert users.held_out[0] == last[-1]
    assert users.histories[0] == last[:-1].tolist()


def test_an_evaluation_has_everything_the_table_shows(
    setup: Setup, client: type[OneProcess]
) -> None:
    found = evaluate.evaluate(setup.prepared, setup.snapshot, "here", max_requests=11)
    assert max(client.sizes) == 11
    assert [row.name for row in found.rows] == [
        "popularity",
        "brute force fp32, no reranker",
        "silvershard, all clusters",
        "silvershard",
    ]
    for row in found.rows:
        assert row.hit_rate.shape == row.ndcg.shape == row.recall.shape == (80,)
        assert (row.ndcg <= row.hit_rate).all()
        assert (row.hit_rate <= row.recall).all()
    assert found.users == 80
    assert found.index_quality.depth == 400
    assert found.index_quality.probes * 8 <= found.index_quality.clusters
    assert found.index_quality.recall_deep >= 0.999
    assert 0.5 < found.index_quality.overlap <= 1.0
    document = evaluate.quality_document(found)
    assert document["table"]["silvershard"]["recall_at_100"] == round(
        float(found.rows[-1].recall.mean()), 6
    )
    assert set(document["scan_refine_recall"]) == {"at_400", "at_100"}
    json.dumps(document, allow_nan=False)


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
    users = evaluate.Tested([[30]], np.array([10]))
    ids = np.array([40, 20, 30, 10])
    ranked = evaluate._brute_force(items, queries, ids, users)
    assert ranked[0, :4].tolist() == [10, 40, 20, -1]


def test_rows_to_audit_are_spread_over_all(setup: Setup) -> None:
    assert evaluate._spread(3, 100) == [0, 1, 2]
    assert evaluate._spread(1000, 4) == [0, 250, 500, 750]

"""The verb ``demo``: from a data set to recommended films on a two-shard cluster."""

import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from silvershard.cluster import Client, Query, Result
from silvershard.deploy import ask, evaluate, launch, operate, quality_report, recipe
from silvershard.deploy.access import dialer_within
from silvershard.deploy.config import Config
from silvershard.deploy.errors import CommandError
from silvershard.deploy.movielens_users import before
from silvershard.deploy.operate import say
from silvershard.deploy.publishing import num_clusters
from silvershard.deploy.recipe import Prepared
from silvershard.deploy.state import ClusterRecord, StateDir
from silvershard.deploy.tables import table
from silvershard.model.catalogue import NULL_INT
from silvershard.model.request import FeatureValues

FILTER = "genre:Comedy AND NOT genre:Horror AND year >= 1990"
SHOWN = 10
_FIELDS = ("title", "year", "genres")
_WARM_UP = 20
"""Questions asked before those whose stage times are shown."""


class Shown(NamedTuple):
    """The user that the demo shows, as the test split sees them."""

    user: int
    history: list[int]
    """Everything before the held-out film, oldest first."""
    held_out: int
    features: dict[str, FeatureValues]
    """Beside the history."""


@contextmanager
def state_directory(given: Path | None) -> Iterator[StateDir]:
    """Give a state directory: the one that was named, or a temporary one that is removed."""
    if given is not None:
        yield StateDir(given)
        return
    temporary = Path(tempfile.mkdtemp(prefix="silvershard-demo-"))
    try:
        yield StateDir(temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def run(
    state: StateDir,
    config: Config,
    *,
    data: Path | None,
    user: int | None,
    environ: Mapping[str, str],
) -> dict[str, Any]:
    """Train, publish, serve, ask and measure; return what the last line of output says."""
    began_s = time.perf_counter()
    seconds: dict[str, float] = {}
    state.create()
    with state.working("demo"), _timed(seconds, "train"):
        prepared = recipe.prepare(config, data=data, environ=environ, report=say)
        # A user that is not there should be said before the minute of training.
        shown = choose_user(prepared, user)
        trained = recipe.train_model(state, config, prepared)
    _step("trained", seconds["train"], f"user tower, item tower and reranker, {_learned(trained)}")
    with state.working("demo"), _timed(seconds, "publish"):
        published = recipe.publish(state, config, prepared, recipe.load_model(state.model_dir))
    _step(
        "published",
        seconds["publish"],
        f"generation {published.generation}, {published.documents:,} films in "
        f"{num_clusters(config, published.documents)} clusters",
    )
    record, seconds["up"] = operate.start(
        state, config, generation=published.generation, detached=False
    )
    try:
        _step(
            "serving",
            seconds["up"],
            f"{len(record.shards)} shard actors on Ray, router at {record.address}",
        )
        documents, answers = _show(record, prepared, shown)
        with _timed(seconds, "evaluate"):
            evaluation = evaluate.evaluate(
                prepared,
                published.path,
                record.address,
                max_requests=config.admission.queue,
                min_rating=config.training.min_rating,
                dialer=dialer_within(record),
            )
        say("\n" + quality_report.render(evaluation))
    finally:
        with _timed(seconds, "down"):
            launch.stop(state, timeout_s=config.runtime.stop_timeout_s)
    wall_s = time.perf_counter() - began_s
    _step("done", wall_s, "every process has ended")
    return {
        "wall_s": round(wall_s, 1),
        "seconds": {name: round(spent, 1) for name, spent in seconds.items()},
        "data": prepared.source.model_dump(),
        "shards": len(record.shards),
        "generation": answers[0].generation,
        "coverage": min(
            evaluation.served.coverage, *(answer.coverage.documents for answer in answers)
        ),
        "quality": quality_report.document(evaluation),
        "timings_us": {
            "query": documents[0]["timings_us"],
            "filtered_query": documents[1]["timings_us"],
            "batch_median": ask.in_order(evaluation.served.timings_us),
        },
        "plan": evaluation.served.plan,
    }


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    began_s = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = time.perf_counter() - began_s


def _step(name: str, seconds: float, text: str) -> None:
    say(f"{name:<10} {seconds:6.1f} s  {text}")


def _learned(trained: Any) -> str:
    return f"validation NDCG@10 {max(trained.tower_ndcg, trained.ranker_ndcg):.4f}"


def choose_user(prepared: Prepared, wanted: int | None) -> Shown:
    """Return the user to show: the one asked for, or the first whose history has median length.

    Raises:
        CommandError: if the user asked for has nothing held out, no history, or does not exist.
    """
    split = prepared.split
    tested = np.flatnonzero(split.test_rows >= 0)
    if not len(tested):
        raise CommandError(f"no user is tested, {split.summary}")
    if wanted is None:
        lengths = split.test_histories.lengths[tested]
        middle = np.sort(lengths)[(len(lengths) - 1) // 2]
        row = int(tested[np.flatnonzero(lengths == middle)[0]])
    else:
        found = tested[split.user_ids[tested] == wanted]
        if not len(found):
            raise CommandError(
                f"--user {wanted} is not a user of the data set with a history and a film that is "
                f"held out; there are {len(tested):,}, the first is {split.user_ids[tested[0]]}"
            )
        row = int(found[0])
    return Shown(
        user=int(split.user_ids[row]),
        history=split.test_histories.row(row).tolist(),
        held_out=int(split.test_item_ids[row]),
        features=recipe.user_features(prepared, before(prepared.data, split.test_rows[[row]]))[0],
    )


def _show(
    record: ClusterRecord, prepared: Prepared, shown: Shown
) -> tuple[list[dict[str, Any]], list[Result]]:
    """Ask for one user, without and with a filter, and print what comes back."""
    say(f"\nUser {shown.user} rated {len(shown.history)} films; the last ones were")
    say(films_table(prepared, shown.history[-SHOWN:]))
    documents, answers = [], []
    asker = ask.Asker(shown.history, shown.history, [], shown.features)
    with Client(record.address, dialer=dialer_within(record)) as client:
        for text in ("", FILTER):
            query = Query(
                features={"history": asker.history, **asker.features},
                k=SHOWN,
                filter=text,
                exclude_ids=asker.exclude,
                return_fields=_FIELDS,
            )
            for _ in range(_WARM_UP):
                client.retrieve(query)
            answer = client.retrieve(query)
            document = ask.described(answer, asker)
            say(f"\nRecommended, filter {text}" if text else "\nRecommended")
            say(ask.render(document))
            documents.append(document)
            answers.append(answer)
        _say_held_out(client, prepared, shown)
    return documents, answers


def _say_held_out(client: Client, prepared: Prepared, shown: Shown) -> None:
    """Say at which rank the film that the user watched next comes."""
    answer = client.retrieve(
        Query(
            features={"history": shown.history, **shown.features},
            k=evaluate.LONG,
            exclude_ids=shown.history,
            return_task_scores=False,
        )
    )
    ranks = np.flatnonzero(answer.item_ids == shown.held_out)
    where = f"is at rank {ranks[0] + 1}" if len(ranks) else f"is not among the {evaluate.LONG} best"
    title = films(prepared, [shown.held_out])[0][1]
    say(f"\nWhat user {shown.user} really rated next, {title}, {where}")


def films(prepared: Prepared, item_ids: list[int]) -> list[tuple[str, str, str, str]]:
    """Return id, title, year and genres of films."""
    fields = prepared.catalogue.fields
    rows = prepared.data.movie_rows(np.array(item_ids, dtype=np.int64))
    described = []
    for item, row in zip(item_ids, rows.tolist(), strict=True):
        year = int(fields["year"][row])
        described.append(
            (
                str(item),
                str(fields["title"][row]),
                "" if year == NULL_INT else str(year),
                str(fields["genres"][row]).replace("|", ", "),
            )
        )
    return described


def films_table(prepared: Prepared, item_ids: list[int]) -> str:
    """Return films as a table, the most recent first."""
    rows = [
        (title, year, genres, item)
        for item, title, year, genres in reversed(films(prepared, item_ids))
    ]
    return table(("title", "year", "genres", "id"), rows, max_width=38)

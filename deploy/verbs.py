"""The verbs of the command line, and how each of them ends.

A command prints its answer on standard output and, if it fails, one line on standard error. Its
exit code: 0 done, 1 failed, 2 wrong usage, 3 degraded, 4 refused by a safety check, 5 timed out.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from silvershard.deploy import (
    bench,
    change,
    chaos_verb,
    doctor_verb,
    generation_verbs,
    ingest,
    node_verbs,
    plan_verb,
    scale_verbs,
    token_verbs,
)
from silvershard.deploy.access import access_options, dialer_of
from silvershard.deploy.arguments import (
    generation_number,
    load_settings,
    new_log_option,
    parents,
    query_options,
    ray_option,
    reporter,
    serving_options,
    several_hosts_options,
    show,
    state_of,
)
from silvershard.deploy.cluster_size import in_force
from silvershard.deploy.config import Config, to_yaml
from silvershard.deploy.errors import CommandError, ExitCode
from silvershard.deploy.hosts import hosts_of
from silvershard.deploy.state import StateDir
from silvershard.shard.errors import ConfigError, DeadlineExceeded, RemoteError, RetrievalError

_Change = Callable[[argparse.Namespace, Callable[[], str]], dict[str, Any]]
"""A verb that changes items, given its options and how to find the router."""
_Render = Callable[[dict[str, Any]], str]
"""Returns what it answered for people."""

_INTERRUPTED, _TERMINATED = 130, 143
_REFUSALS = {
    "INVALID_ARGUMENT": ExitCode.USAGE,
    "NOT_FOUND": ExitCode.USAGE,
    "DEADLINE_EXCEEDED": ExitCode.TIMED_OUT,
}


class _Terminated(BaseException):
    """SIGTERM arrived: whatever is being done is undone in order."""


def _arguments() -> argparse.ArgumentParser:
    shared = parents()
    state, config, output, timeout = shared
    parser = argparse.ArgumentParser(
        prog="silvershard",
        description="Sharded retrieval served as one PyTorch model.",
        epilog="exit codes: 0 done, 1 failed, 2 wrong usage, 3 degraded, 4 refused, 5 timed out",
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(
        name: str,
        text: str,
        run: Callable[[argparse.Namespace], int],
        *options: argparse.ArgumentParser,
    ) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=text, description=text, parents=[*options, output])
        added.set_defaults(run=run)
        return added

    data: dict[str, Any] = {
        "type": Path,
        "metavar": "PATH",
        "help": "MovieLens folder or zip (default: $SILVERSHARD_DATA, a download, or generated)",
    }
    demo = verb(
        "demo",
        "train, publish, serve on two shards, ask and measure",
        _demo,
        state,
        config,
        timeout,
    )
    demo.add_argument("--data", **data)
    demo.add_argument("--user", type=int, metavar="ID", help="user to show")
    serving_options(demo)
    train = verb("train", "train a model on MovieLens", _train, state, config)
    train.add_argument(
        "config_file", nargs="?", type=Path, metavar="CONFIG", help="the same as --config"
    )
    train.add_argument("--data", **data)
    train.add_argument(
        "--resume", action="store_true", help="go on from the checkpoint of a stopped training"
    )
    text = "write the trained model and its items as a new generation"
    publish = verb("publish", text, _publish, state, config)
    publish.add_argument("--data", **data)
    publish.add_argument(
        "--recluster",
        action="store_true",
        help="instead: the live generation as the update log left it, in new clusters",
    )
    publish.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        help="model that `train` left (default DIR/model of the state directory; with --recluster "
        "that of the live generation)",
    )
    publish.add_argument(
        "--data-as-of",
        metavar="start|now|POSITIONS",
        help="what the data hold of the update log, the rest of which is replayed: nothing "
        "(default), all, or as far as `silvershard freshness` said when they were exported",
    )
    publish.add_argument(
        "--activate", action="store_true", help="make it live in the running cluster then"
    )
    text = "start a cluster on this machine, or on several hosts, and keep it running"
    up = verb("up", text, _up, state, config, timeout)
    up.add_argument(
        "--generation",
        type=generation_number,
        metavar="N|latest",
        help="what to serve (default what was live last, else latest)",
    )
    up.add_argument(
        "--foreground",
        action="store_true",
        help="run until SIGTERM, Ctrl-C or `silvershard down`, for containers and systemd",
    )
    serving_options(up)
    several_hosts_options(up)
    new_log_option(publish)
    new_log_option(up)
    text = "stop the cluster and wait until its last process is gone"
    ray_option(verb("down", text, _down, state, config, timeout))
    doctor_verb.add_verb(verb, state, config)
    verb("status", "say what runs; exit code 3 if it is degraded", _status, state)
    query = verb("query", "ask a running cluster", _query, state, timeout)
    query_options(query)
    access_options(query)

    for module in (change, ingest):

        def change_verb(
            name: str, text: str, run: _Change, render: _Render = module.render
        ) -> argparse.ArgumentParser:
            return verb(name, text, functools.partial(_changed, run, render), state, timeout)

        module.add_options(change_verb)
    generation_verbs.add_verbs(verb, shared)
    scale_verbs.add_verbs(verb, shared)
    node_verbs.add_verbs(verb, shared)
    bench.add_verbs(verb, shared)
    plan_verb.add_verb(verb, shared)
    chaos_verb.add_verb(verb, shared)
    token_verbs.add_verbs(verb, shared)
    text = "ask a running cluster the requests its generation was published with, and compare"
    golden = verb("golden", text, _golden, state, timeout)
    golden.add_argument("--address", default="", metavar="HOST:PORT", help="router to ask")
    access_options(golden)
    text = "measure a running cluster on the held-out interactions of its data set"
    evaluate = verb("evaluate", text, _evaluate, state, config)
    evaluate.add_argument("--data", **data)
    text = "show the settings in force, or their JSON schema"
    settings = verb("config", text, _config, state, config)
    settings.add_argument("what", choices=("show", "schema"))
    verb("version", "print the version", _version)
    return parser


def _demo(options: argparse.Namespace) -> int:
    from silvershard.deploy import demo

    with demo.state_directory(options.state) as state:
        config = load_settings(
            options,
            state,
            **{
                "listen.port": None if options.listen else 0,
                "runtime.start_timeout_s": options.timeout,
            },
        ).config
        quiet = options.output == "json"
        with contextlib.redirect_stdout(sys.stderr) if quiet else contextlib.nullcontext():
            document = demo.run(
                state, config, data=options.data, user=options.user, environ=os.environ
            )
    print(json.dumps(document, ensure_ascii=False))
    return ExitCode.OK if document["coverage"] == 1.0 else ExitCode.DEGRADED


def _train(options: argparse.Namespace) -> int:
    from silvershard.deploy import recipe

    if options.config_file and options.config:
        raise CommandError("CONFIG and --config are the same: give one of them", ExitCode.USAGE)
    options.config = options.config_file or options.config
    state = state_of(options)
    config = load_settings(options, state).config
    with state.working("train"):
        prepared = recipe.prepare(config, data=options.data, report=reporter(options))
        trained = recipe.train_model(state, config, prepared, resume=options.resume)
    document = {
        "model": str(state.model_dir),
        "log": str(state.training_dir / "log.csv"),
        "seconds": round(trained.seconds, 1),
        "tower_ndcg_at_10": recipe.finite(trained.tower_ndcg),
        "ranker_ndcg_at_10": recipe.finite(trained.ranker_ndcg),
        "data": prepared.source.model_dump(),
    }
    show(
        options,
        document,
        lambda: (
            f"trained in {trained.seconds:.1f} s, validation NDCG@10 {trained.ranker_ndcg:.4f}: "
            f"{state.model_dir}\nnext: silvershard publish"
        ),
    )
    return ExitCode.OK


def _publish(options: argparse.Namespace) -> int:
    from silvershard.deploy import activate, log_cut, recipe, recluster

    if options.recluster and (options.data or options.data_as_of):
        raise CommandError(
            "--recluster reads no data: leave --data and --data-as-of out", ExitCode.USAGE
        )
    state = state_of(options)
    # A generation must have partitions for as many shards as the cluster was scaled to.
    config = in_force(load_settings(options, state).config, state.control.read().scaled)
    report = reporter(options)
    if options.activate:
        # What cannot be done in the end should be said before the work.
        activate.running(state)
    with state.working("publish"):
        if options.new_log:
            _leave_log(options, state, config)
        if options.recluster:
            published = recluster.republish(state, config, report, model=options.model)
        else:
            at = log_cut.cut_of_data(state, config, options.data_as_of or log_cut.START)
            loaded = recipe.load_model(options.model or state.model_dir)
            source = loaded.description.data.path
            data = options.data or (Path(source) if source else None)
            prepared = recipe.prepare(
                config, data=data, report=report, training=loaded.description.training
            )
            published = recipe.publish(state, config, prepared, loaded, at)
    document = recipe.describe_published(published)
    next_step = f"silvershard activate {published.generation}, or silvershard up"
    done = f"published generation {published.generation}, {published.documents:,} items"
    if options.activate:
        report(f"{done}: {published.path}")
        document["activated"] = activate.activate(
            state,
            config,
            published.generation,
            timeout_s=config.swap.timeout_s,
            report=report,
        )
        show(options, document, lambda: activate.render_done(document["activated"]))
    else:
        show(options, document, lambda: f"{done}: {published.path}\nnext: {next_step}")
    return ExitCode.OK


def _up(options: argparse.Namespace) -> int:
    from silvershard.deploy import foreground, operate

    state = state_of(options)
    given = {"runtime.start_timeout_s": options.timeout, "runtime.routers": options.routers}
    config = load_settings(options, state, **given).config
    if options.new_log:
        _leave_log(options, state, config)
    hosts = hosts_of(config.hosts, options.hosts)
    if hosts:
        if options.foreground:
            options.wrong_usage("--foreground is for a single machine: Ray keeps several hosts up")
        document = operate.up_hosts(
            state,
            config,
            hosts,
            generation=options.generation,
            ray=options.ray,
            routers=options.routers,
            report=reporter(options),
        )
        show(options, document, lambda: operate.render_cluster(document))
        return ExitCode.OK
    if options.foreground:

        def ready(document: dict[str, Any]) -> None:
            show(options, document, lambda: operate.render_cluster(document))
            sys.stdout.flush()

        return foreground.run(state, config, generation=options.generation, ready=ready)
    document = operate.up(state, config, generation=options.generation)
    show(options, document, lambda: operate.render_cluster(document))
    return ExitCode.OK


def _leave_log(options: argparse.Namespace, state: StateDir, config: Config) -> None:
    from silvershard.deploy import state_log

    report = reporter(options)
    for line in state_log.leave_log(state, config):
        report(line)


def _down(options: argparse.Namespace) -> int:
    from silvershard.deploy import operate

    state = state_of(options)
    config = load_settings(options, state).config
    document = operate.down(
        state, timeout_s=options.timeout or config.runtime.stop_timeout_s, ray=options.ray
    )
    show(options, document, lambda: operate.render_down(document, state))
    return ExitCode.DEGRADED if document["unreachable"] else ExitCode.OK


def _status(options: argparse.Namespace) -> int:
    from silvershard.deploy import operate

    document, code = operate.status(state_of(options))
    show(options, document, lambda: operate.render_cluster(document))
    return code


def _query(options: argparse.Namespace) -> int:
    from silvershard.cluster import Query
    from silvershard.deploy import ask

    if options.user is None and options.history is None and options.text is None:
        options.wrong_usage("one of --user, --history and --text is required")
    state = state_of(options)
    address = ask.address_of(state, options.address)
    asker = ask.asker_of(
        state,
        user=options.user,
        history=options.history,
        include_seen=options.include_seen,
        features=ask.parse_features(options.feature),
        text=options.text,
    )
    result = ask.ask(
        address,
        Query(
            features=asker.request_features,
            k=options.k,
            filter=options.filter,
            value=options.value,
            params=ask.parse_params(options.param),
            exclude_ids=asker.exclude,
            nprobe=options.nprobe,
            semantic_k=options.semantic_k,
            exact=options.exact,
            plan=options.plan,
            min_coverage=options.min_coverage,
            return_fields=[name for name in options.fields.split(",") if name],
        ),
        timeout_s=options.timeout or 10.0,
        dialer=dialer_of(options, state),
    )
    document = ask.described(result, asker)
    show(options, document, lambda: ask.render(document))
    return ExitCode.DEGRADED if result.coverage.reasons else ExitCode.OK


def _changed(run: _Change, render: _Render, options: argparse.Namespace) -> int:
    from silvershard.deploy import ask

    document = run(options, lambda: ask.address_of(state_of(options), options.address))
    show(options, document, lambda: render(document))
    return ExitCode.DEGRADED if document.get("rejected") else ExitCode.OK


def _golden(options: argparse.Namespace) -> int:
    from silvershard.deploy import ask, golden

    state = state_of(options)
    address = ask.address_of(state, options.address)
    document = golden.check(
        state, address, timeout_s=options.timeout or 10.0, dialer=dialer_of(options, state)
    )
    show(options, document, lambda: golden.render(document))
    return ExitCode.FAILED if document["differences"] else ExitCode.OK


def _evaluate(options: argparse.Namespace) -> int:
    from silvershard.deploy import quality_report

    state = state_of(options)
    config = load_settings(options, state).config
    found = quality_report.measure(state, config, data=options.data, report=reporter(options))
    show(options, quality_report.document(found), lambda: quality_report.render(found))
    return ExitCode.OK if found.served.coverage == 1.0 else ExitCode.DEGRADED


def _config(options: argparse.Namespace) -> int:
    if options.what == "schema":
        print(json.dumps(Config.model_json_schema(), indent=1))
        return ExitCode.OK
    loaded = load_settings(options, state_of(options))
    show(options, loaded.config.model_dump(mode="json"), lambda: to_yaml(loaded).rstrip())
    return ExitCode.OK


def _version(options: argparse.Namespace) -> int:
    version = importlib.metadata.version("silvershard")
    show(options, {"version": version}, lambda: f"silvershard {version}")
    return ExitCode.OK


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise _Terminated


def run(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    options = _arguments().parse_args(argv)
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        with warnings.catch_warnings():
            # Warnings of libraries are for those who develop this program, not for its users.
            if not sys.warnoptions:
                warnings.simplefilter("ignore")
                logging.disable(logging.WARNING)
            code = int(options.run(options))
        sys.stdout.flush()
        return code
    except CommandError as error:
        return _fail(str(error), error.exit_code)
    except ConfigError as error:
        return _fail(str(error), ExitCode.USAGE)
    except DeadlineExceeded as error:
        return _fail(str(error), ExitCode.TIMED_OUT)
    except RemoteError as error:
        return _fail(str(error), _REFUSALS.get(error.code, ExitCode.FAILED))
    except (RetrievalError, ValueError) as error:
        return _fail(str(error), ExitCode.FAILED)
    except BrokenPipeError:
        # Whoever read the output has left; nothing more can be said there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.FAILED
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        return _fail(f"{name}{error.strerror or error}", ExitCode.FAILED)
    except KeyboardInterrupt:
        return _fail("interrupted; everything that this command started has ended", _INTERRUPTED)
    except _Terminated:
        return _fail("terminated; everything that this command started has ended", _TERMINATED)
    finally:
        logging.disable(logging.NOTSET)
        signal.signal(signal.SIGTERM, before)


def _fail(message: str, code: int) -> int:
    lines = message.splitlines()
    if lines and lines[-1].strip() == "^":
        # The filter with a mark under the position, which the first line gives as a number.
        lines = lines[:-2]
    print(f"silvershard: {' '.join(' '.join(lines).split())}", file=sys.stderr)
    return code

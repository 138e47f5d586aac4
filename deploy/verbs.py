"""The verbs of the command line, and how each of them ends.

A command prints its answer on standard output and, if it fails, one line on standard error. Its
exit code: 0 done, 1 failed, 2 wrong usage, 3 degraded, 4 refused by a safety check, 5 timed out.
"""

import argparse
import contextlib
import importlib.metadata
import json
import logging
import math
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from silvershard.deploy.config import Config, Loaded, load_with_sources, to_yaml
from silvershard.deploy.errors import CommandError, ExitCode
from silvershard.deploy.state import DEFAULT_STATE, STATE_VARIABLE, StateDir
from silvershard.model.request import WeightedIds
from silvershard.shard.errors import ConfigError, DeadlineExceeded, RemoteError, RetrievalError

_INTERRUPTED, _TERMINATED = 130, 143
_REFUSALS = {
    "INVALID_ARGUMENT": ExitCode.USAGE,
    "NOT_FOUND": ExitCode.USAGE,
    "DEADLINE_EXCEEDED": ExitCode.TIMED_OUT,
}


class _Terminated(BaseException):
    """SIGTERM arrived: whatever is being done is undone in order."""


def _arguments() -> argparse.ArgumentParser:
    state, config, output, timeout = (argparse.ArgumentParser(add_help=False) for _ in range(4))
    state.add_argument(
        "--state",
        type=Path,
        metavar="DIR",
        help=f"state directory (default ${STATE_VARIABLE}, else {DEFAULT_STATE})",
    )
    config.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="settings (default DIR/config.yaml if it exists)",
    )
    output.add_argument(
        "--output", choices=("table", "json"), default="table", help="form of the answer"
    )
    timeout.add_argument(
        "--timeout", type=_positive, metavar="S", help="longest time to wait, in seconds"
    )
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
    ) -> Any:
        parents = [*options, output]
        added = verbs.add_parser(name, help=text, description=text, parents=parents)
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
    _serving_options(demo)
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
    text = "start a cluster on this machine and keep it running"
    up = verb("up", text, _up, state, config, timeout)
    up.add_argument(
        "--generation", type=_generation, metavar="N|latest", help="what to serve (default latest)"
    )
    _serving_options(up)
    text = "stop the cluster and wait until its last process is gone"
    verb("down", text, _down, state, config, timeout)
    verb("status", "say what runs; exit code 3 if it is degraded", _status, state)
    _query_options(verb("query", "ask a running cluster", _query, state, timeout))
    text = "ask a running cluster the requests its generation was published with, and compare"
    golden = verb("golden", text, _golden, state, timeout)
    golden.add_argument("--address", default="", metavar="HOST:PORT", help="router to ask")
    text = "measure a running cluster on the held-out interactions of its data set"
    evaluate = verb("evaluate", text, _evaluate, state, config)
    evaluate.add_argument("--data", **data)
    text = "show the settings in force, or their JSON schema"
    settings = verb("config", text, _config, state, config)
    settings.add_argument("what", choices=("show", "schema"))
    verb("version", "print the version", _version)
    return parser


def _serving_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shards", type=int, metavar="S", help="shard processes")
    parser.add_argument("--devices", metavar="A,B", help="local devices of each shard: cpu,cpu")
    parser.add_argument("--listen", type=_address, metavar="HOST:PORT", help="where to listen")
    parser.add_argument(
        "--insecure",
        action="store_true",
        default=None,
        help="allow an address that other machines can reach, although nothing is encrypted",
    )


def _query_options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(wrong_usage=parser.error)
    who = parser.add_mutually_exclusive_group()
    who.add_argument("--user", type=int, metavar="ID", help="user of the data set")
    who.add_argument(
        "--history",
        type=_history,
        metavar="1,2,3",
        help="ids watched, oldest first; with weights 1:0.5,2,3:2",
    )
    parser.add_argument(
        "--text",
        metavar="SENTENCE",
        help="what to look for, alone or beside --user or --history; needs a model with texts",
    )
    parser.add_argument(
        "--feature",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help='user feature beside the history: an id, [3.5, 2] or [["heist", 2], ["noir", 0.5]], '
        "ids with weights",
    )
    parser.add_argument("-k", type=int, default=10, metavar="K", help="results wanted (default 10)")
    parser.add_argument("--filter", default="", metavar="TEXT", help="what to let through")
    parser.add_argument(
        "--param",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="value of $NAME in the filter",
    )
    parser.add_argument(
        "--value", default="", metavar="FORMULA", help="order by this instead of the model's value"
    )
    parser.add_argument("--include-seen", action="store_true", help="do not exclude the history")
    parser.add_argument("--nprobe", type=int, default=0, metavar="P", help="clusters to probe")
    parser.add_argument(
        "--semantic-k",
        type=int,
        default=None,
        metavar="N",
        help="candidates of the decoder of semantic ids; 0: none",
    )
    parser.add_argument("--exact", action="store_true", help="score every eligible item")
    parser.add_argument("--plan", default="", metavar="TEXT", help="plan that an answer named")
    parser.add_argument(
        "--fields", default="title,year,genres", metavar="A,B", help="item columns to show"
    )
    parser.add_argument(
        "--min-coverage",
        type=float,
        metavar="SHARE",
        help="share of the documents that must answer, 0 to 1 (default: the router's)",
    )
    parser.add_argument("--address", default="", metavar="HOST:PORT", help="router to ask")


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, got {text}")
    return value


def _generation(text: str) -> int | None:
    if text == "latest":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number from 1, or latest, got {text!r}")
    return int(text)


def _address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"must be HOST:PORT with a port to 65535, got {text!r}")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _history(text: str) -> WeightedIds:
    pairs = [part.partition(":") for part in text.split(",") if part.strip()]
    try:
        return WeightedIds(
            [int(item_id) for item_id, _, _ in pairs],
            [float(weight) if colon else 1.0 for _, colon, weight in pairs],
        )
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be ids as 1,2,3 or 1:0.5,2,3:2, got {text!r}"
        ) from None


def _state(options: argparse.Namespace) -> StateDir:
    return StateDir.named(options.state, dict(os.environ))


def _load(options: argparse.Namespace, state: StateDir, **settings: object) -> Loaded:
    """Return the settings in force; options that were not given decide nothing."""
    path = options.config or (state.config_file if state.config_file.is_file() else None)
    given = {key: value for key, value in settings.items() if value is not None}
    if getattr(options, "shards", None) is not None:
        given["sharding.shards"] = options.shards
    if getattr(options, "devices", None) is not None:
        given["sharding.devices"] = options.devices.split(",")
    if getattr(options, "listen", None) is not None:
        given["listen.host"], given["listen.port"] = options.listen
    if getattr(options, "insecure", None) is not None:
        given["listen.insecure"] = options.insecure
    return load_with_sources(path, options=given)


def _print(options: argparse.Namespace, document: Any, text: Callable[[], str]) -> None:
    if options.output == "json":
        print(json.dumps(document, ensure_ascii=False))
    else:
        print(text())


def _report(options: argparse.Namespace) -> Callable[[str], None]:
    """Return where lines for people go: with JSON on standard output, to standard error."""
    stream = sys.stderr if options.output == "json" else sys.stdout
    return lambda line: print(line, file=stream, flush=True)


def _demo(options: argparse.Namespace) -> int:
    from silvershard.deploy import demo

    with demo.state_directory(options.state) as state:
        config = _load(
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
    state = _state(options)
    config = _load(options, state).config
    with state.working("train"):
        prepared = recipe.prepare(config, data=options.data, report=_report(options))
        trained = recipe.train_model(state, config, prepared, resume=options.resume)
    document = {
        "model": str(state.model_dir),
        "log": str(state.training_dir / "log.csv"),
        "seconds": round(trained.seconds, 1),
        "tower_ndcg_at_10": recipe.finite(trained.tower_ndcg),
        "ranker_ndcg_at_10": recipe.finite(trained.ranker_ndcg),
        "data": prepared.source.model_dump(),
    }
    _print(
        options,
        document,
        lambda: (
            f"trained in {trained.seconds:.1f} s, validation NDCG@10 {trained.ranker_ndcg:.4f}: "
            f"{state.model_dir}\nnext: silvershard publish"
        ),
    )
    return ExitCode.OK


def _publish(options: argparse.Namespace) -> int:
    from silvershard.deploy import recipe

    state = _state(options)
    config = _load(options, state).config
    with state.working("publish"):
        loaded = recipe.load_model(state.model_dir)
        source = loaded.description.data.path
        data = options.data or (Path(source) if source else None)
        prepared = recipe.prepare(
            config, data=data, report=_report(options), training=loaded.description.training
        )
        published = recipe.publish(state, config, prepared, loaded)
    document = recipe.describe_published(published)
    _print(
        options,
        document,
        lambda: (
            f"published generation {published.generation}, {published.documents:,} items: "
            f"{published.path}\nnext: silvershard up"
        ),
    )
    return ExitCode.OK


def _up(options: argparse.Namespace) -> int:
    from silvershard.deploy import operate

    state = _state(options)
    config = _load(options, state, **{"runtime.start_timeout_s": options.timeout}).config
    document = operate.up(state, config, generation=options.generation)
    _print(options, document, lambda: operate.render_cluster(document))
    return ExitCode.OK


def _down(options: argparse.Namespace) -> int:
    from silvershard.deploy import operate

    state = _state(options)
    config = _load(options, state).config
    document = operate.down(state, timeout_s=options.timeout or config.runtime.stop_timeout_s)
    _print(options, document, lambda: operate.render_down(document, state))
    return ExitCode.OK


def _status(options: argparse.Namespace) -> int:
    from silvershard.deploy import operate

    document, code = operate.status(_state(options))
    _print(options, document, lambda: operate.render_cluster(document))
    return code


def _query(options: argparse.Namespace) -> int:
    from silvershard.cluster import Query
    from silvershard.deploy import ask

    if options.user is None and options.history is None and options.text is None:
        options.wrong_usage("one of --user, --history and --text is required")
    state = _state(options)
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
    )
    document = ask.described(result, asker)
    _print(options, document, lambda: ask.render(document))
    return ExitCode.DEGRADED if result.coverage.reasons else ExitCode.OK


def _golden(options: argparse.Namespace) -> int:
    from silvershard.deploy import ask, golden

    state = _state(options)
    address = ask.address_of(state, options.address)
    document = golden.check(state, address, timeout_s=options.timeout or 10.0)
    _print(options, document, lambda: golden.render(document))
    return ExitCode.FAILED if document["differences"] else ExitCode.OK


def _evaluate(options: argparse.Namespace) -> int:
    from silvershard.deploy import quality_report

    state = _state(options)
    config = _load(options, state).config
    found = quality_report.measure(state, config, data=options.data, report=_report(options))
    _print(options, quality_report.document(found), lambda: quality_report.render(found))
    return ExitCode.OK if found.served.coverage == 1.0 else ExitCode.DEGRADED


def _config(options: argparse.Namespace) -> int:
    if options.what == "schema":
        print(json.dumps(Config.model_json_schema(), indent=1))
        return ExitCode.OK
    loaded = _load(options, _state(options))
    _print(options, loaded.config.model_dump(mode="json"), lambda: to_yaml(loaded).rstrip())
    return ExitCode.OK


def _version(options: argparse.Namespace) -> int:
    version = importlib.metadata.version("silvershard")
    _print(options, {"version": version}, lambda: f"silvershard {version}")
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

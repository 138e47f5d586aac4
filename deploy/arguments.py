"""What the verbs of the command line share: options, their types, and how an answer is shown."""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from silvershard.deploy.config import Loaded, load_with_sources
from silvershard.deploy.state import DEFAULT_STATE, STATE_VARIABLE, StateDir
from silvershard.model.request import WeightedIds


class Parents(NamedTuple):
    """Options that several verbs have."""

    state: argparse.ArgumentParser
    config: argparse.ArgumentParser
    output: argparse.ArgumentParser
    timeout: argparse.ArgumentParser


AddVerb = Callable[..., argparse.ArgumentParser]
"""Adds a verb: given its name, a text, the function that runs it, and parsers of shared options."""


def parents() -> Parents:
    """Return the options that several verbs have."""
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
        "--timeout", type=positive, metavar="S", help="longest time to wait, in seconds"
    )
    return Parents(state, config, output, timeout)


def serving_options(parser: argparse.ArgumentParser) -> None:
    """Declare what decides how a cluster serves."""
    parser.add_argument("--shards", type=int, metavar="S", help="parts of the catalogue")
    parser.add_argument("--replicas", type=int, metavar="R", help="shard processes of each part")
    parser.add_argument("--devices", metavar="A,B", help="local devices of each shard: cpu,cpu")
    parser.add_argument(
        "--listen", type=listen_address, metavar="HOST:PORT", help="where to listen"
    )
    parser.add_argument(
        "--insecure",
        action="store_true",
        default=None,
        help="allow addresses that other machines can reach without TLS and tokens",
    )


def several_hosts_options(parser: argparse.ArgumentParser) -> None:
    """Declare what a cluster of several hosts needs beside its settings."""
    parser.set_defaults(wrong_usage=parser.error)
    parser.add_argument(
        "--hosts",
        metavar="FILE|LIST",
        help="hosts to run on, nodes of a Ray that runs: a YAML or JSON file, or the list itself "
        "(default: those of the settings, else this machine with a Ray of its own)",
    )
    parser.add_argument(
        "--routers",
        type=int,
        metavar="N",
        help="run a router on each of the first N of the hosts (default: on all of them), or so "
        "many of them on this machine (default 1)",
    )
    ray_option(parser)


def ray_option(parser: argparse.ArgumentParser) -> None:
    """Declare which Ray is meant."""
    parser.add_argument(
        "--ray",
        metavar="HOST:PORT",
        help="head of the Ray that several hosts are nodes of (default: $RAY_ADDRESS)",
    )


def new_log_option(parser: argparse.ArgumentParser) -> None:
    """Declare what lets a state directory have another update log."""
    parser.add_argument(
        "--new-log",
        action="store_true",
        help="go on although the update log is another one or gone; says what is lost with it",
    )


def query_options(parser: argparse.ArgumentParser) -> None:
    """Declare what a question consists of."""
    parser.set_defaults(wrong_usage=parser.error)
    who = parser.add_mutually_exclusive_group()
    who.add_argument("--user", type=int, metavar="ID", help="user of the data set")
    who.add_argument(
        "--history",
        type=weighted_history,
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


def positive(text: str) -> float:
    """Return a time in seconds."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, got {text}")
    return value


def generation_number(text: str) -> int:
    """Return the number of a generation, 0 for the newest."""
    if text == "latest":
        return 0
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number from 1, or latest, got {text!r}")
    return int(text)


def listen_address(text: str) -> tuple[str, int]:
    """Return host and port."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"must be HOST:PORT with a port to 65535, got {text!r}")
    return host.removeprefix("[").removesuffix("]"), int(port)


def weighted_history(text: str) -> WeightedIds:
    """Return the ids of a history, with weights where there are any."""
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


def state_of(options: argparse.Namespace) -> StateDir:
    """Return the state directory in force."""
    return StateDir.named(options.state, dict(os.environ))


def load_settings(options: argparse.Namespace, state: StateDir, **settings: object) -> Loaded:
    """Return the settings in force; options that were not given decide nothing."""
    path = options.config or (state.config_file if state.config_file.is_file() else None)
    given = {key: value for key, value in settings.items() if value is not None}
    if getattr(options, "shards", None) is not None:
        given["sharding.shards"] = options.shards
    if getattr(options, "replicas", None) is not None:
        given["sharding.replicas"] = options.replicas
    if getattr(options, "devices", None) is not None:
        given["sharding.devices"] = options.devices.split(",")
    if getattr(options, "listen", None) is not None:
        given["listen.host"], given["listen.port"] = options.listen
    if getattr(options, "insecure", None) is not None:
        given["security.insecure"] = options.insecure
    return load_with_sources(path, options=given)


def show(options: argparse.Namespace, document: Any, text: Callable[[], str]) -> None:
    """Print an answer in the form that was asked for."""
    if options.output == "json":
        print(json.dumps(document, ensure_ascii=False))
    else:
        print(text())


def reporter(options: argparse.Namespace) -> Callable[[str], None]:
    """Return where lines for people go: with JSON on standard output, to standard error."""
    stream = sys.stderr if options.output == "json" else sys.stdout
    return lambda line: print(line, file=stream, flush=True)

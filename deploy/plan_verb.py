"""The verb ``plan``."""

import argparse

from silvershard.deploy.arguments import (
    AddVerb,
    Parents,
    generation_number,
    load_settings,
    reporter,
    show,
    state_of,
)
from silvershard.deploy.errors import ExitCode, Refused


def add_verb(verb: AddVerb, shared: Parents) -> None:
    """Declare the verb ``plan``.

    Args:
        verb: adds one.
        shared: options that several verbs have.
    """
    text = "say what a cluster takes, on which hosts, and what it is expected to answer"
    parser = verb("plan", text, _plan, shared.state, shared.config)
    parser.add_argument(
        "generation",
        nargs="?",
        type=generation_number,
        metavar="N|latest",
        help="its number (default what was live last, else latest)",
    )
    parser.add_argument(
        "--hosts",
        metavar="FILE|LIST",
        help="hosts to plan for: a YAML or JSON file, or the list itself "
        "(default: those of the settings, else this machine)",
    )
    parser.add_argument("--shards", type=int, metavar="S", help="parts of the catalogue")
    parser.add_argument("--replicas", type=int, metavar="R", help="shard processes of each part")
    parser.add_argument(
        "--standbys", type=int, metavar="N", help="processes of each part that wait"
    )
    parser.add_argument("--spread", choices=("host", "zone"), help="what copies shall not share")
    parser.add_argument(
        "--no-measure",
        action="store_true",
        help="do not run batches on this machine, so no expected QPS",
    )


def _plan(options: argparse.Namespace) -> int:
    from silvershard.deploy import plan

    state = state_of(options)
    config = load_settings(
        options,
        state,
        **{
            "sharding.standby": options.standbys,
            "replicas.placement.spread": options.spread,
        },
    ).config
    document = plan.plan(
        state,
        config,
        options.generation,
        hosts=options.hosts,
        seconds=0.0 if options.no_measure else plan.SECONDS,
        report=reporter(options),
    )
    show(options, document, lambda: plan.render(document))
    if not document["possible"]:
        raise Refused(f"this plan is impossible: {document['refused']}")
    return ExitCode.OK

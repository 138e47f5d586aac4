"""The verbs ``scale`` and ``restart``, which change the processes of a running cluster."""

import argparse

from silvershard.deploy.arguments import (
    AddVerb,
    Parents,
    load_settings,
    reporter,
    show,
    state_of,
)
from silvershard.deploy.errors import ExitCode


def add_verbs(verb: AddVerb, shared: Parents) -> None:
    """Declare the verbs that change the processes of a running cluster.

    Args:
        verb: adds one.
        shared: options that several verbs have.
    """
    state, config, _, timeout = shared
    text = "give a running cluster another number of shards, of their copies or of routers"
    scale = verb("scale", text, _scale, state, config, timeout)
    scale.add_argument("--shards", type=int, metavar="S", dest="to_shards", help="parts")
    scale.add_argument(
        "--replicas", type=int, metavar="R", dest="to_replicas", help="shard processes of each part"
    )
    scale.add_argument(
        "--standby", type=int, metavar="N", dest="to_standby", help="further ones, kept warm"
    )
    scale.set_defaults(wrong_usage=scale.error)
    scale.add_argument(
        "--routers",
        type=int,
        metavar="N",
        dest="to_routers",
        help="router processes of this machine, by itself",
    )
    text = "restart shard processes, routers and sequencer, one by one, while the cluster serves"
    restart = verb("restart", text, _restart, state, config, timeout)
    for parser in (scale, restart):
        parser.add_argument("--dry-run", action="store_true", help="say what would be done only")


def _scale(options: argparse.Namespace) -> int:
    from silvershard.deploy import scale, scale_routers

    state = state_of(options)
    config = load_settings(options, state).config
    if options.to_routers is not None:
        if (options.to_shards, options.to_replicas, options.to_standby) != (None, None, None):
            options.wrong_usage("--routers is changed by itself: give the other numbers after it")
        found = scale_routers.scale_routers(
            state,
            options.to_routers,
            dry_run=options.dry_run,
            timeout_s=options.timeout or config.swap.timeout_s,
        )
        show(options, found, lambda: scale_routers.render(found))
        return ExitCode.OK
    document = scale.scale(
        state,
        config,
        shards=options.to_shards,
        replicas=options.to_replicas,
        standby=options.to_standby,
        dry_run=options.dry_run,
        timeout_s=options.timeout or config.swap.timeout_s,
        report=reporter(options),
    )
    show(options, document, lambda: scale.render_done(document))
    return ExitCode.OK


def _restart(options: argparse.Namespace) -> int:
    from silvershard.deploy import restart

    state = state_of(options)
    config = load_settings(options, state).config
    document = restart.restart(
        state,
        dry_run=options.dry_run,
        timeout_s=options.timeout or config.swap.timeout_s,
        report=reporter(options),
    )
    show(options, document, lambda: restart.render(document))
    return ExitCode.OK

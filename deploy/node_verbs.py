"""The verbs of hosts: ``drain``, ``undrain`` and ``node``."""

import argparse

from silvershard.deploy.arguments import AddVerb, Parents, reporter, show, state_of
from silvershard.deploy.errors import CommandError, ExitCode
from silvershard.deploy.host_state import HOST_STATES, HostState
from silvershard.deploy.state import StateDir


def add_verbs(verb: AddVerb, shared: Parents) -> None:
    """Declare the verbs of hosts.

    Args:
        verb: adds one.
        shared: options that several verbs have.
    """
    text = "let a host hand over what it holds, so that it can be taken away"
    drain = verb("drain", text, _drain, shared.state, shared.timeout)
    text = "let a host get copies again"
    undrain = verb("undrain", text, _undrain, shared.state)
    text = "list the hosts, or give one a state"
    node = verb("node", text, _node, shared.state)
    node.add_argument("what", choices=("list", *HOST_STATES), help="list, or the state to give")
    node.add_argument("host", nargs="?", default="", metavar="HOST", help="the host, not for list")
    for parser in (drain, undrain):
        parser.add_argument("host", metavar="HOST", help="its name, as `node list` shows it")
    for parser in (drain, undrain, node):
        parser.add_argument("--dry-run", action="store_true", help="say what would be done only")
    for parser in (drain, node):
        parser.add_argument("--force", action="store_true", help="do it although it is not safe")


def _drain(options: argparse.Namespace) -> int:
    return _change(options, "retired", force=options.force, waits=True)


def _undrain(options: argparse.Namespace) -> int:
    return _change(options, "up", force=False)


def _node(options: argparse.Namespace) -> int:
    from silvershard.deploy import activate, fleet, host_fleet

    if options.what != "list":
        if not options.host:
            raise CommandError(f"node {options.what} needs the name of a host", ExitCode.USAGE)
        return _change(options, options.what, force=options.force)
    if options.host:
        raise CommandError(f"node list takes no host, got {options.host}", ExitCode.USAGE)
    state: StateDir = state_of(options)
    document = fleet.listing(host_fleet.fleet_of(state, activate.running(state)))
    show(options, document, lambda: fleet.render_listing(document))
    return ExitCode.OK


def _change(options: argparse.Namespace, to: HostState, *, force: bool, waits: bool = False) -> int:
    from silvershard.deploy import activate, fleet, host_fleet

    state: StateDir = state_of(options)
    hosts = host_fleet.fleet_of(state, activate.running(state))
    document = fleet.change_state(hosts, options.host, to, force=force, dry_run=options.dry_run)
    if waits and document["done"] and document["moves"]:
        report = reporter(options)
        hosts.await_empty(options.host, timeout_s=options.timeout, report=report)
    show(options, document, lambda: fleet.render_change(document))
    return ExitCode.OK

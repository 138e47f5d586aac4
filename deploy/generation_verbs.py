"""The verbs of generations and of their updates."""

import argparse
from typing import Any

from silvershard.deploy.arguments import (
    AddVerb,
    Parents,
    generation_number,
    load_settings,
    new_log_option,
    reporter,
    show,
    state_of,
)
from silvershard.deploy.control_store import CANARY, LIVE
from silvershard.deploy.errors import CommandError, ExitCode
from silvershard.deploy.processes import step_back


def add_verbs(verb: AddVerb, shared: Parents) -> None:
    """Declare the verbs of generations.

    Args:
        verb: adds one.
        shared: options that several verbs have.
    """
    state, config, _, timeout = shared
    text = "make another generation live in a running cluster, after it was planned and checked"
    activate = verb("activate", text, _activate, state, config, timeout)
    activate.add_argument(
        "generation",
        metavar="N|latest|none",
        help="its number; none, with --alias canary: nobody is a canary any more",
    )
    activate.add_argument(
        "--alias", choices=(LIVE, CANARY), default=LIVE, help="what names it (default live)"
    )
    _checks(activate)
    text = "make the generation live again that was live before"
    rollback = verb("rollback", text, _rollback, state, config, timeout)
    for parser in (activate, rollback):
        _dry_run(parser)
    text = "check a generation alone: checksums, schema, golden requests, recall of its index"
    verify = verb("verify", text, _verify, state, config)
    verify.add_argument(
        "generation",
        nargs="?",
        type=generation_number,
        default=0,
        metavar="N|latest",
        help="its number (default latest)",
    )
    _checks(verify)
    text = "list the generations; copy one to a URL, or remove old ones"
    snapshots = verb("snapshots", text, _snapshots, state, config)
    what = snapshots.add_mutually_exclusive_group()
    what.add_argument("--push", metavar="URL", help="copy a generation to a directory or URL")
    what.add_argument(
        "--prune", type=int, metavar="KEEP", help="remove all but the newest ones and those in use"
    )
    what.add_argument(
        "--unpin",
        metavar="STATE_ID",
        help="let the update log forget what a state directory kept of it that is no more",
    )
    snapshots.add_argument(
        "--generation",
        type=generation_number,
        metavar="N|latest",
        help="what --push copies (default the live one)",
    )
    text = "bring a generation back from a URL"
    restore = verb("restore", text, _restore, state, config)
    restore.add_argument("url", metavar="URL", help="where --push copied it to")
    restore.add_argument("generation", type=generation_number, metavar="N|latest")
    new_log_option(restore)
    for parser in (snapshots, restore):
        _dry_run(parser)
    text = "say how far the update log and every shard are; exit code 3 if updates are held up"
    verb("freshness", text, _freshness, state)


def _checks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checks",
        choices=("all", "files"),
        default="all",
        help="files: do not load it, so no golden requests and no recall",
    )
    parser.add_argument(
        "--allow-schema",
        action="store_true",
        help="let through what requests or updates for the live one would not fit",
    )


def _dry_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="say what would be done only")


def _activate(options: argparse.Namespace) -> int:
    step_back()
    from silvershard.deploy import activate

    state = state_of(options)
    config = load_settings(options, state).config
    try:
        generation = 0 if options.generation == "none" else _newest(options, state)
    except argparse.ArgumentTypeError as error:
        raise CommandError(f"generation {error}", ExitCode.USAGE) from None
    document = activate.activate(
        state,
        config,
        generation,
        alias=options.alias,
        load=options.checks == "all",
        allow_schema=options.allow_schema,
        dry_run=options.dry_run,
        timeout_s=options.timeout or config.swap.timeout_s,
        report=reporter(options),
    )
    show(options, document, lambda: activate.render_done(document))
    return ExitCode.OK


def _newest(options: argparse.Namespace, state: Any) -> int:
    from silvershard.deploy.launch import choose_generation

    return choose_generation(state, generation_number(options.generation))[0]


def _rollback(options: argparse.Namespace) -> int:
    from silvershard.deploy import activate

    state = state_of(options)
    config = load_settings(options, state).config
    document = activate.rollback(
        state,
        dry_run=options.dry_run,
        timeout_s=options.timeout or config.swap.timeout_s,
        report=reporter(options),
    )
    show(options, document, lambda: activate.render_done(document))
    return ExitCode.OK


def _verify(options: argparse.Namespace) -> int:
    step_back()
    from silvershard.deploy import verify

    state = state_of(options)
    config = load_settings(options, state).config
    document = verify.verify(
        state,
        config,
        options.generation,
        load=options.checks == "all",
        allow_schema=options.allow_schema,
    )
    show(options, document, lambda: verify.render(document))
    return ExitCode.OK if document["passed"] else ExitCode.FAILED


def _snapshots(options: argparse.Namespace) -> int:
    from silvershard.deploy import snapshots

    state = state_of(options)
    if options.push is not None:
        document = snapshots.push(
            state,
            options.push,
            options.generation,
            dry_run=options.dry_run,
            report=reporter(options),
        )
        show(options, document, lambda: snapshots.render_copied(document))
    elif options.prune is not None:
        config = load_settings(options, state).config
        document = snapshots.prune(state, config, options.prune, dry_run=options.dry_run)
        show(options, document, lambda: snapshots.render_pruned(document))
    elif options.unpin is not None:
        config = load_settings(options, state).config
        document = snapshots.unpin(state, config, options.unpin, dry_run=options.dry_run)
        show(options, document, lambda: snapshots.render_unpinned(document))
    else:
        document = snapshots.listing(state)
        show(options, document, lambda: snapshots.render_listing(document))
    return ExitCode.OK


def _restore(options: argparse.Namespace) -> int:
    from silvershard.deploy import snapshots

    state = state_of(options)
    document = snapshots.restore(
        state,
        load_settings(options, state).config,
        options.url,
        options.generation,
        new_log=options.new_log,
        dry_run=options.dry_run,
        report=reporter(options),
    )
    show(options, document, lambda: snapshots.render_copied(document))
    return ExitCode.OK


def _freshness(options: argparse.Namespace) -> int:
    from silvershard.deploy import freshness

    document, code = freshness.freshness(state_of(options))
    show(options, document, lambda: freshness.render(document))
    return code

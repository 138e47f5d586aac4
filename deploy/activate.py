"""Making another generation live: ``activate`` and ``rollback``, as commands see them.

A command plans, checks and writes what it wants into the control store; the driver of the cluster
does it. The command waits for that and says how far it is.
"""

import time
from collections.abc import Mapping
from typing import Any

from silvershard.deploy.carry_out import Report, awaited, refuse_if_busy
from silvershard.deploy.checks import run_checks
from silvershard.deploy.config import Config
from silvershard.deploy.control_store import (
    LIVE,
    Alias,
    Control,
    ControlStore,
    Operation,
    wanted,
)
from silvershard.deploy.errors import CheckFailed, CommandError, ExitCode, Refused
from silvershard.deploy.launch import choose_generation
from silvershard.deploy.log_pins import check_log, pin_generations
from silvershard.deploy.memory_plan import (
    MemoryPlan,
    free_memory,
    held_by,
    loaded_bytes,
    plan_memory,
    render,
)
from silvershard.deploy.state import ClusterRecord, StateDir
from silvershard.deploy.state_log import check_missing, existing_log
from silvershard.shard.generations import generation_dir
from silvershard.shard.outline import Outline, read_outline


def activate(
    state: StateDir,
    config: Config,
    generation: int,
    *,
    alias: Alias = LIVE,
    load: bool = True,
    allow_schema: bool = False,
    dry_run: bool = False,
    timeout_s: float,
    report: Report,
    operation_id: str = "",
) -> dict[str, Any]:
    """Let an alias name a generation in a running cluster; return what was done.

    Args:
        state: of the cluster.
        config: its settings.
        generation: its number, or 0 for none, which only an alias beside the live one can name.
        alias: what shall name it.
        load: load it whole to check it, before anything of the cluster is touched.
        allow_schema: let through what requests or updates for the live one would not fit.
        dry_run: plan and check, and change nothing.
        timeout_s: longest wait, after the checks.
        report: hears the plan, the checks and how far it is, a line at a time.
        operation_id: names it in the control store; empty: a new name.

    Raises:
        Refused: if there is no room for it, or it does not pass its checks; nothing was loaded into
            the cluster then.
        CommandError: if no cluster runs, there is no such generation, or it could not be done.
        TimedOut: if it is not done in time; it goes on.
    """
    if generation == 0 and alias == LIVE:
        text = "the live generation must be one that is published, got none"
        raise CommandError(text, ExitCode.USAGE)
    record = running(state)
    store = state.control
    control = store.read()
    if generation == 0:
        operation = wanted("activate", 0, alias, "", operation_id)
        return _carried_out(state, store, operation, dry_run, timeout_s, report)
    number, path = choose_generation(state, generation)
    outline = read_outline(path)
    served = control.live or record.generation
    live = read_outline(generation_dir(state.generations, served))
    _check_log(state, config, outline)
    plan = memory_plan(config, record, control, live, outline)
    for line in render(plan):
        report(line)
    if plan.mode == "refused":
        raise Refused(f"generation {number} is not loaded: {plan.reason}")
    if plan.mode == "wave" and alias != LIVE:
        raise Refused(f"generation {number} cannot be held beside the live one: {plan.reason}")
    is_held = any(one.generation == number for one in record.generations)
    load = load and not is_held
    if load and not plan.checks_fit:
        raise Refused(
            f"generation {number} cannot be loaded to be checked, there is no room for it: check "
            "it with `silvershard verify` elsewhere, then activate it with --checks files"
        )
    for check in run_checks(
        path,
        live.path,
        max_recall_loss=config.swap.max_recall_loss,
        load=load,
        allow_schema=allow_schema,
    ):
        report(f"{check.name}: {'' if check.passed else 'FAILED: '}{check.text}")
        if not check.passed:
            raise CheckFailed(number, check.name, check.text)
    content = outline.content_hash
    operation = wanted("activate", number, alias, content, operation_id, allow_refused=allow_schema)
    done = _carried_out(state, store, operation, dry_run, timeout_s, report, control.live)
    return done | {"mode": plan.mode}


def rollback(
    state: StateDir,
    *,
    dry_run: bool = False,
    timeout_s: float,
    report: Report,
    operation_id: str = "",
) -> dict[str, Any]:
    """Make the generation live again that was live before; return what was done.

    It takes seconds where that one is still in memory, and a load where it is not. What is being
    activated meanwhile is called off.

    Raises:
        Refused: if a rollback is going on, or another generation has just become live.
        CommandError: if no cluster runs, nothing was live before, or it could not be done.
        TimedOut: if it is not done in time; it goes on.
    """
    running(state)
    store = state.control
    previous = store.read().previous
    if not previous:
        raise CommandError(
            f"nothing was live before on {state.root}: there is nothing to return to"
        )
    if not generation_dir(state.generations, previous).is_dir():
        raise CommandError(
            f"generation {previous}, which was live before, is not published in {state.root} any "
            "more: activate another one"
        )
    operation = wanted("rollback", previous, LIVE, "", operation_id)
    return _carried_out(state, store, operation, dry_run, timeout_s, report)


def running(state: StateDir) -> ClusterRecord:
    """Return the record of the cluster that runs on a state directory.

    Raises:
        CommandError: if none runs, or it is still starting.
    """
    record = state.read_record() if state.root.is_dir() else None
    if record is None or not record.runs:
        raise CommandError(f"no cluster runs on {state.root}: start one with `silvershard up`")
    if record.map_version == 0:
        raise CommandError(f"the cluster on {state.root} is still starting: wait for it")
    return record


def memory_plan(
    config: Config, record: ClusterRecord, control: Control, live: Outline, new: Outline
) -> MemoryPlan:
    """Return how a generation can be brought into a running cluster now.

    Of several hosts it is only said what the checks take here: their supervisor decides.
    """
    if record.ray:
        return plan_memory(config, None, new, held_bytes=0, free_bytes=free_memory())
    sharding = config.sharding.model_copy(
        update={
            "shards": max(one.shard for one in record.shards) + 1,
            "replicas": max(one.replica for one in record.shards) + 1,
            "standby": 0,
        }
    )
    # The cluster may have been started with options that this command was not given.
    config = config.model_copy(update={"sharding": sharding})
    number = new.generation
    held = held_by(one.pid for one in record.shards if one.pid)
    generations = {one.generation for one in record.generations}
    free = free_memory()
    parked = generation_dir(live.path.parent, control.previous)
    if control.previous in generations - {number, control.live} and number not in generations:
        # It is given up before the new one is loaded.
        room = min(loaded_bytes(config, read_outline(parked)), held)
        free, held = free + room, held - room
    return plan_memory(
        config,
        None if number in generations else live,
        new,
        held_bytes=held,
        free_bytes=free,
    )


def _check_log(state: StateDir, config: Config, outline: Outline) -> None:
    """Return if a generation can be brought up to date, and let the log keep what that needs."""
    log = existing_log(state, config)
    if log is None:
        check_missing(state, config, outline)
        return
    try:
        check_log(log, outline)
        pin_generations(log, state)
    finally:
        log.close()


def _carried_out(
    state: StateDir,
    store: ControlStore,
    operation: Operation,
    dry_run: bool,
    timeout_s: float,
    report: Report,
    compared_with: int = 0,
) -> dict[str, Any]:
    """Write what is wanted and wait until it is done.

    Args:
        state: of the cluster.
        store: its control store.
        operation: what is wanted.
        dry_run: write nothing.
        timeout_s: longest wait.
        report: hears how far it is.
        compared_with: the live generation that the checks know; 0: there were none.

    Raises:
        Refused: if something else is going on, or was done meanwhile.
        CommandError: if it could not be done.
        TimedOut: if it is not done in time; it goes on.
    """
    began_s = time.monotonic()
    alias, generation = operation.alias, operation.generation
    document = {
        "kind": operation.kind,
        "alias": alias,
        "generation": generation,
        "before": getattr(store.read(), alias),
    }
    if dry_run:
        return {**document, "done": False, "seconds": 0.0}

    called_off = want(store, operation, compared_with)
    if called_off:
        report(called_off)
    ended = awaited(
        state,
        store,
        operation,
        until_s=began_s + timeout_s,
        report=report,
        unless=f"generation {generation} is not {alias}",
    )
    if ended.state != "done":
        raise CommandError(f"generation {generation} is not {alias}: {ended.reason or ended.state}")
    return {**document, "done": True, "seconds": round(time.monotonic() - began_s, 2)}


def want(store: ControlStore, operation: Operation, compared_with: int = 0) -> str:
    """Write what is wanted into the store; return in words what it calls off, empty for nothing.

    Args:
        store: the control store.
        operation: what is wanted.
        compared_with: the live generation that its checks know; 0: there were none.

    Raises:
        Refused: if something else is going on, or was done meanwhile.
        StateError: if the store cannot be used.
    """
    generation, called_off = operation.generation, ""

    def make(now: Control) -> Control:
        nonlocal called_off
        going, called_off = now.current, ""
        if operation.kind == "rollback":
            if now.previous != generation:
                raise Refused(
                    f"generation {now.live} has just become live, so generation {generation} is "
                    "not the one before it: ask again"
                )
            if going is not None and going.kind != "rollback":
                called_off = f"{going.what} is called off"
                now = now.replaced(going.ended("cancelled", "a rollback called it off"))
        if compared_with and now.live != compared_with:
            raise Refused(
                f"generation {now.live} has become live meanwhile, and generation {generation} was "
                f"checked against generation {compared_with}: ask again"
            )
        refuse_if_busy(now)
        return now.with_operation(operation)

    store.change(make)
    return called_off


def render_done(document: Mapping[str, Any]) -> str:
    """Return what was done for people."""
    what = f"generation {document['generation']}" if document["generation"] else "nothing"
    before = f"generation {document['before']}" if document["before"] else "nothing"
    if not document["done"]:
        return f"would make {what} {document['alias']}, now it is {before}"
    return f"{what} is {document['alias']} after {document['seconds']} s, before it was {before}"

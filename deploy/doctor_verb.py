"""The verb ``doctor``: it looks at this machine and says what would go wrong."""

import argparse
import importlib.metadata
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from silvershard.cluster.http_address import split_address
from silvershard.deploy.arguments import AddVerb, load_settings, reporter, show, state_of
from silvershard.deploy.config import Config
from silvershard.deploy.doctor import Check, Machine, Stock, machine_checks, worst
from silvershard.deploy.doctor_software import environment_checks, head_checks, software_checks
from silvershard.deploy.errors import ExitCode
from silvershard.deploy.head import read_head
from silvershard.deploy.machine import (
    free_of,
    open_files,
    read_clock,
    read_cpu,
    read_disk,
    read_kernel,
    read_listeners,
    read_memory,
)
from silvershard.deploy.memory_plan import loaded_bytes
from silvershard.deploy.processes import is_alive
from silvershard.deploy.software import read_software
from silvershard.deploy.state import StateDir
from silvershard.shard.errors import SnapshotError
from silvershard.shard.generations import generation_dir, list_generations
from silvershard.shard.outline import read_outline

_CODES = {"ok": ExitCode.OK, "warn": ExitCode.DEGRADED, "fail": ExitCode.FAILED}


def add_verb(verb: AddVerb, *options: argparse.ArgumentParser) -> None:
    """Declare the verb; ``options`` are those that it shares with others."""
    text = "say whether this machine can run a cluster or join one, and what to do about it"
    added = verb("doctor", text, run, *options)
    added.add_argument(
        "--join",
        type=_address,
        metavar="HOST:PORT",
        help="also look at the Ray head that this machine shall join",
    )


def _address(text: str) -> str:
    try:
        split_address(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def run(options: argparse.Namespace) -> int:
    """Look, print and return the exit code: 0 all is well, 3 warnings, 1 failures."""
    state = state_of(options)
    config = load_settings(options, state).config
    checks = examine(
        state, config, join=options.join or "", environ=os.environ, report=reporter(options)
    )
    verdict = worst(checks)
    document = {"verdict": verdict, "checks": [one._asdict() for one in checks]}
    show(options, document, lambda: render(checks))
    return _CODES[verdict]


def examine(
    state: StateDir,
    config: Config,
    *,
    join: str,
    environ: Mapping[str, str],
    report: Callable[[str], None] = lambda _: None,
) -> list[Check]:
    """Return the verdicts on this machine.

    Args:
        state: the directory that a cluster would run on, which need not be there.
        config: its settings.
        join: ``host:port`` of the Ray head that this machine shall join; empty: none.
        environ: the environment.
        report: hears of what cannot be read and therefore is not judged.
    """
    software = read_software()
    checks = machine_checks(
        read_machine(state), config, stock_of(state, config, report), joins=bool(join)
    )
    checks += software_checks(software)
    checks += environment_checks(environ, Path.home(), joins=bool(join), mode_of=mode_of)
    if join:
        checks += head_checks(read_head(join), software, importlib.metadata.version("silvershard"))
    return checks


def read_machine(state: StateDir) -> Machine:
    """Return what this machine has."""
    return Machine(
        cpu=read_cpu(),
        memory=read_memory(),
        kernel=read_kernel(),
        disk=read_disk(state.root),
        clock=read_clock(),
        shm_free=free_of(Path("/dev/shm")),
        open_files=open_files(),
        listeners=read_listeners(),
    )


def stock_of(
    state: StateDir, config: Config, report: Callable[[str], None] = lambda _: None
) -> Stock:
    """Return what a state directory holds and runs."""
    if not state.root.is_dir():
        return Stock()
    size = 0
    published = list_generations(state.generations)
    if published:
        try:
            outline = read_outline(generation_dir(state.generations, published[-1]))
            size = loaded_bytes(config, outline)
        except SnapshotError as error:
            report(f"the size of the newest generation is not known: {error}")
    record = state.read_record()
    if record is None or not (is_alive(record.guard) or is_alive(record.driver)):
        return Stock(loaded_bytes=size)
    family = (record.guard, record.driver, *record.processes)
    addresses = (record.address, record.http, record.admin)
    return Stock(
        is_running=True,
        pids=frozenset(one.pid for one in family),
        ports=frozenset(int(one.rpartition(":")[2]) for one in addresses if one),
        loaded_bytes=size,
    )


def mode_of(path: Path) -> int | None:
    """Return the mode of a file or directory; None where there is none that can be read."""
    try:
        return path.stat().st_mode
    except OSError:
        return None


def render(checks: list[Check]) -> str:
    """Return the verdicts for people, a line each, and a last one of how many there are."""
    width = max(len(one.name) for one in checks)
    lines = [_line(one, width) for one in checks]
    counts: dict[str, Any] = {
        verdict: sum(one.verdict == verdict for one in checks) for verdict in _CODES
    }
    lines.append("{ok} ok, {warn} warnings, {fail} failures".format(**counts))
    return "\n".join(lines)


def _line(check: Check, width: int) -> str:
    advice = f" → {check.advice}" if check.advice else ""
    return f"{check.verdict:<4}  {check.name:<{width}}  {check.found}{advice}"

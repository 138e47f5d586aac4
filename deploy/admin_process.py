"""The process that carries out one operation of the admin plane, away from the driver.

It is the driver's child: checking a generation loads all of it, which no driver may do. It reads an
``Errand`` from standard input, and writes what there is to say on standard output, a line of JSON
each. SIGTERM calls the operation off.
"""

import argparse
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from pydantic import BaseModel, ConfigDict, Field

from silvershard.cluster.logs import log_to_stderr
from silvershard.deploy.admin_errors import failure_of
from silvershard.deploy.admin_store import AdminTask, Failure
from silvershard.deploy.config import Config
from silvershard.deploy.errors import CheckFailed
from silvershard.deploy.processes import die_with_parent, step_back
from silvershard.deploy.state import StateDir

Report = Callable[[str], None]

_AT_ONCE = ("plan", "rollback")
"""What is no work, or cannot wait."""


class Errand(BaseModel):
    """What the process shall do."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: Config = Field(description="settings of the cluster")
    task: AdminTask = Field(description="the operation")
    swap_id: str = Field(description="names what it makes the driver do in the control store")


class Said(BaseModel):
    """One line of what the process says; the last one has a result or a failure, or both."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    progress: str = Field(default="", description="a line for people")
    result: dict[str, Any] | None = Field(default=None, description="what was done or found")
    failure: Failure | None = Field(default=None, description="why it is not done")


class _CalledOff(BaseException):
    """SIGTERM arrived: what is being done is undone in order."""


def carry_out(state: StateDir, errand: Errand, report: Report) -> Said:
    """Do what an operation shall do; return what became of it, whatever that is."""
    try:
        result = _done(state, errand, report)
    except Exception as error:  # noqa: BLE001 - the border of the process: said, and logged if a bug
        return Said(failure=failure_of(error))
    failed = [one for one in result.get("checks", ()) if not one["passed"]]
    if not failed:
        return Said(result=result)
    broken = CheckFailed(result["generation"], failed[0]["name"], failed[0]["text"])
    return Said(result=result, failure=failure_of(broken))


def _done(state: StateDir, errand: Errand, report: Report) -> dict[str, Any]:
    # They take seconds to import, and the end of the driver must be noticed by then.
    from silvershard.deploy import activate, scale, snapshots, verify

    task, config = errand.task, errand.config
    if task.kind == "plan":
        return _planned(state, config, task.generation)
    if task.kind == "stage":
        return snapshots.restore(
            state, config, task.url, task.generation, dry_run=task.dry_run, report=report
        )
    if task.kind == "verify":
        return verify.verify(
            state, config, task.generation, load=task.load, allow_schema=task.allow_schema
        )
    # The driver has a limit of its own, swap.timeout_s, and says when it has given up.
    if task.kind == "rollback":
        return activate.rollback(
            state,
            dry_run=task.dry_run,
            timeout_s=math.inf,
            report=report,
            operation_id=errand.swap_id,
        )
    if task.kind == "scale":
        return scale.scale(
            state,
            config,
            shards=task.shards,
            replicas=task.replicas,
            standby=task.standby,
            dry_run=task.dry_run,
            timeout_s=math.inf,
            report=report,
            operation_id=errand.swap_id,
        )
    return activate.activate(
        state,
        config,
        task.generation,
        alias=task.alias,
        load=task.load,
        allow_schema=task.allow_schema,
        dry_run=task.dry_run,
        timeout_s=math.inf,
        report=report,
        operation_id=errand.swap_id,
    )


def _planned(state: StateDir, config: Config, generation: int) -> dict[str, Any]:
    """Return how a generation could be brought into the running cluster now."""
    from silvershard.deploy import activate
    from silvershard.deploy.launch import choose_generation
    from silvershard.shard.generations import generation_dir
    from silvershard.shard.outline import read_outline

    record = activate.running(state)
    number, path = choose_generation(state, generation)
    plan = activate.memory_plan(
        config,
        record,
        state.control.read(),
        read_outline(generation_dir(state.generations, record.generation)),
        read_outline(path),
    )
    return {"generation": number, **plan._asdict(), "checks_fit": plan.checks_fit}


def _call_off(number: int, frame: FrameType | None) -> NoReturn:
    # A second one must not interrupt what undoes the first.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _CalledOff


def main(argv: Sequence[str] | None = None) -> int:
    """Carry out the operation that standard input describes; return the exit code."""
    parser = argparse.ArgumentParser(prog="silvershard.deploy.admin_process", description=__doc__)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--parent", type=int, required=True)
    options = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _call_off)
    try:
        die_with_parent(options.parent)
        errand = Errand.model_validate_json(sys.stdin.buffer.read())
        if errand.task.kind not in _AT_ONCE:
            # Queries go first: a check takes as much of the machine as they leave.
            step_back()
        log_to_stderr()
        # What a library prints must not get between the lines.
        lines = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

        def say(said: Said) -> None:
            lines.write(said.model_dump_json(exclude_defaults=True) + "\n")
            lines.flush()

        say(carry_out(StateDir(options.state), errand, lambda line: say(Said(progress=line))))
    except _CalledOff:
        print(json.dumps({"event": "called off"}), file=sys.stderr)
        return 1
    except BrokenPipeError:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

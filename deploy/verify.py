"""The verb ``verify``: checks a published generation, beside a cluster that runs or without one."""

from collections.abc import Mapping
from typing import Any

from silvershard.deploy.checks import run_checks
from silvershard.deploy.config import Config
from silvershard.deploy.launch import choose_generation
from silvershard.deploy.state import StateDir
from silvershard.shard.generations import generation_dir, list_generations


def verify(
    state: StateDir, config: Config, generation: int, *, load: bool, allow_schema: bool
) -> dict[str, Any]:
    """Return what every check of a generation found; nothing is changed.

    Args:
        state: where it is published. It is compared with the live one, if there is one.
        config: settings of the checks.
        generation: its number; 0 is the newest.
        load: load it whole, to ask its golden requests and to audit its index.
        allow_schema: let through what requests or updates for the live one would not fit.

    Raises:
        CommandError: if there is no such generation.
        SnapshotError: if its manifest is missing or damaged.
    """
    number, path = choose_generation(state, generation)
    live = state.control.read().live
    beside = live if live in set(list_generations(state.generations)) - {number} else 0
    checks = list(
        run_checks(
            path,
            generation_dir(state.generations, beside) if beside else None,
            max_recall_loss=config.swap.max_recall_loss,
            load=load,
            allow_schema=allow_schema,
        )
    )
    return {
        "generation": number,
        "live": beside,
        "passed": all(one.passed for one in checks),
        "checks": [one._asdict() for one in checks],
    }


def render(document: Mapping[str, Any]) -> str:
    """Return what was found for people."""
    lines = [
        f"{one['name']}: {'' if one['passed'] else 'FAILED: '}{one['text']}"
        for one in document["checks"]
    ]
    verdict = "passes" if document["passed"] else "does not pass"
    return "\n".join([*lines, f"generation {document['generation']} {verdict} its checks"])

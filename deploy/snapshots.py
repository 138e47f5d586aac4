"""The generations of a state directory: listed, copied to and from a URL, and removed."""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from silvershard.deploy.config import Config
from silvershard.deploy.errors import CommandError, ExitCode, NotPublished
from silvershard.deploy.launch import choose_generation
from silvershard.deploy.log_pins import (
    check_cut,
    drop_pins,
    other_pins,
    pin_generation,
    pin_generations,
    release_pins,
    trim_log,
)
from silvershard.deploy.memory_plan import mib
from silvershard.deploy.state import StateDir
from silvershard.deploy.state_log import check_stopped, existing_log, leave_log
from silvershard.deploy.tables import table
from silvershard.shard.errors import SnapshotError
from silvershard.shard.generations import generation_dir, list_generations
from silvershard.shard.repository import Copied, Repository
from silvershard.shard.snapshot import MANIFEST, Manifest, open_snapshot

Report = Callable[[str], None]


def listing(state: StateDir) -> dict[str, Any]:
    """Return every generation of a state directory, and what it is there for."""
    control = state.control.read()
    roles = {control.previous: "previous", control.canary: "canary", control.live: "live"}
    if control.current is not None:
        roles.setdefault(control.current.generation, "staged")
    return {
        "state_dir": str(state.root),
        "state_id": control.state_id,
        "log_id": control.log_id,
        "snapshots": [
            _described(state, number, roles.get(number, ""))
            for number in list_generations(state.generations)
        ],
    }


def _described(state: StateDir, generation: int, role: str) -> dict[str, Any]:
    path = generation_dir(state.generations, generation)
    try:
        manifest = open_snapshot(path).manifest
    except SnapshotError as error:
        reason = str(error).removeprefix(f"snapshot {path}: ")
        return {"generation": generation, "state": role, "path": str(path), "error": reason}
    size = sum(entry.size for entry in manifest.files.values())
    return {
        "generation": generation,
        "state": role,
        "content_hash": manifest.content_hash,
        "model": manifest.spec.model,
        "documents": manifest.spec.documents,
        "log_id": manifest.log_id,
        "cut": list(manifest.cut),
        "bytes": size + (path / MANIFEST).stat().st_size,
        "age_s": round(max(time.time() - manifest.created_unix_s, 0.0)),
        "path": str(path),
    }


def push(
    state: StateDir, url: str, generation: int | None, *, dry_run: bool, report: Report
) -> dict[str, Any]:
    """Copy a generation to a URL; return what was copied.

    Args:
        state: where it is.
        url: of the copies.
        generation: its number; 0 is the newest, None the live one.
        dry_run: say what would be copied only.
        report: hears the name of each file.

    Raises:
        CommandError: if there is no such generation.
        RepositoryError: if the URL cannot be written, or holds other content under the number, or
            the same that goes on from elsewhere in the update log.
        SnapshotError: if the generation is damaged.
    """
    number, path = choose_generation(state, generation)
    repository = Repository(url)
    if dry_run:
        present = number in repository.generations()
        return {"generation": number, "url": url, "present": present, "done": False}
    copied = repository.push(open_snapshot(path), lambda name: report(f"copying {name}"))
    return _copied(copied, url)


def restore(
    state: StateDir,
    config: Config,
    url: str,
    generation: int,
    *,
    new_log: bool = False,
    dry_run: bool,
    report: Report,
) -> dict[str, Any]:
    """Bring a generation from a URL into the state directory; return what was copied.

    Args:
        state: where it goes.
        config: settings; the log is theirs.
        url: of the copies.
        generation: its number; 0 is the newest that is there.
        new_log: go on with the update log that the settings name, whatever log it is of.
        dry_run: say what would be copied only.
        report: hears the name of each file, and what is lost with the log that is left.

    Raises:
        Refused: if the update log is another one, or was trimmed beyond its cut; nothing is copied.
        RepositoryError: if the URL cannot be read, or does not hold the generation.
        SnapshotError: if the copy is damaged, or other content has its number here, or the same
            that goes on from elsewhere in the update log, which does not matter with ``new_log``.
    """
    repository = Repository(url)
    present = repository.generations()
    if not present:
        raise NotPublished(
            f"{url} holds no generation: copy one with `silvershard snapshots --push`"
        )
    number = generation or present[-1]
    if number not in present:
        raise NotPublished(
            f"{url} holds no generation {number}; there "
            f"{'is' if len(present) == 1 else 'are'} {', '.join(map(str, present))}"
        )
    here = number in list_generations(state.generations)
    path = generation_dir(state.generations, number)
    manifest = open_snapshot(path).manifest if here else repository.manifest(number)
    if dry_run:
        if not new_log:
            _check_log(state, config, manifest, report)
        return {"generation": number, "url": url, "present": here, "done": False}
    with state.working("restore"):
        if new_log:
            check_stopped(state)
        else:
            _check_log(state, config, manifest, report, pin=True)
        state.generations.mkdir(mode=0o700, exist_ok=True)
        copied = repository.fetch(
            number,
            state.generations,
            lambda name: report(f"copying {name}"),
            # What left its log here before is what shall come of it.
            any_log=new_log,
        )
        if new_log:
            for line in leave_log(state, config):
                report(line)
            _check_log(state, config, open_snapshot(path).manifest, report, pin=True)
    return _copied(copied, url)


def _check_log(
    state: StateDir, config: Config, manifest: Manifest, report: Report, *, pin: bool = False
) -> None:
    """Return if a generation can be brought up to date; let the log keep what that needs."""
    number = manifest.spec.generation
    log = existing_log(state, config)
    if log is None:
        if manifest.log_id:
            report(
                f"generation {number} holds updates of log {manifest.log_id}, which is not here: "
                "name it with updates.log before the next `silvershard up`"
            )
        return
    try:
        check_cut(log, number, manifest.log_id, manifest.cut)
        if pin:
            pin_generation(log, state, number, manifest.cut)
    finally:
        log.close()


def _copied(copied: Copied, url: str) -> dict[str, Any]:
    return {**copied._asdict(), "url": url, "done": True}


def prune(state: StateDir, config: Config, keep: int, *, dry_run: bool) -> dict[str, Any]:
    """Remove all but the newest generations and let the log forget what none of them needs.

    The live, the previous and the canary generation stay, and one that is being activated.

    Args:
        state: where they are.
        config: settings; the log is theirs.
        keep: how many of the newest stay.
        dry_run: say what would be removed only.

    Raises:
        CommandError: if ``keep`` is below 1.
        LogUnavailable: if the log cannot be reached; nothing is removed then.
    """
    if keep < 1:
        raise CommandError(f"at least 1 generation must be kept, got {keep}", ExitCode.USAGE)
    removed: list[int] = []
    trimmed: list[int] = []
    others: dict[str, dict[int, tuple[int, ...]]] = {}
    with state.working("prune"):
        log = existing_log(state, config)
        try:
            present = list_generations(state.generations)
            kept = set(present[-keep:]) | state.control.read().kept
            removed = [number for number in present if number not in kept]
            if not dry_run:
                for number in removed:
                    _remove(state, number)
                if log is not None:
                    pin_generations(log, state)
                    drop_pins(log, state)
                    trimmed = trim_log(log) if kept & set(present) else []
                    others = other_pins(log, state)
        finally:
            if log is not None:
                log.close()
    stay = [number for number in present if number in kept]
    return {
        "removed": removed,
        "kept": stay,
        "log_start": trimmed,
        "other_pins": others,
        "done": not dry_run,
    }


def unpin(state: StateDir, config: Config, name: str, *, dry_run: bool = False) -> dict[str, Any]:
    """Let the update log forget what a state directory kept that is no more.

    Args:
        state: another directory with the same log.
        config: its settings.
        name: of the one that is no more, as ``prune`` shows it.
        dry_run: say what would be released only.

    Raises:
        CommandError: if there is no log, or no pin of that name.
        Refused: if it is the name of ``state`` itself.
        LogUnavailable: if the log cannot be reached.
    """
    log = existing_log(state, config)
    if log is None:
        raise CommandError(f"there is no update log in {state.root}")
    try:
        released = release_pins(log, state, name, dry_run=dry_run)
    finally:
        log.close()
    if not released:
        raise CommandError(f"the update log has no pins of a state directory {name}")
    return {"state_id": name, "released": released, "done": not dry_run}


def _remove(state: StateDir, generation: int) -> None:
    """Remove a generation; what is left after a crash has no name of a generation."""
    path = generation_dir(state.generations, generation)
    doomed = path.with_name(f".{path.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    if doomed.is_symlink():
        doomed.unlink()
    else:
        shutil.rmtree(doomed)


def render_listing(document: Mapping[str, Any]) -> str:
    """Return the list for people."""
    found: Sequence[Mapping[str, Any]] = document["snapshots"]
    if not found:
        return f"{document['state_dir']}: no generation is published"
    headers = ("generation", "state", "documents", "size", "age", "cut", "content")
    rows = [
        (
            str(one["generation"]),
            one["state"] or "-",
            one.get("documents", 0),
            mib(one["bytes"]) if "bytes" in one else "-",
            _age(one["age_s"]) if "age_s" in one else "-",
            "-" if "error" in one else ", ".join(map(str, one["cut"])) or "start",
            one["content_hash"][:12] if "content_hash" in one else one["error"],
        )
        for one in found
    ]
    return table(headers, rows, max_width=100)


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds} s"


def render_copied(document: Mapping[str, Any]) -> str:
    """Return what was copied for people."""
    what = f"generation {document['generation']}"
    if not document["done"]:
        there = "is there already" if document["present"] else "would be copied"
        return f"{what}: {there}, {document['url']}"
    return (
        f"{what}: {document['copied']} of {document['files']} files had to be copied, "
        f"{mib(document['copied_bytes'])}, {document['url']}"
    )


def render_pruned(document: Mapping[str, Any]) -> str:
    """Return what was removed for people."""
    did = "removed" if document["done"] else "would remove"
    numbers = ", ".join(map(str, document["removed"])) or "nothing"
    kept = ", ".join(map(str, document["kept"])) or "nothing"
    log = document["log_start"]
    rest = f"; the update log begins after {', '.join(map(str, log))}" if log else ""
    others = "".join(
        f"\nstate directory {name} keeps it for its generations {', '.join(map(str, pins))}"
        for name, pins in document["other_pins"].items()
    )
    return f"{did} {numbers}, kept {kept}{rest}{others}"


def render_unpinned(document: Mapping[str, Any]) -> str:
    """Return what was released for people."""
    what = f"{document['released']} pins of state directory {document['state_id']}"
    if not document["done"]:
        return f"would release {what}"
    return f"released {what}; the next `silvershard snapshots --prune` trims the log"

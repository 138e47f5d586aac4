"""What a fault means for a cluster that runs: whom it hits, and whether that is safe.

Without I/O. What would cost answers their documents is refused in words, unless an outage is
wanted.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

from silvershard.cluster.faults import MAX_DELAY_MS, MAX_SECONDS, FaultKind, FaultRecord
from silvershard.deploy.config import Config
from silvershard.deploy.errors import Refused
from silvershard.deploy.state import ClusterRecord, ShardRecord, StateDir
from silvershard.model.request import RequestError

TARGETS: Final[Mapping[FaultKind, tuple[str, ...]]] = {
    "kill": ("shard", "router", "sequencer", "tables", "supervisor"),
    "hang": ("shard", "router", "sequencer", "tables", "supervisor"),
    "slow": ("shard",),
    "drop": ("shard", "host"),
    "partition": ("shard", "host"),
    "corrupt": ("generation",),
    "stall": ("shard", "sequencer"),
    "fill": ("shard",),
}
"""What each kind of fault can happen to."""

_CUTS_OFF: Final = ("kill", "hang", "drop", "partition")
"""A copy that suffers one of these does not count as one that answers."""
_FORMS: Final[Mapping[str, str]] = {
    "shard": r"shard (\d{1,6})\.(\d{1,3})",
    "tables": r"tables (\d{1,6})",
    "host": r"host ([0-9A-Za-z.:_-]{1,255})",
    "generation": r"generation (\d{1,12})",
    "router": "router",
    "sequencer": "sequencer",
    "supervisor": "supervisor",
}
_SHOWN: Final[Mapping[str, str]] = {
    "shard": "shard S.R",
    "tables": "tables N",
    "host": "host ADDRESS",
    "generation": "generation N",
}


class FaultRequest(NamedTuple):
    """A fault that somebody wants."""

    name: str
    """Its operation_id."""
    kind: FaultKind
    target: str
    seconds: float = 0.0
    delay_ms: int = 0
    share: float = 1.0
    copy_url: str = ""
    allow_outage: bool = False
    dry_run: bool = False

    def record(self, now_unix_s: float) -> FaultRecord:
        """Return what is written down of it."""
        return FaultRecord(
            name=self.name,
            kind=self.kind,
            target=self.target,
            seconds=self.seconds,
            delay_ms=self.delay_ms,
            share=self.share,
            copy_url=self.copy_url,
            began_unix_s=now_unix_s,
        )


def faults_dir(state: StateDir, config: Config) -> str:
    """Return where the processes of a cluster find their faults; empty where there are none."""
    return str(state.faults_dir) if config.chaos.enabled else ""


def check_request(request: FaultRequest) -> str:
    """Return what kind of target a request names.

    Raises:
        RequestError: naming the field that makes no sense.
    """
    kind = request.kind
    if kind == "kill":
        if request.seconds:
            raise RequestError("duration", "a kill lasts no time: leave it out")
    elif not 0 < request.seconds <= MAX_SECONDS:
        raise RequestError(
            "duration",
            f"must be above 0 s and at most {MAX_SECONDS:g} s, got {request.seconds:g} s",
        )
    if (kind == "slow") != bool(request.delay_ms) or request.delay_ms > MAX_DELAY_MS:
        needed = f"must be in 1..{MAX_DELAY_MS}" if kind == "slow" else f"{kind} has none"
        raise RequestError("delay_ms", f"{needed}, got {request.delay_ms}")
    if not 0 < request.share <= 1:
        raise RequestError("share", f"must be above 0 and at most 1, got {request.share:g}")
    if kind not in ("drop", "fill") and request.share != 1:
        raise RequestError("share", f"{kind} has none, got {request.share:g}")
    if (kind == "corrupt") != bool(request.copy_url):
        raise RequestError(
            "copy_url",
            "must name where another copy of the generation is, so that the only one is never "
            "damaged"
            if kind == "corrupt"
            else f"{kind} has none",
        )
    for form in TARGETS[kind]:
        if re.fullmatch(_FORMS[form], request.target):
            return form
    choices = ", ".join(_SHOWN.get(form, form) for form in TARGETS[kind])
    raise RequestError("target", f"of {kind} must be {choices}, got {request.target[:80]!r}")


def numbers_of(form: str, target: str) -> tuple[str, ...]:
    """Return what a target of a form names: shard and replica, or a number or host."""
    found = re.fullmatch(_FORMS[form], target)
    assert found is not None
    return found.groups()


def plan_fault(
    request: FaultRequest, record: ClusterRecord, active: Iterable[FaultRecord]
) -> tuple[int, ...]:
    """Return the pids of the processes that must suffer a fault of a running cluster.

    Args:
        request: it; not of a generation.
        record: the cluster.
        active: faults that go on.

    Raises:
        RequestError: naming the field that makes no sense.
        Refused: if a shard would have no copy left that answers, or there is no process.
    """
    form = check_request(request)
    hit = _hit(request, record, form)
    if request.kind in _CUTS_OFF and not request.allow_outage:
        _check_outage(request, record, form, hit, active)
    if request.kind in ("drop", "partition"):
        return _running("router", (record.router.pid,))
    return _running(request.target, _pids(form, request.target, record, hit))


def _hit(request: FaultRequest, record: ClusterRecord, form: str) -> list[ShardRecord]:
    """Return the copies of shards that a fault hits.

    Raises:
        RequestError: if there is none of what it shall hit.
    """
    found: list[ShardRecord] = []
    if form == "shard":
        shard, replica = map(int, numbers_of(form, request.target))
        found = [one for one in record.shards if (one.shard, one.replica) == (shard, replica)]
    elif form == "host":
        (host,) = numbers_of(form, request.target)
        found = [one for one in record.shards if host_of(one.address) == host]
    if not found and form in ("shard", "host"):
        shards = [f"shard {one.shard}.{one.replica}" for one in record.shards]
        hosts = [f"host {one}" for one in sorted({host_of(one.address) for one in record.shards})]
        known = ", ".join(shards if form == "shard" else hosts)
        raise RequestError("target", f"there is no {request.target}; there is {known}")
    if form == "tables" and not any(
        request.target == f"tables {one.shard}" for one in record.tables
    ):
        known = ", ".join(f"tables {one.shard}" for one in record.tables) or "no table process"
        raise RequestError("target", f"there is no {request.target}; there is {known}")
    if form == "sequencer" and record.sequencer is None:
        raise RequestError("target", "there is no sequencer: this cluster takes no updates")
    return found


def host_of(address: str) -> str:
    """Return the host of ``host:port``."""
    return address.rpartition(":")[0].strip("[]")


def _pids(
    form: str, target: str, record: ClusterRecord, hit: Iterable[ShardRecord]
) -> tuple[int, ...]:
    if form == "shard":
        return tuple(one.pid for one in hit)
    if form == "tables":
        return tuple(one.pid for one in record.tables if target == f"tables {one.shard}")
    if form == "router":
        return (record.router.pid,)
    if form == "supervisor":
        return (record.driver.pid,)
    return (record.sequencer.pid if record.sequencer is not None else 0,)


def _running(target: str, pids: tuple[int, ...]) -> tuple[int, ...]:
    if not all(pids):
        raise Refused(f"{target} has no process now: wait until it serves again")
    return pids


def _check_outage(
    request: FaultRequest,
    record: ClusterRecord,
    form: str,
    hit: Iterable[ShardRecord],
    active: Iterable[FaultRecord],
) -> None:
    """Refuse what would leave a shard without a copy that answers."""
    allow = "; --allow-outage does it all the same"
    if form == "router":
        raise Refused(f"the cluster has no other router than the one to {request.kind}{allow}")
    if form == "supervisor" and request.kind == "kill":
        raise Refused(f"the cluster ends with its supervisor{allow}")
    if form == "tables":
        raise Refused(
            f"{request.target} has no other copy: default rows would stand in for its rows{allow}"
        )
    cut_off = {one.target for one in active if one.kind in _CUTS_OFF}
    doomed = {(one.shard, one.replica) for one in hit}
    for shard in sorted({one.shard for one in hit}):
        copies = [one for one in record.shards if one.shard == shard and not one.standby]
        others = [one for one in copies if (one.shard, one.replica) not in doomed]
        troubles = {one.replica: _trouble(one, cut_off) for one in others}
        if all(troubles.values()):
            said = [f"replica {replica} {trouble}" for replica, trouble in troubles.items()]
            listed = "; ".join(said) or "there is no other"
            raise Refused(
                f"shard {shard} would lose its last copy that answers, of {len(copies)}: "
                f"{listed}{allow}"
            )


def _trouble(copy: ShardRecord, cut_off: set[str]) -> str:
    """Return why a copy does not answer, or an empty text."""
    if copy.state != "serving":
        return f"is {copy.state}"
    places = {f"shard {copy.shard}.{copy.replica}", f"host {host_of(copy.address)}"}
    return "suffers a fault itself" if places & cut_off else ""

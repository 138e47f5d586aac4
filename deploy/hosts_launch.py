"""``up``, ``down`` and the way to a cluster of several hosts on a Ray that runs already."""

import functools
import ipaddress
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from silvershard.cluster.secret_file import read_secret
from silvershard.deploy.access import secured
from silvershard.deploy.cluster_size import in_force
from silvershard.deploy.cluster_store import ClusterStore, Launched, PlacedHost
from silvershard.deploy.config import Config
from silvershard.deploy.control_place import move_control
from silvershard.deploy.errors import CommandError, ExitCode, Refused, TimedOut
from silvershard.deploy.launch import check_security, choose_generation
from silvershard.deploy.layout import Layout
from silvershard.deploy.placement import Host, Placement
from silvershard.deploy.progress import Progress
from silvershard.deploy.ray_nodes import ADDRESS_VARIABLE, check_nodes, connected, find
from silvershard.deploy.state import ClusterRecord, StateDir
from silvershard.shard.outline import read_outline

_POLL_S = 0.1
_AGENTS_S = 60.0
_ASK_S = 10.0
_CALLS = 4
"""So many calls to an actor run at once, such as one that ends it beside one that reads."""

Report = Callable[[str], None]


def check_settings(config: Config) -> None:
    """Check that settings can be those of a cluster of several hosts.

    Raises:
        Refused: naming the setting and what it must be.
        ConfigError: if a file of security cannot be used on this host.
    """
    if not config.control.store:
        raise Refused(
            "control.store must be redis://host:port/db?prefix=name with several hosts, got "
            "nothing: a file is only there for one of them"
        )
    if config.updates.enabled and not config.updates.log.startswith("redis://"):
        raise Refused(
            "updates.log must be redis://host:port/db?prefix=name with several hosts, got "
            f"{config.updates.log or 'nothing'}: a file is only there for one of them"
        )
    security = config.security
    given = {
        "security.tls": security.tls.enabled,
        "security.tokens": security.tokens,
        "security.secret": security.secret,
    }
    missing = [key for key, value in given.items() if not value]
    if missing and not security.insecure:
        raise Refused(
            f"the processes of several hosts listen on their addresses: set {', '.join(missing)} "
            "to files that are at the same paths on every host, or --insecure if every machine "
            "that can reach them may ask"
        )
    check_security(config)
    if security.secret:
        read_secret(Path(security.secret))


def placed_hosts(
    hosts: Sequence[Host], placement: Placement, replicas: int, routers: int | None
) -> tuple[PlacedHost, ...]:
    """Return every host that is not down with what it gets.

    Args:
        hosts: as they were listed.
        placement: where every copy goes.
        replicas: R; standbys are numbered after them.
        routers: how many of the first hosts by name that are up get a router; None: all of them.

    Raises:
        Refused: if an address cannot be resolved, or there are fewer hosts than routers.
    """
    up = [one.name for one in sorted(hosts, key=lambda one: one.name) if one.state == "up"]
    if routers is not None and not 1 <= routers <= len(up):
        raise Refused(
            f"--routers must be from 1 to {len(up)}, the hosts that are up, got {routers}"
        )
    with_router = set(up[:routers])
    found = []
    for host in hosts:
        copies = sorted(
            (one.shard, one.replica + (replicas if one.standby else 0))
            for one in placement.on(host.name)
        )
        if host.state == "down":
            continue
        found.append(
            PlacedHost(
                name=host.name,
                address=resolved(host.address or host.name),
                cpus=host.cpus,
                memory_bytes=host.memory_bytes,
                zone=host.zone,
                labels=dict(host.labels),
                state=host.state,
                router=host.name in with_router,
                copies=tuple(copies),
            )
        )
    return tuple(found)


def resolved(address: str) -> str:
    """Return the IP address of a host, by which Ray knows its node.

    Raises:
        Refused: if there is none, or it is one that only the host itself can reach.
    """
    try:
        found = str(socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise Refused(f"host {address} has no address: {error.strerror or error}") from None
    if ipaddress.ip_address(found).is_loopback:
        raise Refused(f"host {address} is {found}, which other hosts cannot reach")
    return found


def up(
    state: StateDir,
    config: Config,
    hosts: Sequence[Host],
    *,
    generation: int | None,
    ray: str | None,
    routers: int | None,
    admit: Callable[[Path], None],
    show_plan: Callable[[Mapping[str, Any]], None],
    report: Report,
) -> ClusterRecord:
    """Start a cluster on several hosts and wait until it serves every document.

    Args:
        state: the directory to run on: the same path on every host, where it need not be shared.
        config: settings.
        hosts: the machines, which are nodes of a Ray.
        generation: as for ``choose_generation``.
        ray: ``host:port`` of the head of that Ray; None: as ``RAY_ADDRESS`` says.
        routers: on how many hosts there is a router; None: on each.
        admit: checks the snapshot, and raises what is against it.
        show_plan: is given the plan before anything is started.
        report: hears what is being waited for.

    Raises:
        Refused: if settings, plan or hosts do not allow it, or a cluster runs already.
        CommandError: if it cannot start; nothing is left running.
        TimedOut: if it does not start in time; nothing is left running.
    """
    config = secured(config, state, own_secret=False)
    check_settings(config)
    address = ray or os.environ.get(ADDRESS_VARIABLE, "")
    if not address:
        raise Refused(
            "a cluster of several hosts needs a Ray that runs on them: name its head with "
            f"--ray HOST:PORT or ${ADDRESS_VARIABLE}"
        )
    choose_generation(state, generation)
    state.create()
    lock = state.lock()
    try:
        move_control(state.root, config.control.store)
        number, snapshot = choose_generation(state, generation)
        report("plan")
        control = state.control.read()
        sized = in_force(config, control.scaled)
        hosts = [one._replace(state=control.host_states.get(one.name, one.state)) for one in hosts]
        placement = _planned(state, sized, number, snapshot, hosts, show_plan)
        admit(snapshot)
        launched = Launched(
            config=config,
            generation=number,
            model=read_outline(snapshot).model,
            root=str(state.root),
            ray=address,
            hosts=placed_hosts(hosts, placement, sized.sharding.replicas, routers),
            since_unix_s=time.time(),
        )
        store = ClusterStore(config.control.store)
        report("Ray")
        with connected(address, state.root):
            check_nodes(address, launched.hosts)
            if not store.begin(launched):
                raise Refused(
                    f"a cluster runs already at {config.control.store.partition('?')[0]}: stop it "
                    "with `silvershard down`"
                )
            try:
                return _start(state, store, launched, report)
            except BaseException:
                _end(store, launched, timeout_s=config.runtime.stop_timeout_s)
                raise
    finally:
        os.close(lock)


def _planned(
    state: StateDir,
    config: Config,
    number: int,
    snapshot: Path,
    hosts: Sequence[Host],
    show_plan: Callable[[Mapping[str, Any]], None],
) -> Placement:
    # They load torch, which no other verb of these needs.
    from silvershard.deploy.footprint import read_footprint
    from silvershard.deploy.plan import plan, plan_cluster
    from silvershard.shard.table_files import row_files

    if row_files(snapshot):
        raise Refused(
            f"generation {number} has remote tables, which need a single machine in this version: "
            "publish it without tables.remote"
        )
    document = plan(state, config, number, machines=hosts, seconds=0.0)
    show_plan(document)
    if not document["possible"]:
        raise Refused(f"this plan is impossible: {document['refused']}")
    return plan_cluster(config, read_footprint(snapshot, config), hosts).placement


def _start(
    state: StateDir, store: ClusterStore, launched: Launched, report: Report
) -> ClusterRecord:
    """Start agents, then the supervisor; wait until it serves."""
    import ray

    from silvershard.deploy.host_actor import HostActor
    from silvershard.deploy.host_agents import actor_name
    from silvershard.deploy.host_site import NAMESPACE, tied_to
    from silvershard.deploy.supervisor_actor import NAME, SupervisorActor

    # ray.remote turns the classes into something that their types do not say.
    host_class: Any = HostActor
    supervisor_class: Any = SupervisorActor
    if find(NAME) is not None:
        raise Refused(
            f"the Ray at {launched.ray} runs another cluster of silvershard, in namespace "
            f"{NAMESPACE}: one Ray has room for one of them"
        )
    for one in launched.hosts:
        name = actor_name(one.name)
        left = find(name)
        if left is not None:
            # Its host was away when its cluster was ended.
            ray.kill(left, no_restart=True)
        options = {"name": name, "max_concurrency": _CALLS, **tied_to(one.address)}
        host_class.options(**options).remote(store.url, one.name, launched.root)
    _wait_for_agents(store, launched, report)
    supervisor_class.options(
        name=NAME, namespace=NAMESPACE, lifetime="detached", max_concurrency=_CALLS
    ).remote(store.url)
    give_up_s = time.monotonic() + launched.config.runtime.start_timeout_s + 30.0
    said = ""
    while True:
        told = store.read(Progress, "progress") or Progress(phase="supervisor")
        if told.error:
            raise CommandError(
                f"the cluster could not start: {told.error}", ExitCode(told.exit_code)
            )
        record = store.read(ClusterRecord, "record")
        if told.ready and record is not None:
            return record
        if time.monotonic() > give_up_s:
            raise TimedOut(f"the cluster did not start in time: {told.phase}")
        if told.phase != said:
            said = told.phase
            report(said)
        time.sleep(_POLL_S)


def _wait_for_agents(store: ClusterStore, launched: Launched, report: Report) -> None:
    """Wait until every host has said something.

    Raises:
        TimedOut: naming the hosts that have not.
    """
    report("agents of hosts")
    give_up_s = time.monotonic() + _AGENTS_S
    while True:
        silent = sorted({one.name for one in launched.hosts} - store.reports().keys())
        if not silent:
            return
        if time.monotonic() > give_up_s:
            raise TimedOut(
                f"after {_AGENTS_S:g} s there is no word from the agent of {', '.join(silent)}: "
                f"is {store.url.partition('?')[0]} reachable there, and silvershard installed?"
            )
        time.sleep(_POLL_S)


def launched_on(state: StateDir) -> tuple[ClusterStore, Launched] | None:
    """Return the cluster of several hosts that a state directory belongs to; None if there is none.

    Raises:
        StateError: if the control store cannot be read.
    """
    record = state.read_record() if state.root.is_dir() else None
    if (record is not None and not record.ray) or not state.control_url_file.is_file():
        return None
    store = ClusterStore(state.control_url_file.read_text().strip())
    launched = store.read(Launched, "launch")
    return (store, launched) if launched is not None else None


def record_of(state: StateDir) -> ClusterRecord | None:
    """Return what runs on a state directory, also where that is on none of the hosts.

    Raises:
        StateError: if nothing here says so and the control store cannot be read.
    """
    record = state.read_record() if state.root.is_dir() else None
    if record is None and state.control_url_file.is_file():
        record = ClusterStore(state.control_url_file.read_text().strip()).read(
            ClusterRecord, "record"
        )
    return record


def down(
    store: ClusterStore, launched: Launched, *, ray: str | None, timeout_s: float
) -> tuple[str, ...]:
    """End a cluster of several hosts, and nothing else: the Ray that was found goes on.

    Args:
        store: of the cluster.
        launched: what was started.
        ray: ``host:port`` of the head of its Ray now; None: as ``RAY_ADDRESS`` says, else as then.
        timeout_s: longest orderly end of shards and routers.

    Returns:
        The hosts that cannot be reached. When one is back its agent finds that nothing is launched
        any more, and ends what runs there.

    Raises:
        CommandError: if Ray cannot be reached.
    """
    address = ray or os.environ.get(ADDRESS_VARIABLE, "") or launched.ray
    with connected(address, Path(launched.root)):
        return _end(store, launched, timeout_s=timeout_s)


def _end(store: ClusterStore, launched: Launched, *, timeout_s: float) -> tuple[str, ...]:
    """End everything; return the hosts that cannot be reached, whose agents end by themselves."""
    import ray

    from silvershard.deploy.host_agents import actor_name
    from silvershard.deploy.ray_nodes import living_addresses
    from silvershard.deploy.sequencer_seat import NAMES
    from silvershard.deploy.supervisor_actor import NAME

    store.stopping(launched)
    supervisor = find(NAME)
    if supervisor is not None:
        _asked(lambda: ray.get(supervisor.stop.remote(timeout_s), timeout=timeout_s + _ASK_S))
        ray.kill(supervisor, no_restart=True)
    # What the supervisor could not end any more.
    layout = store.read(Layout, "layout") or Layout()
    for name in (*NAMES, *(one.actor for one in layout.copies)):
        actor = find(name)
        if actor is not None:
            ray.kill(actor, no_restart=True)
    living = living_addresses()
    lost = [one.name for one in launched.hosts if one.address not in living]
    ends = []
    for one in launched.hosts:
        agent = find(actor_name(one.name))
        if agent is not None and one.name not in lost:
            ends.append((one, agent, agent.stop.remote()))
    limit_s = launched.config.runtime.drain_s + _ASK_S
    for one, agent, end in ends:
        if _asked(functools.partial(ray.get, end, timeout=limit_s)):
            ray.kill(agent, no_restart=True)
        else:
            lost.append(one.name)
    store.clear()
    return tuple(lost)


def _asked(work: Callable[[], Any]) -> bool:
    """Return whether an actor did what it was asked to do."""
    import ray.exceptions

    try:
        work()
    except (ray.exceptions.RayError, TimeoutError):
        return False
    return True

"""The hosts that a cluster may use, as a person lists them: in a file, in settings, or inline."""

import json
import os
import re
import socket
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import pydantic
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from silvershard.deploy.host_state import HostState
from silvershard.deploy.placement import Host
from silvershard.shard.errors import ConfigError

_UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_UNITS |= {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")


def parse_size(value: object) -> object:
    """Return bytes from a number of them or a text such as ``64GiB``; else what was given.

    Raises:
        ValueError: if a text is no size.
    """
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip())
    if match is None or match[2] not in _UNITS:
        units = ", ".join(unit for unit in _UNITS if unit)
        raise ValueError(f"must be bytes, or a number with one of {units}, got {value!r}")
    return round(float(match[1]) * _UNITS[match[2]])


Size = Annotated[int, BeforeValidator(parse_size)]


class GpusEntry(BaseModel):
    """The GPUs of a host, which are alike."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    count: int = Field(ge=1, le=64, description="how many there are")
    memory: Size = Field(ge=1 << 20, description="memory of each, as bytes or 80GiB")


class HostEntry(BaseModel):
    """One machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(
        min_length=1,
        max_length=100,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
        description="what plans and verbs call it",
    )
    address: str = Field(
        default="", description="where other hosts reach it, without a port; empty: its name"
    )
    cpus: float = Field(gt=0, le=4096, description="cores that shard processes may use")
    memory: Size = Field(
        ge=1 << 20, description="memory that silvershard may use, as bytes or 64GiB"
    )
    gpus: GpusEntry | None = Field(default=None, description="its GPUs; none without")
    zone: str = Field(
        default="", max_length=100, description="what fails together; empty: a zone of its own"
    )
    labels: dict[str, str] = Field(
        default_factory=dict, description="what replicas.placement.labels can ask for"
    )
    state: HostState = Field(default="up", description="maintenance, retired and down get no copy")

    @field_validator("address")
    @classmethod
    def _check_address(cls, address: str) -> str:
        if re.search(r"[\s/]", address):
            raise ValueError(f"must be a host name or an IP address, got {address!r}")
        return address

    def to_host(self) -> Host:
        """Return the host as placement knows it."""
        return Host(
            name=self.name,
            cpus=self.cpus,
            memory_bytes=self.memory,
            num_devices=self.gpus.count if self.gpus else 0,
            device_bytes=self.gpus.memory if self.gpus else 0,
            zone=self.zone,
            labels=dict(self.labels),
            state=self.state,
            address=self.address or self.name,
        )


class HostsSection(BaseModel):
    """Which machines a cluster may use."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str = Field(
        default="", description="YAML or JSON list of hosts; empty: those below, else this machine"
    )
    members: tuple[HostEntry, ...] = Field(
        default=(),
        description="hosts, each with name, cpus, memory (bytes or 64GiB) and perhaps address, "
        "gpus {count, memory}, zone, labels, state",
    )

    @field_validator("members")
    @classmethod
    def _check_members(cls, members: tuple[HostEntry, ...]) -> tuple[HostEntry, ...]:
        check_distinct(members)
        return members


def check_distinct(entries: Iterable[HostEntry]) -> None:
    """Check that no two hosts have the same name or address.

    Raises:
        ValueError: naming what is there twice.
    """
    listed = list(entries)
    for kind, values in (
        ("names", [one.name for one in listed]),
        ("addresses", [one.address or one.name for one in listed]),
    ):
        value, count = Counter(values).most_common(1)[0] if values else ("", 0)
        if count > 1:
            raise ValueError(f"{kind} of hosts must differ, got {value} {count} times")


def read_hosts(given: str) -> list[Host]:
    """Return the hosts of a file, or of a list that is given as it is.

    Args:
        given: a path, or YAML or JSON text that begins with ``[`` or ``{``. Both hold a list of
            hosts, or a mapping with it as ``hosts``.

    Raises:
        ConfigError: naming the host and the field that cannot be used.
    """
    text, where = given, "--hosts"
    if not given.lstrip().startswith(("[", "{")):
        path = Path(given)
        where = str(path)
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{where}: {(error.strerror or str(error)).lower()}") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"{where}: must be UTF-8 text, byte {error.start} is not") from None
    return [one.to_host() for one in parse_hosts(text, where)]


def parse_hosts(text: str, where: str) -> list[HostEntry]:
    """Return the hosts of a YAML or JSON text.

    Args:
        text: a list of hosts, or a mapping with it as ``hosts``.
        where: what an error names first.

    Raises:
        ConfigError: naming the host and the field that cannot be used.
    """
    try:
        document = yaml.load(text, Loader=_UniqueKeys)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{where}{line}: not valid YAML: {problem}") from None
    if isinstance(document, dict) and set(document) == {"hosts"}:
        document = document["hosts"]
    if not isinstance(document, list):
        raise ConfigError(
            f"{where}: must be a list of hosts, or a mapping with it as hosts, got "
            f"{type(document).__name__}"
        )
    if not document:
        raise ConfigError(f"{where}: must list at least one host, got none")
    entries = [_entry(one, f"{where}: host {at}", at) for at, one in enumerate(document, start=1)]
    try:
        check_distinct(entries)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None
    return entries


def _entry(given: Any, where: str, number: int) -> HostEntry:
    if not isinstance(given, dict):
        raise ConfigError(f"{where}: must be a mapping of fields, got {given!r:.60}")
    name = given.get("name")
    where += f" ({name})" if isinstance(name, str) else ""
    try:
        return HostEntry.model_validate_json(json.dumps(given, default=str), strict=True)
    except pydantic.ValidationError as error:
        problems = error.errors()
    first = problems[0]
    field = ".".join(map(str, first["loc"])) or "host"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    raise ConfigError(f"{where}: {field}: {_reason(first)}{more}")


def _reason(problem: Any) -> str:
    if problem["type"] == "extra_forbidden":
        model = GpusEntry if problem["loc"][0] == "gpus" else HostEntry
        return f"unknown field; known are {', '.join(model.model_fields)}"
    if problem["type"] == "missing":
        return "required field is missing"
    message: str = problem["msg"].removeprefix("Value error, ")
    message = f"{message[:1].lower()}{message[1:]}"
    return message if ", got " in message else f"{message}, got {problem['input']!r:.60}"


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would take the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value} is given twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def hosts_of(section: HostsSection, given: str | None = None) -> list[Host]:
    """Return the hosts that are listed; none where nothing is, which means this machine.

    Args:
        section: the settings.
        given: as for ``read_hosts``; it decides alone.

    Raises:
        ConfigError: as ``read_hosts``, or if the settings name hosts twice.
    """
    if given is not None:
        return read_hosts(given)
    if section.file and section.members:
        raise ConfigError("hosts.file and hosts.members are both given: leave one of them out")
    if section.file:
        return read_hosts(section.file)
    return [one.to_host() for one in section.members]


def this_machine(memory_bytes: int) -> Host:
    """Return this machine as a host.

    Args:
        memory_bytes: what silvershard may use of its memory.
    """
    return Host(
        name=socket.gethostname() or "localhost",
        cpus=float(len(os.sched_getaffinity(0))),
        memory_bytes=memory_bytes,
        address="127.0.0.1",
    )

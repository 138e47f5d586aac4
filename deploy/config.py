"""The configuration of a cluster: sections joined, read from YAML, overridden by the environment.

What decides, first match wins: an option of the command line, an environment variable such as
``SILVERSHARD__QUERY__MIN_COVERAGE=0.95``, the file, the default.
"""

import difflib
import json
import os
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, Union, get_args, get_origin

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from silvershard.cluster.config import (
    AdmissionSection,
    DegradeSection,
    HealthSection,
    HedgingSection,
    ListenSection,
    ObservabilitySection,
    PingSection,
    QuerySection,
    RetriesSection,
)
from silvershard.cluster.security_config import SecuritySection
from silvershard.cluster.table_config import TablesSection
from silvershard.deploy.config_sections import (
    AdminSection,
    ChaosSection,
    ControlSection,
    IndexSection,
    ModelSection,
    PathsSection,
    ReplicasSection,
    RuntimeSection,
    ShardingSection,
    SwapSection,
    UpdatesSection,
)
from silvershard.deploy.hosts import HostsSection
from silvershard.model.limits import COLUMN_MULTIPLES
from silvershard.model.training_config import TrainingConfig
from silvershard.shard.errors import ConfigError

ENV_PREFIX = "SILVERSHARD__"
_MOVED = {("listen", "insecure"): "security.insecure"}

Key = tuple[str | int, ...]


class Config(BaseModel):
    """Everything that a person can decide about a cluster."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    paths: PathsSection = Field(default=PathsSection(), description="where data come from")
    model: ModelSection = Field(default=ModelSection(), description="what is trained")
    training: TrainingConfig = Field(default=TrainingConfig(), description="how a model is trained")
    index: IndexSection = Field(default=IndexSection(), description="how items are indexed")
    sharding: ShardingSection = Field(
        default=ShardingSection(), description="how a generation is served"
    )
    hosts: HostsSection = Field(default=HostsSection(), description="machines to serve on")
    replicas: ReplicasSection = Field(
        default=ReplicasSection(), description="how copies are spread over the machines"
    )
    listen: ListenSection = Field(default=ListenSection(), description="where requests come in")
    security: SecuritySection = Field(
        default=SecuritySection(), description="who may reach the cluster"
    )
    query: QuerySection = Field(default=QuerySection(), description="limits of requests")
    ping: PingSection = Field(default=PingSection(), description="detection of hung shards")
    health: HealthSection = Field(
        default=HealthSection(), description="ejection of replicas that answer badly"
    )
    hedging: HedgingSection = Field(
        default=HedgingSection(), description="second calls where the first is slow"
    )
    retries: RetriesSection = Field(
        default=RetriesSection(), description="second calls where the first failed"
    )
    admission: AdmissionSection = Field(
        default=AdmissionSection(), description="which requests wait, run and are refused"
    )
    degrade: DegradeSection = Field(
        default=DegradeSection(), description="what is left out of requests under overload"
    )
    tables: TablesSection = Field(default=TablesSection(), description="where embedding tables lie")
    updates: UpdatesSection = Field(
        default=UpdatesSection(), description="how items change while they are served"
    )
    swap: SwapSection = Field(
        default=SwapSection(), description="how one generation takes over from another"
    )
    admin: AdminSection = Field(
        default=AdminSection(), description="where the admin plane is reached"
    )
    control: ControlSection = Field(
        default=ControlSection(), description="where it is written what shall be served"
    )
    observability: ObservabilitySection = Field(
        default=ObservabilitySection(), description="where a router answers probes"
    )
    chaos: ChaosSection = Field(
        default=ChaosSection(), description="faults that are injected on purpose"
    )
    runtime: RuntimeSection = Field(
        default=RuntimeSection(), description="how processes are started, watched and stopped"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._check_tables()
        return self

    def _check_tables(self) -> None:
        precision = self.index.table_precision
        multiples = {f"index.table_precision {precision}": COLUMN_MULTIPLES[precision]}
        if self.tables.remote:
            multiples["tables.remote"] = COLUMN_MULTIPLES["int8"]
        for cause, columns in multiples.items():
            if self.training.dim % columns:
                raise ValueError(
                    f"training.dim must be a multiple of {columns} with {cause}, "
                    f"got {self.training.dim}"
                )
        devices = list(self.sharding.devices)
        for key in ("sharding", "host_budget_mib"):
            value = getattr(self.tables, key)
            if value and (len(devices) == 1 or precision == "float32"):
                raise ValueError(
                    f"tables.{key} needs two or more sharding.devices, and int8 or int4 as "
                    f"index.table_precision, got {value} with {devices} and {precision}"
                )


class Setting(NamedTuple):
    """One key of the configuration, for tables and comments."""

    key: str
    """Full path, parts joined by dots."""
    type: str
    default: str
    """As YAML."""
    description: str


class Loaded(NamedTuple):
    """A configuration, and where each value that is no default came from."""

    config: Config
    sources: dict[str, str]
    """Full key path to ``config.yaml, line 3``, an environment variable or an option."""


class _Source(NamedTuple):
    where: str
    raw: str | None
    """Text of an environment variable, which may be meant as text though it reads as a number."""


def load(
    path: Path | None = None,
    *,
    environ: Mapping[str, str] = os.environ,
    options: Mapping[str, object] | None = None,
) -> Config:
    """Return the configuration of a file, with overrides applied.

    Args:
        path: YAML file; None for the defaults.
        environ: environment variables; those that begin with ``SILVERSHARD__`` override.
        options: values by full key path, such as ``{"sharding.shards": 3}``; they override all.

    Raises:
        ConfigError: naming the full path of the key and its line, variable or option.
    """
    return load_with_sources(path, environ=environ, options=options).config


def load_with_sources(
    path: Path | None = None,
    *,
    environ: Mapping[str, str] = os.environ,
    options: Mapping[str, object] | None = None,
) -> Loaded:
    """Return the configuration and where its values came from; arguments as for ``load``."""
    document: dict[str, Any] = {}
    sources: dict[Key, _Source] = {}
    if path is not None:
        document, lines = _read_yaml(path)
        sources = {key: _Source(f"{path}, line {line}", None) for key, line in lines.items()}
    for name in sorted(environ):
        if name.startswith(ENV_PREFIX):
            key = tuple(name.removeprefix(ENV_PREFIX).lower().split("__"))
            _put(document, sources, key, _scalar(environ[name]), _Source(f"${name}", environ[name]))
    for dotted, value in (options or {}).items():
        option = _Source(f"option for {dotted}", None)
        _put(document, sources, tuple(dotted.split(".")), value, option)
    config = _validate(document, sources)
    known = {setting.key for setting in settings()}
    named = {".".join(map(str, key)): source.where for key, source in sources.items()}
    return Loaded(config, {key: where for key, where in named.items() if key in known})


def _put(
    document: dict[str, Any],
    sources: dict[Key, _Source],
    key: tuple[str, ...],
    value: object,
    source: _Source,
) -> None:
    """Set a nested value; a key of which a part is no section is left for validation to refuse."""
    section = document
    for depth, part in enumerate(key[:-1], start=1):
        inner = section.setdefault(part, {})
        if not isinstance(inner, dict):
            inner = section[part] = {}
        sources.setdefault(key[:depth], source)
        section = inner
    section[key[-1]] = value
    for old in [one for one in sources if one[: len(key)] == key]:
        del sources[old]
    sources[key] = source


def _scalar(text: str) -> object:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _validate(document: dict[str, Any], sources: Mapping[Key, _Source]) -> Config:
    for _ in range(2):
        try:
            # Strict JSON rules: no number in quotes passes for a number, yet lists make tuples.
            return Config.model_validate_json(json.dumps(document, default=str), strict=True)
        except pydantic.ValidationError as error:
            problems = error.errors()
        retry = False
        for problem in problems:
            source = sources.get(problem["loc"])
            if problem["type"] == "string_type" and source and source.raw is not None:
                _place(document, problem["loc"], source.raw)
                retry = True
        if not retry:
            break
    raise _config_error(problems, sources)


def _place(document: dict[str, Any], key: Key, value: object) -> None:
    section: Any = document
    for part in key[:-1]:
        section = section[part]
    section[key[-1]] = value


def _config_error(problems: Sequence[Any], sources: Mapping[Key, _Source]) -> ConfigError:
    described = []
    for problem in problems:
        key: Key = problem["loc"]
        depth = len(key)
        while depth and key[:depth] not in sources:
            depth -= 1
        where = f"{sources[key[:depth]].where}: " if depth else ""
        described.append(f"{where}{_dotted(key)}: {_reason(problem)}")
    more = f" (and {len(described) - 1} more)" if len(described) > 1 else ""
    return ConfigError(described[0] + more)


def _dotted(key: Key) -> str:
    return ".".join(map(str, key)) or "top level"


def _reason(problem: Any) -> str:
    kind = problem["type"]
    if kind == "extra_forbidden":
        if now := _MOVED.get(problem["loc"]):
            return f"this key is {now} now"
        known = _section_keys(problem["loc"][:-1])
        close = difflib.get_close_matches(str(problem["loc"][-1]), known, 1)
        return "unknown key" + (
            f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"
        )
    if kind == "missing":
        return "required key is missing"
    message = problem["msg"].removeprefix("Value error, ")
    message = f"{message[:1].lower()}{message[1:]}"
    if ", got " in message:
        return message
    given = json.dumps(problem["input"], default=str)
    return f"{message}, got {given if len(given) <= 60 else given[:57] + '...'}"


def _section_keys(key: Key) -> list[str]:
    section: Any = Config
    for part in key:
        if isinstance(part, int):
            # Of a list of sections; all of them have the same keys.
            continue
        if get_origin(section) is dict:
            # The part is a name that a person chose.
            section = get_args(section)[1]
            continue
        choices = _sections(section)
        if len(choices) > 1:
            # The part is the kind of one of several sections.
            section = next(one for one in choices if one.model_fields["kind"].default == part)
        else:
            section = choices[0].model_fields[str(part)].annotation
    return list(_sections(section)[0].model_fields)


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """Return the sections that a type admits, itself or in a list."""
    if get_origin(annotation) is tuple:
        return _sections(get_args(annotation)[0])
    if get_origin(annotation) in (Annotated, Union, types.UnionType):
        parts = get_args(annotation)
        parts = parts[:1] if get_origin(annotation) is Annotated else parts
        return [section for part in parts for section in _sections(part)]
    is_section = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return [annotation] if is_section else []


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[Key, int]]:
    """Return the document and the 1-based line of every key in it."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: must be UTF-8 text, byte {error.start} is not") from None
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return {}, {}
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{path}, line {node.start_mark.line + 1}: must be a mapping of keys")
        lines = dict(_key_lines(path, node, ()))
        return loader.construct_document(node), lines
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{where}: not valid YAML: {problem}") from None
    finally:
        loader.dispose()


def _key_lines(path: Path, node: yaml.MappingNode, prefix: Key) -> Iterator[tuple[Key, int]]:
    seen: set[str] = set()
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        name = key_node.value
        if key_node.tag != "tag:yaml.org,2002:str":
            raise ConfigError(f"{path}, line {line}: {_dotted(prefix)}: a key must be plain text")
        key = (*prefix, name)
        if name in seen:
            raise ConfigError(f"{path}, line {line}: {_dotted(key)}: given twice")
        seen.add(name)
        yield key, line
        if isinstance(value_node, yaml.MappingNode):
            yield from _key_lines(path, value_node, key)
        elif isinstance(value_node, yaml.SequenceNode):
            for at, entry in enumerate(value_node.value):
                yield (*key, at), entry.start_mark.line + 1


def settings() -> list[Setting]:
    """Return every key of the configuration in order."""
    return [
        Setting(
            key=f"{name}.{key}",
            type=_type_name(field.annotation),
            default=_as_yaml(field.get_default(call_default_factory=True)),
            description=field.description or "",
        )
        for name, section in Config.model_fields.items()
        for key, field in _model_of(section.annotation).model_fields.items()
    ]


def _model_of(annotation: Any) -> type[BaseModel]:
    section: type[BaseModel] = annotation
    return section


def _type_name(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is tuple:
        return f"list of {_type_name(get_args(annotation)[0])}"
    if sections := _sections(annotation):
        kinds = [one.model_fields["kind"].default for one in sections if "kind" in one.model_fields]
        of_kind = f" of kind {' or '.join(f'`{kind}`' for kind in kinds)}" if kinds else ""
        nothing = " or null" if type(None) in get_args(annotation) else ""
        return f"section{of_kind}{nothing}"
    if origin is dict:
        return f"{_type_name(get_args(annotation)[1])} by name"
    if origin is Literal:
        return " or ".join(f"`{one}`" for one in get_args(annotation))
    if origin in (Union, types.UnionType):
        return " or ".join(_type_name(one) for one in get_args(annotation))
    names = {"str": "text", "int": "integer", "float": "number", "bool": "boolean"}
    return names[annotation.__name__]


def _as_yaml(value: object) -> str:
    if isinstance(value, tuple):
        plain: object = [_plain(one) for one in value]
    else:
        plain = _plain(value)
    text: str = yaml.safe_dump(plain, default_flow_style=True, width=1000)
    return text.removesuffix("\n").removesuffix("...").strip()


def _plain(value: object) -> object:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def to_yaml(loaded: Loaded) -> str:
    """Return the configuration as YAML that loads to itself, with what each key means."""
    lines: list[str] = []
    section = ""
    for setting in settings():
        name, key = setting.key.split(".")
        if name != section:
            lines += ["", f"{name}:"] if lines else [f"{name}:"]
            section = name
        value = _as_yaml(getattr(getattr(loaded.config, name), key))
        origin = loaded.sources.get(setting.key)
        lines.append(f"  # {setting.description}{f' [{origin}]' if origin else ''}")
        lines.append(f"  {key}: {value}")
    return "\n".join(lines) + "\n"


def keys_table() -> str:
    """Return all keys as a Markdown table; ``docs/operations.md`` holds it and a test compares."""
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    rows += [
        f"| `{one.key}` | {one.type} | `{one.default}` | {one.description} |" for one in settings()
    ]
    return "\n".join(rows) + "\n"

import json
from pathlib import Path

import pytest

from silvershard.deploy.config import load, load_with_sources, settings, to_yaml
from silvershard.deploy.hosts import (
    HostEntry,
    HostsSection,
    check_distinct,
    hosts_of,
    parse_hosts,
    parse_size,
    read_hosts,
    this_machine,
)
from silvershard.deploy.placement import Host
from silvershard.shard.errors import ConfigError

LISTED = """
- name: a
  address: 10.0.0.1
  cpus: 16
  memory: 64GiB
  gpus: {count: 4, memory: 80GiB}
  zone: east
  labels: {role: shard}
- {name: b, cpus: 2.5, memory: 1073741824, state: maintenance}
"""


def test_a_file_lists_hosts(tmp_path: Path) -> None:
    path = tmp_path / "hosts.yaml"
    path.write_text(LISTED)
    expected = [
        Host("a", 16.0, 64 << 30, 4, 80 << 30, "east", {"role": "shard"}, "up", "10.0.0.1"),
        Host("b", 2.5, 1 << 30, state="maintenance", address="b"),
    ]
    assert read_hosts(str(path)) == expected
    path.write_text(f"hosts:{LISTED}")
    assert read_hosts(str(path)) == expected


def test_json_does_too_and_so_does_the_list_itself() -> None:
    text = json.dumps([{"name": "a", "cpus": 1, "memory": "1.5 GiB"}])
    assert read_hosts(text) == [Host("a", 1.0, 3 << 29, address="a")]
    assert read_hosts("[{name: a, cpus: 1, memory: 2GB}]")[0].memory_bytes == 2 * 10**9


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "must list at least one host, got none"),
        ("{a: 1}", "must be a list of hosts, or a mapping with it as hosts, got dict"),
        ("[7]", "host 1: must be a mapping of fields, got 7"),
        ("[{name: a, cpus: 1}]", r"host 1 \(a\): memory: required field is missing"),
        ("[{cpus: 1, memory: 1GiB}]", "host 1: name: required field is missing"),
        (
            "[{name: a, cpus: 1, memory: 1GiB, gpu: 1}]",
            "gpu: unknown field; known are name, address, cpus, memory, gpus, zone, labels, state",
        ),
        (
            "[{name: a, cpus: 1, memory: 1GiB, gpus: {count: 1, memory: 1GiB, kind: x}}]",
            "gpus.kind: unknown field; known are count, memory",
        ),
        ("[{name: a, cpus: 0, memory: 1GiB}]", "cpus: input should be greater than 0, got 0"),
        ("[{name: a, cpus: '8', memory: 1GiB}]", "cpus: input should be a valid number, got '8'"),
        ("[{name: a, cpus: 1, memory: much}]", "memory: must be bytes, or a number with one of B"),
        ("[{name: a, cpus: 1, memory: 12}]", "memory: input should be greater than or equal to"),
        ("[{name: a b, cpus: 1, memory: 1GiB}]", "name: string should match pattern"),
        ("[{name: a, cpus: 1, memory: 1GiB, state: gone}]", "state: input should be 'up', 'maint"),
        ("[{name: a, cpus: 1, memory: 1GiB, address: 'a b'}]", "address: must be a host name or"),
        ("[{name: a, cpus: 1, cpus: 2, memory: 1GiB}]", "line 1: not valid YAML: cpus is given tw"),
        ("[{name: a", "line 1: not valid YAML"),
        (
            "[{name: a, cpus: 1, memory: 1GiB}, {name: a, cpus: 1, memory: 1GiB}]",
            "names of hosts must differ, got a 2 times",
        ),
        (
            "[{name: a, cpus: 1, memory: 1GiB}, {name: b, cpus: 1, memory: 1GiB, address: a}]",
            "addresses of hosts must differ, got a 2 times",
        ),
    ],
)
def test_what_cannot_be_used_is_named(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=rf"^--hosts.*: {said}|^--hosts, {said}"):
        read_hosts(text)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere: no such file or directory"):
        read_hosts(str(tmp_path / "nowhere"))
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"bytes: must be UTF-8 text, byte 0 is not"):
        read_hosts(str(tmp_path / "bytes"))


@pytest.mark.parametrize(
    ("given", "size"), [("5", 5), ("2KiB", 2048), ("1.5 MiB", 3 << 19), ("1TB", 10**12), (7, 7)]
)
def test_sizes_have_units(given: object, size: int) -> None:
    assert parse_size(given) == size


@pytest.mark.parametrize("given", ["", "GiB", "-1GiB", "1 gib", "1e3"])
def test_other_texts_are_no_sizes(given: str) -> None:
    with pytest.raises(ValueError, match="must be bytes, or a number with one of"):
        parse_size(given)


def test_the_settings_list_hosts_or_name_a_file(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("hosts:\n  members:\n  - {name: a, cpus: 1, memory: 1GiB}\n")
    assert hosts_of(load(config, environ={}).hosts) == [Host("a", 1.0, 1 << 30, address="a")]
    path = tmp_path / "hosts.yaml"
    path.write_text(LISTED)
    config.write_text(f"hosts: {{file: {path}}}\n")
    section = load(config, environ={}).hosts
    assert [host.name for host in hosts_of(section)] == ["a", "b"]
    assert [one.name for one in hosts_of(section, "[{name: x, cpus: 1, memory: 1GiB}]")] == ["x"]
    assert hosts_of(HostsSection()) == []
    both = section.model_copy(update={"members": tuple(parse_hosts(LISTED, "here"))})
    with pytest.raises(ConfigError, match="are both given: leave one of them out"):
        hosts_of(both)


@pytest.mark.parametrize(
    ("member", "said"),
    [
        ("{name: a, cpus: 1, memory: 1GiB, gpu: 1}", "hosts.members.0.gpu: unknown key; did you m"),
        ("{name: a, cpus: 1}", "hosts.members.0.memory: required key is missing"),
        ("{name: a, cpus: 1, memory: x}", "hosts.members.0.memory: must be bytes, or a number"),
    ],
)
def test_a_host_of_the_settings_that_cannot_be_used_is_named_with_its_line(
    tmp_path: Path, member: str, said: str
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(f"hosts:\n  members:\n  - {member}\n")
    with pytest.raises(ConfigError, match=rf"c.yaml, line 3: {said}"):
        load(config, environ={})


def test_hosts_of_the_settings_must_differ(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    member = "{name: a, cpus: 1, memory: 1GiB}"
    config.write_text(f"hosts: {{members: [{member}, {member}]}}\n")
    with pytest.raises(ConfigError, match="names of hosts must differ, got a 2 times"):
        load(config, environ={})
    check_distinct([HostEntry(name="a", cpus=1, memory=1 << 30)])


def test_this_machine_has_cpus_and_the_memory_it_is_given() -> None:
    host = this_machine(5 << 30)
    assert host.name
    assert host.cpus >= 1
    assert (host.memory_bytes, host.state) == (5 << 30, "up")


def test_settings_with_hosts_are_shown_so_that_they_load_to_themselves(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(
        "hosts:\n  members:\n  - {name: a, cpus: 2, memory: 1GiB, labels: {rack: '7'}}\n"
        "replicas: {placement: {spread: zone, labels: {rack: '7'}}}\n"
    )
    loaded = load_with_sources(config, environ={})
    shown = tmp_path / "shown.yaml"
    shown.write_text(to_yaml(loaded))
    assert load(shown, environ={}) == loaded.config
    types = {setting.key: setting.type for setting in settings()}
    assert types["hosts.members"] == "list of section"
    assert types["replicas.placement"] == "section"

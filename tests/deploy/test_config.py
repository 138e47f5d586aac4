import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from silvershard.cluster.config import QuerySection
from silvershard.deploy.config import (
    Config,
    keys_table,
    load,
    load_with_sources,
    settings,
    to_yaml,
)
from silvershard.model.limits import MAX_ANN_K
from silvershard.model.placement import Precision, word_columns
from silvershard.shard.errors import ConfigError

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def written(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return written


def test_without_a_file_everything_has_its_default() -> None:
    assert load(None, environ={}) == Config()


def test_an_empty_file_changes_nothing(write: Write) -> None:
    assert load(write("# nothing\n"), environ={}) == Config()


def test_a_file_sets_what_it_names(write: Write) -> None:
    path = write("sharding: {shards: 3, devices: [cpu, cpu]}\nquery:\n  min_coverage: 1\n")
    config = load(path, environ={})
    assert config.sharding.shards == 3
    assert config.sharding.devices == ("cpu", "cpu")
    assert config.query == QuerySection(min_coverage=1)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (
            "query:\n  min_coverag: 0.5\n",
            2,
            "query.min_coverag: unknown key; did you mean min_coverage?",
        ),
        (
            "listen:\n  insecure: true\n",
            2,
            "listen.insecure: this key is security.insecure now",
        ),
        ("shrding:\n  a: 3\n", 1, "shrding: unknown key; did you mean sharding?"),
        ("a: 1\n", 1, "a: unknown key; known are paths, model"),
        (
            "\nsharding:\n\n  shards: '3'\n",
            4,
            'sharding.shards: input should be a valid integer, got "3"',
        ),
        ("sharding:\n  shards: 0\n", 2, "sharding.shards: input should be greater than or equal"),
        (
            "sharding:\n  devices:\n   - cpu\n   - 3\n",
            4,
            "sharding.devices.1: input should be a valid string, got 3",
        ),
        ("sharding: 3\n", 1, "sharding: input should be"),
        ("sharding:\n  shards: 3\n  shards: 4\n", 3, "sharding.shards: given twice"),
        ("sharding:\n  - a: [\n", 3, "not valid YAML"),
        ("sharding:\n\tshards: 1\n", 2, "not valid YAML"),
        ("- a\n", 1, "must be a mapping of keys"),
        ("1: 2\n", 1, "a key must be plain text"),
    ],
)
def test_a_bad_key_is_named_with_its_path_and_line(
    write: Write, text: str, line: int, message: str
) -> None:
    path = write(text)
    with pytest.raises(ConfigError) as caught:
        load(path, environ={})
    assert str(caught.value).startswith(f"{path}, line {line}: ")
    assert message in str(caught.value)


def test_sections_of_several_kinds_are_read_shown_and_checked(write: Write) -> None:
    text = "training:\n  encoder: {kind: hstu, layers: 3}\n  ranker: {kind: mixture_of_logits}\n"
    config = load(write(text), environ={})
    assert (config.training.encoder.kind, config.training.encoder.layers) == ("hstu", 3)
    shown = to_yaml(load_with_sources(write(text), environ={}))
    assert load(write(shown), environ={}) == config
    for section, message in (
        ("encoder: {kind: hstu, leyers: 3}", r"line 2: .*leyers: unknown key; did you mean layers"),
        ("ranker: {kind: gru}", "line 2: training.ranker: .*does not match any of the expected"),
        ("half_life: .inf", "line 2: training.half_life: input should be a finite number"),
        ("encoder: {kind: hstu, heads: 3}", "encoder.heads must divide dim=64, got 3"),
        ("encoder: {kind: mean, max_length: 0}", "line 2: .*max_length: input should be greater"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(write(f"training:\n  {section}\n"), environ={})


def test_tables_of_the_user_tower_can_be_remote(write: Write) -> None:
    assert load(write("tables: {remote: [history]}\n"), environ={}).tables.remote == ("history",)


def test_limits_of_an_index_are_known_before_the_training(write: Write) -> None:
    for section, message in (
        ("page_slots: 100", "index.page_slots: input should be 64 or 128, got 100"),
        (f"ann_k: {MAX_ANN_K + 1}", f"index.ann_k: .* less than or equal to {MAX_ANN_K}, got"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(write(f"index: {{{section}}}\n"), environ={})
    index = load(write(f"index: {{page_slots: 128, ann_k: {MAX_ANN_K}}}\n"), environ={}).index
    assert (index.page_slots, index.ann_k) == (128, MAX_ANN_K)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_dimension_fits_the_precision_of_the_tables(precision: Precision) -> None:
    def config(dim: int) -> Config:
        return load(options={"training.dim": dim, "index.table_precision": precision}, environ={})

    columns = word_columns(precision)
    assert config(3 * columns).training.dim == 3 * columns
    message = rf"training\.dim must be a multiple of {columns} with .* {precision}, got 30"
    with pytest.raises(ConfigError, match=message):
        config(30)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"training.dim": 30, "tables.remote": ["history"]},
            r"training\.dim must be a multiple of 4 with tables\.remote, got 30",
        ),
        (
            {"tables.remote": ["history", "recent", "history"]},
            r'tables\.remote: must name each table once, got \["history", "recent", "history"\]',
        ),
        (
            {"tables.sharding": {"history": "row"}, "index.table_precision": "int8"},
            r"tables\.sharding needs two or more sharding\.devices, .* with \['cpu'\] and int8",
        ),
        (
            {"tables.sharding": {"history": "row"}, "sharding.devices": ["cpu", "cpu"]},
            r"tables\.sharding needs .* int8 or int4 as index\.table_precision, got .* and float32",
        ),
        (
            {"tables.host_budget_mib": 9, "index.table_precision": "int8"},
            r"tables\.host_budget_mib needs two or more .*, got 9 with \['cpu'\] and int8",
        ),
        (
            {"tables.host_budget_mib": 9, "sharding.devices": ["cpu", "cpu"]},
            r"tables\.host_budget_mib needs .* got 9 with \['cpu', 'cpu'\] and float32",
        ),
    ],
)
def test_settings_of_tables_that_cannot_work_are_refused(
    options: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load(options=options, environ={})


@pytest.mark.parametrize(
    "options",
    [
        {"training.dim": 30},
        {"training.dim": 12, "tables.remote": ["history", "recent"]},
        {
            "index.table_precision": "int4",
            "sharding.devices": ["cpu", "cpu"],
            "tables.sharding": {"history": "row"},
            "tables.host_budget_mib": 9,
        },
    ],
)
def test_settings_of_tables_that_fit_each_other_are_taken(options: dict[str, object]) -> None:
    shown = load(options=options, environ={}).model_dump(mode="json")
    for key, value in options.items():
        section, name = key.split(".")
        assert shown[section][name] == value


def test_all_problems_are_counted(write: Write) -> None:
    with pytest.raises(ConfigError, match=r"\(and 2 more\)$"):
        load(write("a: 1\nb: 2\nc: 3\n"), environ={})


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.yaml: No such file"):
        load(tmp_path / "missing.yaml", environ={})
    (tmp_path / "binary.yaml").write_bytes(b"a: \xff\n")
    with pytest.raises(ConfigError, match="must be UTF-8"):
        load(tmp_path / "binary.yaml", environ={})


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"SILVERSHARD__QUERY__MIN_COVERAGE": "0.95"}, {"query": {"min_coverage": 0.95}}),
        ({"SILVERSHARD__SHARDING__DEVICES": "[cpu, cpu]"}, {"sharding": {"devices": ["cpu"] * 2}}),
        ({"SILVERSHARD__PATHS__DATA": "25"}, {"paths": {"data": "25"}}),
        ({"SILVERSHARD__SECURITY__INSECURE": "true"}, {"security": {"insecure": True}}),
        ({"SILVERSHARD_STATE": "x", "OTHER__A": "1"}, {}),
    ],
)
def test_the_environment_overrides(environ: Mapping[str, str], expected: Any) -> None:
    assert load(None, environ=environ) == Config.model_validate(expected)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("QUERY__MIN_COVERAG", "1", "query.min_coverag: unknown key; did you mean min_coverage?"),
        ("QUERY__MIN_COVERAGE", "high", "query.min_coverage: input should be a valid number"),
        ("QUERY", "1", "query: input should be"),
    ],
)
def test_a_bad_variable_is_named(name: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, environ={f"SILVERSHARD__{name}": value})
    assert str(caught.value).startswith(f"$SILVERSHARD__{name}: {message}")


def test_options_beat_the_environment_which_beats_the_file(write: Write) -> None:
    path = write("sharding: {shards: 3, threads: 3}\nlisten: {port: 3}\n")
    environ = {"SILVERSHARD__SHARDING__SHARDS": "5", "SILVERSHARD__SHARDING__THREADS": "5"}
    loaded = load_with_sources(path, environ=environ, options={"sharding.shards": 7})
    assert (loaded.config.sharding.shards, loaded.config.sharding.threads) == (7, 5)
    assert loaded.sources == {
        "sharding.shards": "option for sharding.shards",
        "sharding.threads": "$SILVERSHARD__SHARDING__THREADS",
        "listen.port": f"{path}, line 2",
    }


def test_a_bad_option_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^option for sharding\.shards: sharding\.shards: "):
        load(None, environ={}, options={"sharding.shards": 0})


def test_what_is_shown_loads_to_itself(write: Write) -> None:
    environ = {"SILVERSHARD__SHARDING__SHARDS": "5", "SILVERSHARD__PATHS__DATA": "a: b #c"}
    loaded = load_with_sources(None, environ=environ)
    assert load(write(to_yaml(loaded)), environ={}) == loaded.config


def test_what_is_shown_says_where_a_value_came_from() -> None:
    loaded = load_with_sources(None, environ={"SILVERSHARD__LISTEN__PORT": "9"})
    assert re.search(r"# gRPC port.*\[\$SILVERSHARD__LISTEN__PORT\]\n  port: 9", to_yaml(loaded))


def test_every_key_is_described_and_in_the_schema() -> None:
    schema = Config.model_json_schema()
    json.dumps(schema)
    for setting in settings():
        section, key = setting.key.split(".")
        assert setting.description, setting.key
        definition = schema["properties"][section].get("$ref", "").rpartition("/")[2]
        assert key in schema["$defs"][definition]["properties"]


def test_the_operations_page_has_the_table_of_all_keys() -> None:
    page = Path(__file__).parents[2] / "docs" / "operations.md"
    assert keys_table() in page.read_text(encoding="utf-8")

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from silvershard.cluster import ItemDelete, ItemPatch, ItemUpsert
from silvershard.deploy import update_files
from silvershard.deploy.errors import CommandError
from silvershard.deploy.update_files import Entry, JsonLines, ParquetRows, open_updates


def write_lines(path: Path, *lines: Any) -> Path:
    texts = [one if isinstance(one, bytes) else json.dumps(one).encode() for one in lines]
    path.write_bytes(b"".join(text + b"\n" for text in texts))
    return path


def write_rows(path: Path, row_group_size: int = 1 << 20, **columns: Any) -> Path:
    named = {name.replace("__", "."): values for name, values in columns.items()}
    parquet.write_table(pyarrow.table(named), path, row_group_size=row_group_size)
    return path


def test_every_line_is_an_update(tmp_path: Path) -> None:
    documents = [
        {"op": "upsert", "item_id": 5, "attributes": {"genre": ["Drama"]}, "ttl_s": 3.5},
        {"op": "patch", "item_id": 6, "signals": {"views": 3}, "version": 9, "if_version": 8},
        {"op": "delete", "item_id": 7, "urgent": True},
        {"item_id": 8, "fields": {"title": None}},
    ]
    path = write_lines(tmp_path / "updates.jsonl", *documents)
    entries = list(JsonLines(path).entries())
    assert [one.update for one in entries] == [
        ItemUpsert(5, attributes={"genre": ["Drama"]}, ttl_s=3.5),
        ItemPatch(6, signals={"views": 3}, version=9, if_version=8),
        ItemDelete(7, urgent=True),
        ItemUpsert(8, fields={"title": None}),
    ]
    assert [one.number for one in entries] == [1, 2, 3, 4]
    assert [one.record for one in entries] == documents
    assert entries[-1].end == JsonLines(path).size == path.stat().st_size


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "a line must be JSON"),
        (b"\xff\xfe", "a line must be UTF-8"),
        (b"[" * 100_000, "nested so deep"),
        (b"5", "must be a JSON object, got 5"),
        (b'{"op": "rename", "item_id": 5}', "op: must be upsert, patch, delete, got 'rename'"),
        (b'{"op": "delete", "item_id": 5, "signals": {}}', "signals: is no key"),
        (b'{"attributes": {}}', "item_id: must be given"),
    ],
)
def test_a_line_that_is_no_update_is_told_and_read_past(
    tmp_path: Path, line: bytes, reason: str
) -> None:
    path = write_lines(tmp_path / "updates.jsonl", {"item_id": 1}, line, {"item_id": 2})
    first, wrong, last = JsonLines(path).entries()
    assert (wrong.update, wrong.number) == (None, 2)
    assert reason in wrong.reason
    json.dumps(wrong.record)
    assert first.update == ItemUpsert(1)
    assert (last.update, last.number) == (ItemUpsert(2), 3)


def test_a_line_that_is_too_long_is_told_and_read_past(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(update_files, "MAX_LINE_BYTES", 40)
    lines = [{"item_id": 1}, b"x" * 40, b"x" * 41, b"y" * 500, {"item_id": 2}, b"z" * 90]
    path = write_lines(tmp_path / "updates.jsonl", *lines)
    entries = list(JsonLines(path).entries())
    assert [one.number for one in entries] == [1, 2, 3, 4, 5, 6]
    assert [one.update for one in entries] == [
        ItemUpsert(1),
        *[None] * 3,
        ItemUpsert(2),
        None,
    ]
    for at in (1, 2, 3, 5):
        assert "at most 40 bytes" in entries[at].reason
    assert entries[-1].end == path.stat().st_size


def test_blank_lines_count_and_say_nothing(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "updates.jsonl", b"", {"item_id": 1}, b"  ", {"item_id": 2})
    assert [one.number for one in JsonLines(path).entries()] == [2, 4]


def test_a_last_line_without_an_end_is_read(tmp_path: Path) -> None:
    path = tmp_path / "updates.jsonl"
    path.write_bytes(b'{"item_id": 1}\n{"item_id": 2}')
    assert [one.update for one in JsonLines(path).entries()] == [ItemUpsert(1), ItemUpsert(2)]


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    return write_lines(
        tmp_path / "updates.jsonl", *[{"item_id": at} for at in range(20)], b"", b"nonsense"
    )


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "updates.parquet", 7, item_id=list(range(20)))


@pytest.mark.parametrize("name", ["lines", "rows"])
def test_reading_goes_on_behind_any_record(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(update_files, "_ROWS_AT_ONCE", 3)
    path = request.getfixturevalue(name)
    whole: list[Entry] = list(open_updates(path).entries())
    for at, entry in enumerate(whole, 1):
        assert list(open_updates(path).entries(entry.end, entry.number)) == whole[at:]
    assert list(open_updates(path).entries(0, 0)) == whole
    assert whole[-1].end == open_updates(path).size


def test_a_row_is_an_upsert_without_what_is_null(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(update_files, "_ROWS_AT_ONCE", 2)
    path = write_rows(
        tmp_path / "updates.parquet",
        item_id=[1, 2, None],
        attributes__genre=[["Drama", "Comedy"], None, []],
        attributes__year=pyarrow.array([1994, None, 3], pyarrow.int16()),
        signals__views=pyarrow.array([0.5, 2.0, None], pyarrow.float32()),
        fields__title=pyarrow.array(["A", None, "B"]).dictionary_encode(),
        features__scale=[[1.0, 2.5], [0.0, -1.0], None],
        version=[7, None, None],
        if_version=[None, 3, None],
        ttl_s=[None, 60.0, None],
    )
    first, second, third = open_updates(path).entries()
    assert first.update == ItemUpsert(
        1,
        attributes={"genre": ["Drama", "Comedy"], "year": 1994},
        signals={"views": 0.5},
        fields={"title": "A"},
        features={"scale": [1.0, 2.5]},
        version=7,
    )
    assert second.update == ItemUpsert(
        2, signals={"views": 2.0}, features={"scale": [0.0, -1.0]}, ttl_s=60.0, if_version=3
    )
    assert (third.update, third.number) == (None, 3)
    assert third.reason == "item_id: must be given"
    assert third.record == {
        "op": "upsert",
        "attributes": {"genre": [], "year": 3},
        "fields": {"title": "B"},
    }


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"item_id": [1], "genre": [["Drama"]]}, "column 'genre' is no part of an upsert"),
        ({"item_id": [1], "attributes__": [1]}, "column 'attributes.' is no part"),
        ({"item_id": [1], "version__x": [1]}, "column 'version.x' is no part"),
        ({"item_id": [1], "op": ["delete"]}, "column 'op' is no part"),
        ({"item_id": [1], "fields__seen": [True]}, "must hold integers, .* got bool"),
        ({"item_id": [1], "attributes": [{"a": 1}]}, "column 'attributes' is no part"),
        ({"item_id": [1], "features__x": [[[1.0]]]}, "must hold integers, .* got list"),
        ({"attributes__year": [1]}, "must have a column item_id"),
    ],
)
def test_a_column_that_is_no_part_of_an_upsert_is_refused(
    tmp_path: Path, columns: dict[str, Any], said: str
) -> None:
    path = write_rows(tmp_path / "updates.parquet", **columns)
    with pytest.raises(CommandError, match=said):
        open_updates(path)


def test_the_first_bytes_tell_the_format(lines: Path, rows: Path) -> None:
    assert isinstance(open_updates(lines), JsonLines)
    assert isinstance(open_updates(rows), ParquetRows)
    assert isinstance(open_updates(rows, "jsonl"), JsonLines)
    with pytest.raises(CommandError, match="cannot be read as Parquet"):
        open_updates(lines, "parquet")


def test_a_damaged_parquet_file_is_told_in_words(rows: Path) -> None:
    content = bytearray(rows.read_bytes())
    content[4:60] = b"\xff" * 56
    rows.write_bytes(content)
    with pytest.raises(CommandError, match="rows behind 0 cannot be read"):
        list(open_updates(rows).entries())
    rows.write_bytes(content[: len(content) // 2])
    with pytest.raises(CommandError, match="cannot be read as Parquet"):
        open_updates(rows)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="cannot be read: No such file"):
        open_updates(tmp_path / "missing.jsonl")


def test_parquet_without_pyarrow_says_what_to_install(
    rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(CommandError, match=r"pip install 'silvershard\[parquet\]'"):
        open_updates(rows)


def test_a_mark_tells_a_file_from_another_and_not_from_itself_grown(
    lines: Path, rows: Path
) -> None:
    one = JsonLines(lines)
    mark, end = one.mark(one.size), one.size
    with lines.open("ab") as file:
        file.write(b'{"item_id": 99}\n')
    assert one.mark(end) == mark
    lines.write_bytes(lines.read_bytes().replace(b"5", b"6"))
    assert one.mark(end) != mark
    mark = open_updates(rows).mark(3)
    write_rows(rows, 7, item_id=list(range(1, 21)))
    assert open_updates(rows).mark(3) != mark

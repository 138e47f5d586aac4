import argparse
import json
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from silvershard.cluster import ApplyResult, RequestRefused, UpdateRejection
from silvershard.deploy.errors import CommandError
from silvershard.deploy.ingest import Ingest, add_options, render, run_ingest
from silvershard.shard.errors import StateError

Parse = Callable[..., argparse.Namespace]


@pytest.fixture
def parse() -> Parse:
    """``parse("updates.jsonl", "--rate", "5")`` gives the options of the verb."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--timeout", type=float)
    verbs = parser.add_subparsers()

    def verb(name: str, text: str, run: Any) -> argparse.ArgumentParser:
        assert (name, run) == ("ingest", run_ingest)
        return verbs.add_parser(name, help=text)

    add_options(verb)
    return lambda *words: parser.parse_args(["ingest", *map(str, words)])


class Items:
    """What a cluster holds after all calls; it refuses items whose id ends in 13.

    Every ``fails_every``-th call is refused for good.
    """

    def __init__(self) -> None:
        self.held: dict[int, Any] = {}
        self.calls: list[int] = []
        self.seen: Counter[int] = Counter()
        self.fails_every = 0
        self._lock = threading.Lock()

    def apply(self, updates: Sequence[Any]) -> ApplyResult:
        with self._lock:
            self.calls.append(len(updates))
            if self.fails_every and len(self.calls) % self.fails_every == 0:
                raise RequestRefused("INTERNAL", "a bug")
            wrong = []
            for at, update in enumerate(updates):
                if update.item_id % 100 == 13:
                    wrong.append(UpdateRejection(at, "INVALID_ARGUMENT", "an unlucky item"))
                else:
                    self.held[update.item_id] = update
                    self.seen[update.item_id] += 1
            return ApplyResult((), tuple(wrong))


@pytest.fixture
def items() -> Items:
    return Items()


def write_lines(path: Path, item_ids: Sequence[int]) -> Path:
    text = "".join(json.dumps({"op": "patch", "item_id": one}) + "\n" for one in item_ids)
    path.write_text(text)
    return path


def letters(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_files_are_read_in_their_order_and_every_update_is_sent(
    parse: Parse, items: Items, tmp_path: Path
) -> None:
    lines = write_lines(tmp_path / "a.jsonl", range(1000))
    rows = tmp_path / "b.parquet"
    table = pyarrow.table({"item_id": [5, 2000], "attributes.year": [1994, 2001]})
    parquet.write_table(table, rows)
    document = Ingest(parse(lines, rows, "--batch", "64")).send(items.apply)
    assert sorted(items.held) == [
        *(one for one in range(1000) if one % 100 != 13),
        2000,
    ]
    assert items.held[5].attributes == {"year": 1994}
    assert (document["accepted"], document["rejected"]) == (992, 10)
    assert max(items.calls) == 64
    assert document["reasons"][0] == f"{lines}:14: INVALID_ARGUMENT: an unlucky item"
    assert len(document["reasons"]) == 5


def test_what_is_not_accepted_is_written_with_its_place_and_reason(
    parse: Parse, items: Items, tmp_path: Path
) -> None:
    path, dead = tmp_path / "a.jsonl", tmp_path / "dead.jsonl"
    path.write_bytes(
        b'{"item_id": 1}\n{"item_id": 13, "fields": {"title": "\xc3\xa9"}}\n\n{"item\xff\n'
        b'{"item_id": 2, "op": "move"}\n{"item_id": 3}\n'
    )
    document = Ingest(parse(path, "--dead-letter", dead)).send(items.apply)
    assert sorted(items.held) == [1, 3]
    assert (document["accepted"], document["rejected"]) == (2, 3)
    rejected, unreadable, unknown = letters(dead)
    assert rejected == {
        "file": str(path),
        "number": 2,
        "reason": "INVALID_ARGUMENT: an unlucky item",
        "record": {"item_id": 13, "fields": {"title": "é"}},
    }
    assert (unreadable["number"], unreadable["reason"]) == (4, "a line must be UTF-8")
    assert unreadable["record"] == '{"item\N{REPLACEMENT CHARACTER}'
    assert (unknown["number"], unknown["record"]["op"]) == (5, "move")
    assert unknown["reason"].startswith("op: must be")


def test_an_ingest_that_stopped_goes_on_where_it_was(
    parse: Parse, items: Items, tmp_path: Path
) -> None:
    first = write_lines(tmp_path / "a.jsonl", range(500))
    second = write_lines(tmp_path / "b.jsonl", range(500, 1000))
    dead, resume = tmp_path / "dead.jsonl", tmp_path / "resume.json"
    options = parse(first, second, "--batch", "10", "--resume", resume, "--dead-letter", dead)
    items.fails_every, stops, older = 20, 0, ""
    while stops < 100:
        try:
            document = Ingest(options).send(items.apply)
            break
        except RequestRefused:
            stops += 1
            older = older or resume.read_text()
    assert stops > 3
    assert len(items.held) == 990
    assert (document["accepted"], document["rejected"]) == (990, 10)
    assert document["accepted_before"] > 0
    # What was under way at a stop is sent again, and nothing else.
    assert sum(items.seen.values()) <= 990 + stops * 4 * 10
    items.fails_every = 0
    assert [one["record"]["item_id"] for one in letters(dead)] == list(range(13, 1000, 100))
    # As if it had been killed before it could remember the last part.
    resume.write_text(older)
    assert Ingest(options).send(items.apply)["accepted"] == 990
    assert [one["record"]["item_id"] for one in letters(dead)] == list(range(13, 1000, 100))
    again = Ingest(options).send(items.apply)
    assert (again["accepted"], again["accepted_before"]) == (990, 990)
    with second.open("a") as file:
        file.write('{"item_id": 5000}\n')
    assert Ingest(options).send(items.apply)["accepted"] == 991
    assert 5000 in items.held


INGEST = """
import argparse, os, sys
from silvershard.cluster import ApplyResult
from silvershard.deploy import ingest
out = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def apply(updates):
    os.write(out, b"".join(b"%d\\n" % one.item_id for one in updates))
    return ApplyResult((), ())
ingest._SAVE_EVERY_S = 0.01
parser = argparse.ArgumentParser()
ingest.add_options(lambda name, text, run: parser)
ingest.Ingest(parser.parse_args(sys.argv[2:])).send(apply)
"""


def test_an_ingest_that_was_killed_loses_nothing(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [at % 5000 for at in range(20_000)])
    resume, out = tmp_path / "resume.json", tmp_path / "sent"
    words = [str(path), "--batch", "20", "--resume", str(resume)]
    command = [sys.executable, "-P", "-c", INGEST, str(out), *words]
    process = subprocess.Popen(command)
    try:
        while not resume.exists() or json.loads(resume.read_text())["accepted"] == 0:
            assert process.poll() is None
            threading.Event().wait(0.002)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    reached = json.loads(resume.read_text())["accepted"]
    assert 0 < reached < 20_000
    subprocess.run(command, check=True)
    sent = [int(line) for line in out.read_text().split()]
    assert len(sent) < 20_000 + 4000
    counts = Counter(sent)
    assert len(counts) == 5000
    assert min(counts.values()) == 4
    assert json.loads(resume.read_text())["accepted"] == 20_000


def test_a_resume_file_of_other_files_is_refused(
    parse: Parse, items: Items, tmp_path: Path
) -> None:
    path, other = (write_lines(tmp_path / name, range(50)) for name in ("a.jsonl", "b.jsonl"))
    resume = tmp_path / "resume.json"
    Ingest(parse(path, "--resume", resume)).send(items.apply)
    with pytest.raises(CommandError, match=r"is of an ingest of .*a.jsonl: name the same files"):
        Ingest(parse(other, "--resume", resume))
    path.write_text(path.read_text().replace("7", "8"))
    with pytest.raises(CommandError, match=r"is not the file that resume file .* speaks of"):
        Ingest(parse(path, "--resume", resume))
    path.write_text("")
    with pytest.raises(CommandError, match="is not the file"):
        Ingest(parse(path, "--resume", resume))


def test_a_damaged_resume_file_is_told(parse: Parse, tmp_path: Path) -> None:
    path, resume = write_lines(tmp_path / "a.jsonl", range(5)), tmp_path / "resume.json"
    resume.write_text('{"format": 1')
    with pytest.raises(StateError, match="resume file"):
        Ingest(parse(path, "--resume", resume))


def test_a_dry_run_sends_nothing_and_finds_what_has_no_form(parse: Parse, tmp_path: Path) -> None:
    path, dead, resume = (tmp_path / name for name in ("a.jsonl", "dead.jsonl", "resume.json"))
    path.write_text(
        '{"item_id": 1}\n{"item_id": -4}\n{"item_id": 2, "attributes": {"a": [1, "b"]}}\n5\n'
    )

    def address() -> str:
        raise AssertionError("nothing is sent")

    words = ("--dry-run", "--dead-letter", dead, "--resume", resume)
    document = run_ingest(parse(path, *words), address)
    assert (document["accepted"], document["rejected"], document["dry_run"]) == (1, 3, True)
    assert [one["number"] for one in letters(dead)] == [2, 3, 4]
    assert not resume.exists()
    assert "1 updates could be sent, 3 records rejected" in render(document)


def test_a_low_rate_is_kept_by_small_batches(parse: Parse, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", range(40))
    sizes = [len(batch) for _, batch in Ingest(parse(path, "--rate", "50/s"))._batches()]
    assert sizes == [5] * 8


def test_the_answer_says_where_the_rejected_are(parse: Parse, items: Items, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", range(1000))
    text = render(Ingest(parse(path)).send(items.apply))
    assert "990 updates accepted, 10 records rejected" in text
    assert text.splitlines()[-1] == "  … all of them: use --dead-letter FILE"
    dead = tmp_path / "dead.jsonl"
    text = render(Ingest(parse(path, "--dead-letter", dead)).send(items.apply))
    assert text.splitlines()[-1] == f"  … all of them: {dead}"


@pytest.mark.parametrize(
    "words",
    [
        ("--rate", "0"),
        ("--rate", "fast"),
        ("--rate", "inf/s"),
        ("--batch", "0"),
        ("--batch", "10001"),
        ("--format", "csv"),
        ("--give-up", "-1"),
    ],
)
def test_an_impossible_option_is_wrong_usage(
    parse: Parse, words: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("a.jsonl", *words)
    assert caught.value.code == 2
    assert words[0] in capsys.readouterr().err


def test_a_dead_letter_file_is_added_to(parse: Parse, items: Items, tmp_path: Path) -> None:
    path, dead = write_lines(tmp_path / "a.jsonl", [13]), tmp_path / "dead.jsonl"
    for _ in range(2):
        Ingest(parse(path, "--dead-letter", dead)).send(items.apply)
    assert len(letters(dead)) == 2

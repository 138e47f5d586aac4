"""The verb ``ingest``: feeds files of updates to a running cluster.

What was sent and answered is remembered in a resume file, so that an ingest that was killed goes on
there. The last half second is sent twice then: harmless, unless the updates have an ``if_version``,
or no versions of their own while others change the same items.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from pydantic import BaseModel, ConfigDict, Field
from tqdm import tqdm

from silvershard.deploy.access import access_options, dialer_of
from silvershard.deploy.arguments import state_of
from silvershard.deploy.errors import CommandError, ExitCode

FORMAT = 1
MAX_BATCH = 10_000
_SENDS_PER_S = 10
_SAVE_EVERY_S = 0.5
_SHOWN_REASONS = 5
_TIMEOUT_S = 10.0


def add_options(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Declare the options of the verb.

    Args:
        verb: given a name, a text and the function that runs it, adds a parser that knows the
            state directory, the time limit and the form of the output.
    """
    parser = verb("ingest", "feed files of updates to a running cluster", run_ingest)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="read in this order")
    parser.add_argument(
        "--format",
        choices=("auto", "parquet", "jsonl"),
        default="auto",
        help="of the files: Parquet with one upsert per row, or one JSON object per line",
    )
    parser.add_argument("--rate", type=_rate, metavar="N/s", help="most updates per second")
    parser.add_argument(
        "--batch", type=_batch, default=500, metavar="N", help="updates per call (default 500)"
    )
    parser.add_argument(
        "--dead-letter",
        type=Path,
        metavar="FILE",
        help="where to write records that are no update or are rejected, with the reason",
    )
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="FILE",
        help="where to remember how far it came; if it is there already, go on from it",
    )
    parser.add_argument(
        "--give-up",
        type=_seconds,
        default=300.0,
        metavar="S",
        help="stop when the cluster accepted nothing for so long (default 300)",
    )
    parser.add_argument("--dry-run", action="store_true", help="read and check, and send nothing")
    parser.add_argument("--address", default="", metavar="HOST:PORT", help="router to send to")
    access_options(parser)


def _rate(text: str) -> float:
    return _seconds(text.removesuffix("/s"))


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text}")
    return value


def _batch(text: str) -> int:
    value = int(text)
    if not 1 <= value <= MAX_BATCH:
        raise argparse.ArgumentTypeError(f"must be 1 to {MAX_BATCH}, got {text}")
    return value


class Progress(BaseModel):
    """How far an ingest came: the resume file."""

    model_config = ConfigDict(extra="forbid")

    format: int = Field(default=FORMAT, description="of this file")
    files: list[str] = Field(description="absolute paths, in the order in which they are read")
    file: int = Field(default=0, description="which of the files is being read, from 0")
    end: int = Field(default=0, description="bytes or rows of it that are settled")
    number: int = Field(default=0, description="line or row that ends there")
    mark: str = Field(default="", description="hash that tells the file from another one")
    accepted: int = Field(default=0, description="updates that are durable")
    rejected: int = Field(default=0, description="records that are none, or were rejected")
    dead_letter_bytes: int = Field(default=0, description="length of the dead-letter file")


def run_ingest(options: argparse.Namespace, address: Callable[[], str]) -> dict[str, Any]:
    """Carry out the verb and return what became of it.

    Args:
        options: as declared.
        address: returns the router to send to.

    Raises:
        CommandError: if a file cannot be read, or the resume file is of another ingest.
        TimedOut: if the cluster accepted nothing for too long.
        RequestRefused: if the cluster refuses updates for good.
        StateError: if the resume file is damaged, or cannot be written.
    """
    from silvershard.cluster import Client

    ingest = Ingest(options)
    if options.dry_run:
        return ingest.check()
    timeout_s, dialer = options.timeout or _TIMEOUT_S, dialer_of(options, state_of(options))
    with Client(address(), timeout_s=timeout_s, dialer=dialer) as client:
        return ingest.send(client.apply)


def render(document: dict[str, Any]) -> str:
    """Return what became of an ingest for people."""
    what = "could be sent" if document["dry_run"] else "accepted"
    lines = [
        f"{document['accepted']} updates {what}, {document['rejected']} records rejected, "
        f"{document['seconds']:.1f} s, {document['per_second']:.0f} updates/s"
    ]
    lines += [f"  {reason}" for reason in document["reasons"]]
    if document["rejected"] > len(document["reasons"]):
        lines.append(f"  … all of them: {document['dead_letter'] or 'use --dead-letter FILE'}")
    return "\n".join(lines)


class Ingest:
    """One run of the verb."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Open the files, and find out how far an ingest of them came.

        Raises:
            CommandError: as ``run_ingest``.
            StateError: as ``run_ingest``.
        """
        from silvershard.deploy.update_files import open_updates

        self._files = [open_updates(path, options.format) for path in options.files]
        self._options = options
        self._resume: Path | None = None if options.dry_run else options.resume
        self._progress = self._last_progress()
        self._before = self._progress.accepted
        self._reasons: list[str] = []
        self._letters: IO[bytes] | None = None
        self._saved_s = -math.inf

    def _last_progress(self) -> Progress:
        from silvershard.cluster.map_file import read_map

        paths = [str(path.resolve()) for path in self._options.files]
        if self._resume is None or not self._resume.exists():
            return Progress(files=paths)
        found = read_map(Progress, self._resume, "resume file")
        if found.format != FORMAT or found.files != paths:
            raise CommandError(
                f"resume file {self._resume} is of an ingest of {', '.join(found.files)}: name "
                "the same files in the same order, or another resume file",
                ExitCode.USAGE,
            )
        if found.file < len(paths):
            one = self._files[found.file]
            if one.size < found.end or one.mark(found.end) != found.mark:
                raise CommandError(
                    f"{one.path} is not the file that resume file {self._resume} speaks of: "
                    "remove the latter to read all files again"
                )
        return found

    def check(self) -> dict[str, Any]:
        """Read all records, send none, and return what would be sent."""
        from silvershard.cluster.update_message import mutation_to

        began_s = time.monotonic()
        with self._dead_letters(), self._bar() as bar:
            for file, batch in self._batches():
                for entry in batch:
                    try:
                        if entry.update is None:
                            raise ValueError(entry.reason)
                        mutation_to(entry.update)
                        self._progress.accepted += 1
                    except ValueError as error:
                        self._reject(file, entry, str(error))
                self._reached(file, batch[-1], bar)
        return self._document(began_s)

    def send(self, apply: Callable[[Sequence[Any]], Any]) -> dict[str, Any]:
        """Send all records that are updates, and return what became of them.

        Raises:
            TimedOut: as ``run_ingest``.
            RequestRefused: as ``run_ingest``.
        """
        from silvershard.deploy.update_feed import Delivery, Feed

        began_s = time.monotonic()
        sent: deque[int] = deque()

        def settled(delivery: Delivery) -> None:
            file = sent.popleft()
            for entry in delivery.batch:
                reason = delivery.rejected.get(entry.number)
                if reason is None:
                    self._progress.accepted += 1
                else:
                    self._reject(file, entry, reason)
            self._reached(file, delivery.batch[-1], bar)
            self._save(_SAVE_EVERY_S)

        feed = Feed(apply, settled, rate=self._options.rate, give_up_s=self._options.give_up)
        with self._dead_letters(), self._bar() as bar:
            try:
                with feed:
                    for file, batch in self._batches():
                        sent.append(file)
                        feed.send(batch)
                    feed.finish()
            finally:
                self._save(0.0)
        return self._document(began_s)

    def _batches(self) -> Iterator[tuple[int, list[Any]]]:
        """Yield records in batches of one file each, with which of the files it is."""
        size = self._options.batch
        if self._options.rate is not None:
            size = min(size, max(int(self._options.rate / _SENDS_PER_S), 1))
        begun = self._progress.file
        for file in range(begun, len(self._files)):
            start = (self._progress.end, self._progress.number) if file == begun else (0, 0)
            entries = self._files[file].entries(*start)
            while batch := list(itertools.islice(entries, size)):
                yield file, batch

    def _reject(self, file: int, entry: Any, reason: str) -> None:
        self._progress.rejected += 1
        path = str(self._files[file].path)
        if len(self._reasons) < _SHOWN_REASONS:
            self._reasons.append(f"{path}:{entry.number}: {reason}")
        if self._letters is not None:
            letter = {"file": path, "number": entry.number, "reason": reason}
            line = json.dumps({**letter, "record": entry.record}, ensure_ascii=False)
            self._letters.write(line.encode(errors="surrogatepass") + b"\n")

    def _reached(self, file: int, entry: Any, bar: Any) -> None:
        self._progress.file, self._progress.end = file, entry.end
        self._progress.number = entry.number
        sizes = [one.path.stat().st_size for one in self._files]
        share = entry.end / max(self._files[file].size, 1)
        bar.set_postfix(
            accepted=self._progress.accepted, rejected=self._progress.rejected, refresh=False
        )
        bar.update(int(sum(sizes[:file]) + sizes[file] * share) - bar.n)

    @contextlib.contextmanager
    def _dead_letters(self) -> Iterator[None]:
        """Open the dead-letter file; what was written behind the resume point is written again."""
        if self._options.dead_letter is None:
            yield
            return
        with self._options.dead_letter.open("ab") as self._letters:
            if self._resume is not None and self._resume.exists():
                kept = min(self._letters.tell(), self._progress.dead_letter_bytes)
                self._letters.truncate(kept)
            yield

    def _bar(self) -> Any:
        total = sum(one.path.stat().st_size for one in self._files)
        # Nothing is shown where nobody looks.
        return tqdm(total=total, unit="B", unit_scale=True, desc="ingest", disable=None)

    def _save(self, every_s: float) -> None:
        """Write the resume file, unless that was less than ``every_s`` ago."""
        from silvershard.cluster.map_file import write_map

        now_s = time.monotonic()
        if self._resume is None or now_s - self._saved_s < every_s:
            return
        if self._letters is not None:
            self._letters.flush()
            os.fsync(self._letters.fileno())
            self._progress.dead_letter_bytes = self._letters.tell()
        self._progress.mark = self._files[self._progress.file].mark(self._progress.end)
        write_map(self._progress, self._resume, "resume file")
        self._saved_s = now_s

    def _document(self, began_s: float) -> dict[str, Any]:
        seconds = time.monotonic() - began_s
        done = self._progress.accepted - self._before
        letters = self._options.dead_letter
        return {
            "dry_run": self._options.dry_run,
            "accepted": self._progress.accepted,
            "rejected": self._progress.rejected,
            "accepted_before": self._before,
            "seconds": round(seconds, 3),
            "per_second": round(done / max(seconds, 1e-9), 1),
            "dead_letter": None if letters is None else str(letters),
            "reasons": self._reasons,
        }

import asyncio
import contextlib
import datetime
import ipaddress
import json
import os
import selectors
import shutil
import socket
import struct
import subprocess
import sys
import time
import types
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from silvershard.model.catalogue import NULL_INT, Catalogue, Ragged
from silvershard.model.dense import PaddedLinear
from silvershard.model.ranker_config import MLPConfig
from silvershard.model.remote_split import split_remote
from silvershard.model.remote_tables import StoredRows
from silvershard.model.request import FeatureValues, Request, WeightedIds
from silvershard.model.schema import Attribute, Field, Schema, UserFeature
from silvershard.model.semantic_config import SemanticConfig, SemanticSpec
from silvershard.model.semantic_source import SemanticSource
from silvershard.model.spec import SearchDefaults
from silvershard.model.text_config import TextTowerConfig
from silvershard.model.text_encoder import TextEncoder
from silvershard.model.two_tower import TwoTower
from silvershard.model.two_tower_config import (
    HistoryPool,
    ItemTable,
    NumberFeature,
    TwoTowerConfig,
)
from silvershard.shard.publish import publish_generation

# The root stays off sys.path, and so do the folders of tests; that of histories is shared by many.
if "history" not in sys.modules:
    _package = types.ModuleType("history")
    _package.__path__ = [str(Path(__file__).resolve().with_name("history"))]
    sys.modules["history"] = _package

# Triton reads this once, when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Ray reads this once too; whichever test imports it first must not settle it for the others.
os.environ.setdefault("RAY_AUTH_MODE", "token")

# Threads that share a core with another test process spin at every barrier: 44 s of work took 240.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the modules that may take longest, so that no core waits for one in the end."""
    limits: defaultdict[Path, float] = defaultdict(float)
    for item in items:
        for mark in item.iter_markers("timeout"):
            limits[item.path] = max(limits[item.path], mark.args[0])
    items.sort(key=lambda item: -limits[item.path])


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _poison_uninitialized_memory() -> Iterator[None]:
    """Fill what ``torch.empty`` returns with NaN or the largest integer, so reading it shows."""
    before = torch.are_deterministic_algorithms_enabled()
    before_warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before, warn_only=before_warn_only)


class _JumpingSelector(selectors.DefaultSelector):
    """Instead of waiting for a timer, moves the clock of its loop to it."""

    loop: "VirtualLoop"

    def select(self, timeout: float | None = None) -> list[Any]:
        events = super().select(0)
        if not events and timeout is None:
            # A computation on another thread is the one thing that takes real time.
            events = super().select(10)
            assert events, "every task waits for ever"
        elif not events:
            self.loop.now_s += timeout
        return events


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time passes only while everybody waits."""

    def __init__(self) -> None:
        selector = _JumpingSelector()
        selector.loop = self
        self.now_s = 1000.0
        super().__init__(selector)

    def time(self) -> float:
        return self.now_s


@pytest.fixture
def virtual() -> Iterator[VirtualLoop]:
    """A loop whose clock jumps over waits; ``virtual.run_until_complete(...)`` takes no time."""
    loop = VirtualLoop()
    yield loop
    with contextlib.suppress(RuntimeError):
        loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


class RedisServer:
    """A Redis server of a test, on a free loopback port, which may be killed and started again."""

    def __init__(self, directory: Path, environment: dict[str, str], **settings: str) -> None:
        self.directory = directory
        self.environment = {**os.environ, **environment}
        self.settings = {
            **{"appendonly": "yes", "appendfsync": "always", "save": "", "bind": "127.0.0.1"},
            **{name.replace("_", "-"): value for name, value in settings.items()},
        }
        self.port = 0
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> "RedisServer":
        chosen = self.port
        for _ in range(20):
            self.port = chosen or _free_port()
            options = {**self.settings, "port": str(self.port), "dir": str(self.directory)}
            words = [word for name, value in options.items() for word in (f"--{name}", value)]
            with (self.directory / "redis.out").open("ab") as out:
                self.process = subprocess.Popen(
                    ["redis-server", *words], stdout=out, stderr=out, env=self.environment
                )
            while self.process.poll() is None:
                with contextlib.suppress(OSError), socket.create_connection(self.address, 1) as one:
                    one.sendall(b"PING\r\n")
                    # While it loads its file it answers with an error, a password also is one.
                    if not one.recv(64).startswith(b"-LOADING"):
                        return self
                time.sleep(0.005)
        raise AssertionError((self.directory / "redis.out").read_text())

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", self.port

    def url(self, prefix: str = "silvershard", **options: str) -> str:
        further = "".join(f"&{name}={value}" for name, value in options.items())
        return f"redis://127.0.0.1:{self.port}/0?prefix={prefix}{further}"

    def kill(self) -> None:
        """End it at once, as a crash would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def make_redis(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., RedisServer]]:
    """``make_redis(environment={}, **settings)`` starts a server; all end with the tests."""
    servers: list[RedisServer] = []

    def make(environment: dict[str, str] | None = None, **settings: str) -> RedisServer:
        if shutil.which("redis-server") is None:
            pytest.skip("NOT RUN: redis-server is missing, apt-get install redis-server")
        directory = settings.pop("directory", None) or tmp_path_factory.mktemp("redis")
        servers.append(RedisServer(Path(directory), environment or {}, **settings))
        return servers[-1].start()

    yield make
    for server in servers:
        server.kill()


class _Entry(NamedTuple):
    """Of a journal: a change that can be undone, or the sync that covers what came before."""

    time: int
    kind: int
    inode: int
    offset: int
    size: int
    names: list[str]
    data: bytes
    pid: int


class Unsynced:
    """Loses what processes wrote below ``folder`` and did not sync, as a power cut would.

    It covers what runs in ``environment`` (see ``unsynced.c``).
    """

    _HEADER = struct.Struct("<7Q")
    _WRITE, _SYNC, _CREATE, _RENAME, _UNLINK = range(1, 6)

    def __init__(self, library: Path, directory: Path) -> None:
        self.folder = directory / "data"
        self.folder.mkdir()
        self._journal = directory / "journal"
        self._lies = directory / "journal.lies"
        self._synced: dict[int, int] = {}
        """When each file was synced last, by processes whose journals are there no more."""
        self.environment = {
            "LD_PRELOAD": str(library),
            # Ray takes the variable away from its workers otherwise.
            "RAY_LD_PRELOAD_ON_WORKERS": "1",
            "UNSYNCED_FOLDER": str(self.folder),
            "UNSYNCED_JOURNAL": str(self._journal),
        }

    def lie(self) -> None:
        """Let the disk say from now on that it has synced what it has not."""
        self._lies.touch()

    def be_honest(self) -> None:
        """Let the disk sync again what it says that it has."""
        self._lies.unlink(missing_ok=True)

    def wait_for_change(self, pid: int, timeout_s: float) -> None:
        """Return as soon as a process begins a change, or when the time is up."""
        journal = self._journal.with_name(f"{self._journal.name}.{pid}")
        before, give_up_s = journal.stat().st_size, time.monotonic() + timeout_s
        while journal.stat().st_size == before and time.monotonic() < give_up_s:
            pass

    def _entries(self) -> list[_Entry]:
        found: list[_Entry] = []
        for path in self._journal.parent.glob(f"{self._journal.name}.*"):
            if path.suffix[1:].isdigit():
                content, at = path.read_bytes(), 0
                # A process that was killed may have left the last entry without its end, and the
                # change unmade.
                while at + self._HEADER.size <= len(content):
                    kind, inode, offset, size, paths, data, time_ns = self._HEADER.unpack_from(
                        content, at
                    )
                    names = at + self._HEADER.size
                    at = names + paths + data
                    if at <= len(content):
                        text = os.fsdecode(content[names : names + paths]).split("\0")
                        kept = content[names + paths : at]
                        pid = int(path.suffix[1:])
                        found.append(_Entry(time_ns, kind, inode, offset, size, text, kept, pid))
        return sorted(found)

    def lose(self, kept: Callable[[int], int] = lambda count: 0, *, pid: int | None = None) -> int:
        """Undo what is not synced, and return of how many changes.

        Args:
            kept: how many of the first unsynced changes of a file reached the disk all the same.
            pid: the process whose changes are lost; it must have ended. By default those of all
                processes, each of which must have ended then.
        """
        entries = self._entries()
        covered = self._synced
        for one in entries:
            if one.kind == self._SYNC:
                covered[one.inode] = max(covered.get(one.inode, 0), one.time)
        lost = [
            one
            for one in entries
            if one.kind != self._SYNC
            and one.time > covered.get(one.inode, 0)
            and pid in (None, one.pid)
        ]
        since = {one.inode: one.time for one in reversed(lost)}
        # What others wrote over it would be undone with it, in a way that no power cut does.
        assert not [
            one
            for one in entries
            if one.kind == self._WRITE
            and one.time > since.get(one.inode, one.time)
            and pid not in (None, one.pid)
        ]
        counts = Counter(one.inode for one in lost if one.kind == self._WRITE)
        left = {inode: kept(count) for inode, count in counts.items()}
        numbered = "*" if pid is None else str(pid)
        journals = [
            path
            for path in self._journal.parent.glob(f"{self._journal.name}.{numbered}")
            if path.suffix[1:].isdigit()
        ]
        saved = [*self._journal.parent.glob(f"{self._journal.name}.{numbered}-*")]
        files = [path for path in (*self.folder.rglob("*"), *saved) if path.is_file()]
        by_inode = {path.stat().st_ino: path for path in files}
        undone = 0
        for one in reversed(lost):
            if one.kind == self._WRITE:
                counts[one.inode] -= 1
                if one.inode in by_inode and counts[one.inode] >= left[one.inode]:
                    undone += 1
                    with by_inode[one.inode].open("r+b") as file:
                        file.seek(one.offset)
                        file.write(one.data)
                        file.truncate(one.size)
        for one in reversed(lost):
            if one.kind == self._CREATE:
                Path(one.names[0]).unlink(missing_ok=True)
            elif one.kind == self._RENAME:
                os.rename(one.names[1], one.names[0])
            if one.kind in (self._RENAME, self._UNLINK) and one.names[2]:
                os.link(one.names[2], one.names[1] or one.names[0])
            undone += one.kind != self._WRITE
        for path in (*saved, *journals):
            path.unlink()
        return undone


@pytest.fixture(scope="session")
def _unsynced_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("NOT RUN: a C compiler is missing, apt-get install gcc")
    library = tmp_path_factory.mktemp("unsynced") / "unsynced.so"
    source = Path(__file__).with_name("unsynced.c")
    flags = ["-shared", "-fPIC", "-O2", "-Wall", "-Werror"]
    subprocess.run([compiler, *flags, "-o", library, source, "-ldl"], check=True)
    return library


@pytest.fixture
def unsynced(_unsynced_library: Path, tmp_path_factory: pytest.TempPathFactory) -> Unsynced:
    """A folder whose unsynced changes a test can lose."""
    return Unsynced(_unsynced_library, tmp_path_factory.mktemp("unsynced"))


GENRES = ("Action", "Comedy", "Drama", "Horror", "Sci-Fi")


def _words(generator: np.random.Generator, most: int) -> list[str]:
    count = int(generator.integers(0, most + 1))
    return [GENRES[at] for at in generator.permutation(len(GENRES))[:count]]


def numbers(features: Sequence[NumberFeature]) -> tuple[UserFeature, ...]:
    return tuple(
        UserFeature(name=one.name, kind="numbers", dtype="float", width=one.width)
        for one in features
    )


def make_schema(model: TwoTower | None = None) -> Schema:
    """What films consist of, and the further features of a model."""
    further = model.config if model else None
    return Schema(
        user_features=(
            UserFeature(name="history", dtype="int", max_length=20),
            *(
                UserFeature(name=one.name, dtype=one.dtype)
                for one in (further.user_ids if further else ())
            ),
            *numbers(further.user_numbers if further else ()),
            *(
                [UserFeature(name="query", kind="text", dtype="string", max_length=4)]
                if further and further.text
                else []
            ),
        ),
        item_features=(
            UserFeature(name="movie", dtype="int", max_length=1),
            UserFeature(name="genres", dtype="string", max_length=8),
            *numbers(further.item_numbers if further else ()),
        ),
        attributes=(
            Attribute(name="genre", kind="category", dtype="string"),
            Attribute(name="maker", kind="category", dtype="int"),
            Attribute(name="year", kind="number", dtype="int"),
            Attribute(name="price", kind="number", dtype="float"),
        ),
        signals=("popularity", "freshness"),
        fields=(Field(name="title", dtype="string"), Field(name="year", dtype="int")),
        heads=("rated", "liked"),
        tasks=("rated", "liked"),
        value="$rated * rated + $liked * liked * where(popularity > 0.5, 1.5, 1) + 0.1 * score",
        weights={"rated": 1.0, "liked": 2.0},
    )


def make_catalogue(num_items: int, seed: int = 0) -> Catalogue:
    """Half of the items are unknown to the model, so that many embeddings are equal bit for bit."""
    generator = np.random.default_rng(seed)
    item_ids = np.unique(generator.integers(0, 1 << 40, 2 * num_items))[:num_items]
    item_ids = generator.permutation(item_ids).astype(np.int64)
    genres = [_words(generator, 3) for _ in range(num_items)]
    titles = np.empty(num_items, dtype=object)
    titles[:] = [f"Film {row}" for row in range(num_items)]
    years = generator.integers(1950, 2025, num_items)
    prices = np.round(generator.uniform(-5, 20, num_items), 1)
    missing = generator.random(num_items) < 0.1
    return Catalogue(
        item_ids=item_ids,
        categories={
            "genre": Ragged.from_rows(genres, dtype="string"),
            "maker": Ragged.from_rows(
                [generator.integers(0, 200, 3).tolist()[: row % 4] for row in range(num_items)],
                dtype="int",
            ),
        },
        numbers={
            "year": np.where(missing, NULL_INT, years).astype(np.int64),
            "price": np.where(missing, np.nan, prices),
        },
        signals=np.round(generator.random((num_items, 2)), 2).astype(np.float32),
        fields={"title": titles, "year": years.astype(np.int64)},
        features={
            "movie": Ragged.from_rows([[int(one)] for one in item_ids], dtype="int"),
            "genres": Ragged.from_rows(genres, dtype="string"),
        },
    )


def tokenizer_json() -> bytes:
    """A tokenizer that knows the genres."""
    words = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "Genres", ":", ",", "-", "Sci", "Fi", *GENRES)
    special = {
        word: {"id": word, "ids": [at + 2], "tokens": [word]}
        for at, word in (enumerate(("[CLS]", "[SEP]")))
    }
    parts = [{"SpecialToken": {"id": word, "type_id": 0}} for word in special]
    parts.insert(1, {"Sequence": {"id": "A", "type_id": 0}})
    vocabulary = {word: row for row, word in enumerate(words)}
    made = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": parts,
            "pair": [*parts, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": special,
        },
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
    }
    return json.dumps(made).encode()


def text_config() -> dict[str, Any]:
    """A small encoder that reads the genres of a film."""
    pytest.importorskip("transformers", reason="the extra `text` is not installed")
    pytest.importorskip("tokenizers", reason="the extra `text` is not installed")
    encoder = {
        "model_type": "bert",
        "vocab_size": 20,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 40,
        "max_position_embeddings": 24,
        "pad_token_id": 0,
    }
    return {
        "encoder": encoder,
        "tokenizer_bytes": len(tokenizer_json()),
        "item_text": ("Genres: {genres}",),
        "max_tokens": 12,
    }


@pytest.fixture(scope="session")
def make_text_encoder() -> Callable[..., TextEncoder]:
    """``make_text_encoder(**settings)`` is a small text encoder with random weights."""

    def made(**settings: Any) -> TextEncoder:
        encoder = TextEncoder(TextTowerConfig.model_validate({**text_config(), **settings}))
        content = torch.frombuffer(bytearray(tokenizer_json()), dtype=torch.uint8)
        encoder.tokenizer_json.copy_(content)
        torch.manual_seed(3)
        for parameter in encoder.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        return encoder

    return made


def make_model(
    catalogue: Catalogue, seed: int = 0, *, texts: bool = False, **changes: Any
) -> TwoTower:
    """A model with random weights in every layer, so that every float stage matters."""
    if texts:
        changes["text"] = text_config()
    known = catalogue.item_ids[::2]
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "dim": 16,
        "heads": ("rated", "liked"),
        "tasks": ("rated", "liked"),
        "signals": ("popularity", "freshness"),
        "history": "history",
        "item": "movie",
        "tables": (
            ItemTable(name="movie", dtype="int", size=len(known)),
            ItemTable(name="genres", dtype="string", size=len(GENRES)),
        ),
        "pooled": (HistoryPool(feature="genres", width=3),),
        "max_history": 20,
        "ranker": MLPConfig(hidden=(24, 12)),
    }
    model = TwoTower(TwoTowerConfig.model_validate(settings | changes))
    model.vocabulary("movie").fill(known.tolist())
    model.vocabulary("genres").fill(GENRES)
    for feature in model.config.user_ids:
        values = [*range(feature.size)] if feature.dtype == "int" else GENRES[: feature.size]
        model.user_features.vocabulary(feature.name).fill(values)
    if model.text is not None:
        content = torch.frombuffer(bytearray(tokenizer_json()), dtype=torch.uint8)
        model.text.encoder.tokenizer_json.copy_(content)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for layer in model.modules():
        if isinstance(layer, PaddedLinear):
            with torch.no_grad():
                layer.weight[layer.in_features :] = 0
                layer.weight[:, layer.out_features :] = 0
    return model.eval()


@dataclass(frozen=True)
class Generation:
    """A published generation with what it was made from."""

    path: Path
    catalogue: Catalogue
    model: TwoTower
    schema: Schema
    num_clusters: int


def publish(
    repository: Path,
    catalogue: Catalogue,
    num_clusters: int,
    *,
    model: TwoTower | None = None,
    schema: Schema | None = None,
    semantic_k: int = 0,
    **options: Any,
) -> Generation:
    model = model or make_model(catalogue)
    schema = schema or make_schema(model)
    generator = np.random.default_rng(2)
    for one in model.config.item_numbers:
        rows = generator.normal(size=(len(catalogue), one.width)).round(1).tolist()
        rows[::5] = [[]] * len(rows[::5])
        column = Ragged.from_rows(rows, dtype="float")
        catalogue = replace(catalogue, features={**catalogue.features, one.name: column})
    published = publish_generation(
        repository,
        name="films",
        model=model,
        builder="two_tower",
        config=model.config.model_dump(mode="json"),
        catalogue=catalogue,
        schema=schema,
        defaults=SearchDefaults(probes=max(num_clusters // 4, 1), ann_k=40, semantic_k=semantic_k),
        num_clusters=num_clusters,
        **options,
    )
    return Generation(published.path, catalogue, model, schema, num_clusters)


@pytest.fixture(scope="session")
def generation(tmp_path_factory: pytest.TempPathFactory) -> Generation:
    """600 films in 16 clusters, with exact planes, Bloom planes that often err, and many ties."""
    return publish(
        tmp_path_factory.mktemp("films"),
        make_catalogue(600),
        16,
        false_positive_rate=0.1,
        max_exact_planes=6,
    )


@pytest.fixture(scope="session")
def publish_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Generation]:
    """``publish_model(precision=..., **changes)`` publishes 300 films with another model."""

    def published(
        precision: str = "float32", remote: tuple[str, ...] = (), **changes: Any
    ) -> Generation:
        catalogue = make_catalogue(300)
        model, rows = make_model(catalogue, **changes), {}
        if remote:
            model, rows = split_remote(model, remote)
        if precision != "float32":
            model = model.quantized(precision)
        if model.remote is not None:
            model.remote.connect(StoredRows(rows))
        folder = tmp_path_factory.mktemp("model")
        return publish(folder, catalogue, 8, model=model, remote_rows=rows)

    return published


def make_source(model: TwoTower, seed: int = 3) -> SemanticSource:
    """Random codebooks near the embeddings, and a decoder that is sure of some codes."""
    spec = SemanticSpec(
        decoder=SemanticConfig(levels=3, width=7, hidden=16), state_dim=model.config.profile_dim
    )
    torch.manual_seed(seed)
    source = SemanticSource(spec, model.config.dim)
    torch.nn.init.normal_(source.codebooks, std=0.3)
    for out in source.decoder.out:
        torch.nn.init.normal_(out.weight, std=0.5)
        with torch.no_grad():
            out.weight[out.in_features :] = 0
            out.weight[:, out.out_features :] = 0
    return source.requires_grad_(requires_grad=False).eval()


@pytest.fixture(scope="session")
def publish_semantic(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Generation]:
    """``publish_semantic(items=600, head_merge=..., **options)`` adds semantic ids to the films."""

    def published(items: int = 600, head_merge: str = "union", **options: Any) -> Generation:
        catalogue = make_catalogue(items)
        model = make_model(catalogue)
        return publish(
            tmp_path_factory.mktemp("semantic"),
            catalogue,
            16,
            model=model,
            schema=make_schema().model_copy(update={"head_merge": head_merge}),
            false_positive_rate=0.1,
            max_exact_planes=6,
            semantic=make_source(model),
            **{"semantic_k": 30, **options},
        )

    return published


@pytest.fixture(scope="session")
def semantic_generation(publish_semantic: Callable[..., Generation]) -> Generation:
    """The films of ``generation`` with semantic ids, many of them shared by several films."""
    return publish_semantic()


@pytest.fixture(scope="session")
def tiny_generation(tmp_path_factory: pytest.TempPathFactory) -> Generation:
    """Five films: with seven shards, some have none."""
    return publish(tmp_path_factory.mktemp("tiny"), make_catalogue(5, seed=1), 4)


def _random_filter(generator: np.random.Generator, depth: int) -> str:
    kind = generator.integers(0, 4) if depth else 0
    if kind == 0:
        leaf = generator.integers(0, 5)
        if leaf == 0:
            return f'genre:"{GENRES[generator.integers(len(GENRES))]}"'
        if leaf == 1:
            return f"maker:{generator.integers(0, 210)}"
        if leaf == 2:
            return f"year {generator.choice(['<', '<=', '=', '!=', '>=', '>'])} " + str(
                generator.integers(1945, 2030)
            )
        if leaf == 3:
            return f"price {generator.choice(['<', '>='])} {round(generator.uniform(-6, 21), 1)}"
        return f"maker IN ({', '.join(map(str, generator.integers(0, 200, 5)))})"
    if kind == 1:
        return f"NOT ({_random_filter(generator, depth - 1)})"
    operator = "AND" if kind == 2 else "OR"
    parts = [_random_filter(generator, depth - 1) for _ in range(2)]
    return f"({parts[0]}) {operator} ({parts[1]})"


def _random_weights(generator: np.random.Generator) -> dict[str, float]:
    kind = generator.random()
    if kind < 0.3:
        # The value is then a tenth of the score, which many items share bit for bit.
        return {"rated": 0.0, "liked": 0.0}
    return {"liked": float(generator.uniform(-1, 3))} if kind < 0.6 else {}


def _further_features(generator: np.random.Generator, schema: Schema) -> dict[str, FeatureValues]:
    """Features beside the history, with and without weights, some of them absent or unknown."""
    features: dict[str, FeatureValues] = {}
    for one in schema.user_features[1:]:
        if one.kind == "numbers":
            features[one.name] = generator.normal(size=one.width).tolist()
        elif one.kind == "text":
            count = int(generator.integers(1, 30))
            features[one.name] = [" ".join(generator.choice([*GENRES, "new"], count))]
        else:
            count = int(generator.integers(0, 6))
            known = [*range(9)] if one.dtype == "int" else [*GENRES, "unheard of"]
            ids = [known[at] for at in generator.integers(0, len(known), count)]
            weights = generator.normal(size=count).round(1).tolist()
            features[one.name] = ids if generator.random() < 0.4 else WeightedIds(ids, weights)
    return {name: values for name, values in features.items() if generator.random() < 0.8}


def make_requests(
    generation: Generation, count: int, seed: int, *, depth: int = 3
) -> list[Request]:
    """Random requests of every kind: filters, exclusions, pins, exact, k above the matches."""
    generator = np.random.default_rng(seed)
    others = np.random.default_rng(seed + 1)
    ids = generation.catalogue.item_ids
    requests = []
    for _ in range(count):
        history = generator.choice(ids, size=int(generator.integers(0, 25))).tolist()
        if generator.random() < 0.2:
            history.append(7)
        features = {"history": history} if generator.random() < 0.9 else {}
        requests.append(
            Request(
                features={**features, **_further_features(others, generation.schema)},
                k=int(generator.choice([1, 3, 10, 50, 700])),
                filter=_random_filter(generator, depth) if generator.random() < 0.6 else "",
                exclude_ids=history + generator.choice(ids, size=20).tolist()
                if generator.random() < 0.5
                else (),
                nprobe=int(generator.choice([0, 0, 1, min(5, generation.num_clusters)])),
                ann_k=int(generator.choice([0, 0, 7, 100])),
                exact=bool(generator.random() < 0.1),
                task_weights=_random_weights(generator),
            )
        )
    return requests


@pytest.fixture(scope="session")
def request_maker() -> Callable[..., list[Request]]:
    """``request_maker(generation, count, seed, depth=3)`` gives random requests."""
    return make_requests


class Authority:
    """A certificate authority in a folder, for the certificates of one test."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._key = ec.generate_private_key(ec.SECP256R1())
        self.ca = folder / f"{name}.ca.pem"
        made = self._signed(self._name, self._key.public_key(), days=30, names=None)
        self.ca.write_bytes(made)

    def issue(
        self, stem: str, *names: str, days: float = 30.0, authority: "Authority | None" = None
    ) -> dict[str, str]:
        """Write a certificate and its key; return them and its first name as a section of TLS.

        It replaces one of that stem. It is of these DNS names and addresses, and lives for so many
        days, of which a negative number is over. ``authority`` is who signs instead.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, stem)])
        made = (authority or self)._signed(subject, key.public_key(), days=days, names=names)
        paths = self._folder / f"{stem}.pem", self._folder / f"{stem}.key"
        private = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        for path, content in zip(paths, (made, private), strict=True):
            partial = path.with_suffix(".tmp")
            partial.write_bytes(content)
            partial.chmod(0o600)
            partial.replace(path)
        certificate, private_key = map(str, paths)
        return {"certificate": certificate, "key": private_key, "name": names[0]}

    def section(self, stem: str = "server", *names: str, **options: Any) -> dict[str, str]:
        """The same with the authority itself."""
        issued = self.issue(stem, *(names or ("feed.test", "127.0.0.1")), **options)
        return {**issued, "ca": str(self.ca)}

    def _signed(
        self, subject: x509.Name, public: Any, *, days: float, names: Sequence[str] | None
    ) -> bytes:
        now = datetime.datetime.now(datetime.UTC)
        life = datetime.timedelta(days=abs(days))
        begin = now - datetime.timedelta(hours=1) - (life if days < 0 else datetime.timedelta())
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(begin)
            .not_valid_after(begin + life)
            .add_extension(x509.BasicConstraints(ca=names is None, path_length=None), True)
        )
        if names is not None:
            alternatives = [_alternative(one) for one in names]
            builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), False)
        made = builder.sign(self._key, hashes.SHA256())
        return made.public_bytes(serialization.Encoding.PEM)


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


@pytest.fixture(scope="session")
def make_authority(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Authority]:
    """``make_authority(name)`` issues certificates from a folder of its own."""
    return lambda name: Authority(tmp_path_factory.mktemp(name), name)


@pytest.fixture
def authority(make_authority: Callable[[str], Authority]) -> Authority:
    """Issues certificates; ``authority.section()`` is a whole section of TLS."""
    return make_authority("authority")


@pytest.fixture
def stranger(make_authority: Callable[[str], Authority]) -> Authority:
    """An authority that nobody believes."""
    return make_authority("stranger")

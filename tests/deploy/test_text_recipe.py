import asyncio
import json
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from silvershard.cluster.client import Client
from silvershard.cluster.codec import RequestRefused
from silvershard.cluster.config import ListenSection, QuerySection, RouterConfig
from silvershard.cluster.router import Router
from silvershard.cluster.shard_map import ShardEntry, ShardMap
from silvershard.cluster.shard_server import ShardServer
from silvershard.deploy.config import Config
from silvershard.deploy.errors import CommandError
from silvershard.deploy.recipe import Prepared, prepare
from silvershard.deploy.text_recipe import (
    FILM_TEXT,
    film_catalogue,
    film_schema,
    load_text_tower,
    principal_axes,
)
from silvershard.model.answer import Answer, split_answers
from silvershard.model.catalogue import Catalogue
from silvershard.model.compiled_request import compile_request
from silvershard.model.merge import Merge
from silvershard.model.quality import same_ranking
from silvershard.model.request import Request, RequestError
from silvershard.model.retriever import assemble
from silvershard.model.schema import SchemaError
from silvershard.model.spec import SearchDefaults
from silvershard.model.text_tower import TextTower
from silvershard.shard.executor import ShardExecutor
from silvershard.shard.load import load_executor, load_model, load_retriever
from silvershard.shard.publish import publish_generation
from silvershard.shard.snapshot import open_snapshot

transformers = pytest.importorskip("transformers", reason="the extra `text` is not installed")
tokenizers = pytest.importorskip("tokenizers", reason="the extra `text` is not installed")

SENTENCES = ("a heist gone wrong", "two friends in space", "rain", "the song of a long night " * 30)
FILTERS = ("", "year >= 1990", 'genre:"Drama" OR genre:"Comedy"', 'NOT genre:"Drama"')


def network_is_forbidden(self: object, address: object, *_: object) -> None:
    raise AssertionError(f"an address was asked for: {address}")


def write_tokenizer(folder: Path, words: Sequence[str]) -> None:
    vocabulary = {
        word: row for row, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", *words))
    }
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.normalizer = tokenizers.normalizers.Lowercase()
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    made.save(str(folder / "tokenizer.json"))


def write_encoder(folder: Path, words: Sequence[str], model_type: str = "bert") -> Any:
    """A small encoder with random weights, as a person would have it on disk."""
    config = transformers.AutoConfig.for_model(
        model_type,
        vocab_size=len(words) + 4,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    torch.manual_seed(4)
    encoder = transformers.AutoModel.from_config(config)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    encoder.save_pretrained(folder)
    write_tokenizer(folder, words)
    return encoder.eval()


@pytest.fixture(scope="module")
def prepared(films_folder: Path) -> Prepared:
    return prepare(Config(), data=films_folder, environ={}, report=lambda _: None)


@pytest.fixture(scope="module")
def encoder_folder(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder that knows the words of the titles and genres."""
    words = {"heist", "a", "two", "friends", "in", "space", "rain", "the", "song", "night", "tags"}
    for text in (*prepared.data.titles, *prepared.data.genres.values, "genres : . , ( )"):
        words |= {part.strip(".,():'").lower() for part in str(text).split()}
    folder = tmp_path_factory.mktemp("encoder")
    write_encoder(folder, sorted(words - {""}))
    return folder


@pytest.fixture
def copied(encoder_folder: Path, tmp_path: Path) -> Path:
    """The encoder's folder, to be damaged."""
    folder = tmp_path / "encoder"
    shutil.copytree(encoder_folder, folder)
    return folder


def publish(repository: Path, tower: TextTower, catalogue: Catalogue, prepared: Prepared) -> Path:
    return publish_generation(
        repository,
        name="films",
        model=tower,
        builder="text_tower",
        config=tower.config.model_dump(mode="json"),
        catalogue=catalogue,
        schema=film_schema(prepared.schema),
        defaults=SearchDefaults(probes=4, ann_k=60),
        num_clusters=16,
    ).path


@dataclass(frozen=True)
class Published:
    path: Path
    tower: TextTower
    catalogue: Catalogue


@pytest.fixture(scope="module")
def published(
    prepared: Prepared, encoder_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Published:
    """400 films behind an encoder whose folder the generation does not need any more."""
    folder = tmp_path_factory.mktemp("gone") / "encoder"
    shutil.copytree(encoder_folder, folder)
    tower = load_text_tower(folder, item_text=FILM_TEXT, max_tokens=48)
    shutil.rmtree(folder)
    catalogue = film_catalogue(prepared.data, prepared.catalogue)
    path = publish(tmp_path_factory.mktemp("films"), tower, catalogue, prepared)
    return Published(path, tower, catalogue)


def requests() -> list[Request]:
    made = [
        Request(features={"query": [sentence]}, k=k, filter=filter_, exact=exact)
        for sentence in SENTENCES
        for filter_ in FILTERS
        for k, exact in ((10, False), (100, True))
    ]
    return [*made, Request(features={}, k=5)]


def ask(executors: Sequence[ShardExecutor], asked: Sequence[Request]) -> list[Answer]:
    """The two rounds of a query over some shards, without processes or a network."""
    spec, merge = executors[0].spec, Merge()
    compiled = [compile_request(request, spec) for request in asked]
    eligible = [
        sum(int(one.count(request.scan[None])) for one in executors)
        if request.needs_count
        else None
        for request in compiled
    ]
    plans = [one.plan(spec, count) for one, count in zip(compiled, eligible, strict=True)]
    encoded = executors[-1].encode([one.features for one in compiled])
    work = assemble(compiled, plans, encoded.embedding, encoded.user_state)
    firsts = [one.open("key", work, float("inf")) for one in executors]
    cutoffs = merge.cutoffs(firsts, work.ann_k)
    second = merge([one.close("key", cutoffs) for one in executors], int(work.k.max()))
    for one in executors:
        one.release("key")
    first = merge.candidates(firsts, 1)
    return split_answers(compiled, plans, encoded.warnings, first, second, spec, eligible, {})


def assert_same(got: Sequence[Answer], wanted: Sequence[Answer]) -> None:
    for at, (one, other) in enumerate(zip(got, wanted, strict=True)):
        compared = same_ranking(one, other)
        assert compared.same, (at, compared.difference)
        assert torch.equal(one.refined, other.refined), at
        assert one.warnings == other.warnings, at
        assert one.exhausted == other.exhausted, at


@contextmanager
def cluster(path: Path, num_shards: int, folder: Path) -> Iterator[Client]:
    """Shard servers and a router with real sockets, in threads of this process."""
    servers = [ShardServer(load_executor(path, shard, num_shards)) for shard in range(num_shards)]
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def run(work):  # type: ignore[no-untyped-def]
        return asyncio.run_coroutine_threadsafe(work, loop).result(60)

    async def make_router() -> Router:
        made = Router(
            RouterConfig(
                map_path=str(folder / "map.json"),
                listen=ListenSection(host="127.0.0.1", port=0),
                query=QuerySection(min_coverage=1.0, deadline_max_ms=60_000),
            )
        )
        await made.start()
        return made

    started: list[ShardServer] = []
    router = None
    try:
        for server in servers:
            run(server.start())
            started.append(server)
        entries = tuple(
            ShardEntry(
                shard=server.executor.shard,
                replica=0,
                address=server.address,
                epoch=server.epoch,
                documents=server.executor.documents,
                pid=os.getpid(),
            )
            for server in servers
        )
        ShardMap(
            version=1, generation=1, snapshot=str(path), num_shards=num_shards, entries=entries
        ).write_atomic(folder / "map.json")
        router = run(make_router())
        with Client(router.address, timeout_s=60) as client:
            client.wait_until_ready(timeout_s=30)
            yield client
    finally:
        if router is not None:
            run(router.stop())
        for server in started:
            run(server.stop())
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)
        loop.close()


def test_the_tower_computes_what_the_encoder_of_the_folder_does(encoder_folder: Path) -> None:
    encoder = transformers.AutoModel.from_pretrained(encoder_folder).eval()
    tower = load_text_tower(encoder_folder, max_tokens=48)
    ids = torch.tensor([tower.tokenizer.encode("two friends in space").ids])
    assert ids.shape == (1, 6)
    with torch.no_grad():
        pooled = encoder(input_ids=ids).last_hidden_state.mean(1)
    got = tower.encode([{"query": ("two friends in space",)}]).embedding[0]
    torch.testing.assert_close(got, torch.nn.functional.normalize(pooled))


def test_nothing_of_the_folder_and_no_code_is_named_by_the_configuration(copied: Path) -> None:
    read = json.loads((copied / "config.json").read_text())
    read |= {"auto_map": {"AutoModel": "theirs.Model"}, "_name_or_path": "somebody/something"}
    (copied / "config.json").write_text(json.dumps(read))
    (copied / "theirs.py").write_text("raise SystemExit('this code ran')")
    tower = load_text_tower(copied, max_tokens=48)
    text = tower.config.model_dump_json()
    assert str(copied) not in text
    assert "theirs" not in text
    assert "somebody" not in text


def test_a_folder_is_read_and_a_generation_served_without_a_network(
    published: Published, encoder_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket.socket, "connect", network_is_forbidden)
    monkeypatch.setattr(socket, "getaddrinfo", network_is_forbidden)
    load_text_tower(encoder_folder, max_tokens=48)
    retriever, _ = load_retriever(published.path)
    assert len(retriever(requests()[:1])[0].item_ids) == 10


def test_weights_in_parts_are_read(copied: Path) -> None:
    whole = load_text_tower(copied, max_tokens=48)
    tensors = load_file(copied / "model.safetensors")
    (copied / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {
        name: f"model-{1 + (at % 2):05d}-of-00002.safetensors" for at, name in enumerate(names)
    }
    for file in set(files.values()):
        part = {name: tensors[name] for name in names if files[name] == file}
        save_file(part, copied / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": files}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    parts = load_text_tower(copied, max_tokens=48).state_dict()
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.state_dict().items())


def test_half_precision_weights_are_served_in_float32(copied: Path) -> None:
    tensors = {name: one.half() for name, one in load_file(copied / "model.safetensors").items()}
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    tower = load_text_tower(copied, max_tokens=48)
    assert {one.dtype for one in tower.encoder.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("content", "settings", "pooling"),
    [
        (None, {}, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, {}, "cls"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, {}, "mean"),
        ({"pooling_mode": "cls"}, {}, "cls"),
        ({"pooling_mode_max_tokens": True}, {"pooling": "mean"}, "mean"),
    ],
)
def test_the_pooling_is_that_of_the_folder_unless_it_is_named(
    copied: Path, content: dict[str, Any] | None, settings: dict[str, str], pooling: str
) -> None:
    if content is not None:
        (copied / "1_Pooling").mkdir()
        (copied / "1_Pooling" / "config.json").write_text(json.dumps(content))
    assert load_text_tower(copied, max_tokens=48, **settings).config.pooling == pooling


def break_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"not tensors")


def pickle_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def drop_a_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        read = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**read, **changes}))

    return change


def write(name: str, content: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), r"must have a config\.json"),
        (lambda folder: (folder / "tokenizer.json").unlink(), r"must have a tokenizer\.json"),
        (
            lambda folder: (folder / "model.safetensors").unlink(),
            "must have safetensors weights .*, got none",
        ),
        (pickle_weights, r"got pytorch_model\.bin; pickled weights are never read"),
        (break_weights, "cannot be used as an encoder"),
        (drop_a_weight, r"must have all weights of a bert, 1 are missing .*1\.output\.dense"),
        (change_config(num_hidden_layers=3), "16 are missing or of another shape"),
        (change_config(intermediate_size=65), "are missing or of another shape|cannot be used"),
        (change_config(model_type="mine"), "cannot be used as an encoder"),
        (change_config(model_type="bart"), "must be a model that encodes text alone"),
        (write("config.json", "{"), "cannot be used as an encoder"),
        (write("tokenizer.json", "{}"), r"tokenizer\.json cannot be used"),
        (lambda folder: write_tokenizer(folder, "abc" * 9999), "vocabulary of .* got token"),
        (
            write("1_Pooling/config.json", '{"pooling_mode_max_tokens": true}'),
            "got pooling_mode_max",
        ),
        (write("1_Pooling/config.json", "?"), "must be JSON"),
        (
            write("modules.json", '[{"type": "sentence_transformers.models.Dense"}]'),
            "lists a dense layer .*: give it as projection",
        ),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused(
    copied: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(copied)
    with pytest.raises(CommandError, match=message):
        load_text_tower(copied, max_tokens=48)


def test_a_setting_that_does_not_fit_is_refused(encoder_folder: Path) -> None:
    with pytest.raises(ValueError, match="cannot encode max_tokens=65 tokens"):
        load_text_tower(encoder_folder, max_tokens=65)
    with pytest.raises(ValueError, match=r"projection must be \(D, 32\) and finite, got \(8, 31\)"):
        load_text_tower(encoder_folder, max_tokens=48, projection=torch.ones(8, 31))
    with pytest.raises(ValueError, match="path"):
        load_text_tower(encoder_folder, max_tokens=48, path="x")


def test_principal_axes_keep_the_inner_products_of_items_in_few_numbers() -> None:
    generator = torch.Generator().manual_seed(2)
    flat = torch.randn(200, 3, generator=generator) @ torch.randn(3, 20, generator=generator)
    axes = principal_axes(flat, 3)
    assert axes.shape == (3, 20)
    torch.testing.assert_close(axes @ axes.T, torch.eye(3), atol=1e-5, rtol=0)
    small = flat @ axes.T
    torch.testing.assert_close(small @ small.T, flat @ flat.T, atol=1e-3, rtol=1e-4)
    with pytest.raises(ValueError, match=r"dim must be in 1\.\.20, got 21"):
        principal_axes(flat, 21)


def test_a_projected_tower_serves_smaller_embeddings(
    encoder_folder: Path, published: Published
) -> None:
    films = published.catalogue.take(np.arange(100))
    wide = published.tower.embed_items(dict(films.features))
    axes = principal_axes(wide, 16)
    tower = load_text_tower(
        encoder_folder, projection=axes, item_text=FILM_TEXT, max_tokens=48, normalize=False
    )
    assert tower.dim == 16
    plain = load_text_tower(encoder_folder, item_text=FILM_TEXT, max_tokens=48, normalize=False)
    got = tower.embed_items(dict(films.features))
    torch.testing.assert_close(got, plain.embed_items(dict(films.features)) @ axes.T)


def test_a_generation_serves_the_tower_that_was_published(published: Published) -> None:
    model, _ = load_model(open_snapshot(published.path))
    assert isinstance(model, TextTower)
    features = [{"query": (sentence,)} for sentence in SENTENCES]
    assert torch.equal(model.encode(features).embedding, published.tower.encode(features).embedding)
    some = published.catalogue.take(np.array([7, 300, 399]))
    bulk = published.tower.embed_items(dict(published.catalogue.features))
    assert torch.equal(model.embed_items(dict(some.features)), bulk[[7, 300, 399]])


@pytest.mark.slow
def test_any_number_of_shards_gives_the_same_bits(published: Published) -> None:
    whole, _ = load_retriever(published.path)
    asked = requests()
    alone = [whole([request])[0] for request in asked]
    assert len({tuple(answer.item_ids.tolist()) for answer in alone}) > 20
    assert_same(whole(asked), alone)
    for num_shards in (1, 2, 3):
        executors = [load_executor(published.path, one, num_shards) for one in range(num_shards)]
        assert_same(ask(executors, asked), alone)
        assert_same(ask(executors, asked[3:4]), alone[3:4])


def test_a_filter_holds_for_a_sentence(published: Published) -> None:
    whole, _ = load_retriever(published.path)
    catalogue = published.catalogue
    years = dict(zip(catalogue.item_ids.tolist(), catalogue.numbers["year"].tolist(), strict=True))
    request = Request(features={"query": ["a heist gone wrong"]}, k=400, filter="year >= 1990")
    answer = whole([replace(request, exact=True)])[0]
    wanted = {item for item, year in years.items() if year >= 1990}
    assert set(answer.item_ids.tolist()) == wanted
    assert answer.exhausted


def test_a_cluster_answers_sentences_as_the_module_does(
    published: Published, tmp_path: Path
) -> None:
    whole, _ = load_retriever(published.path)
    with cluster(published.path, 2, tmp_path) as client:
        for request in requests()[::3]:
            wanted = whole([request])[0]
            got = client.retrieve(
                features=dict(request.features),
                k=request.k,
                filter=request.filter,
                exact=request.exact,
                return_fields=["title"],
            )
            assert got.item_ids.tolist() == wanted.item_ids.tolist()
            assert got.scores.tobytes() == wanted.scores.numpy().tobytes()
            assert got.warnings == wanted.warnings
            assert all(isinstance(title, str) for title in got.fields["title"])
        with pytest.raises(RequestRefused) as caught:
            client.retrieve(features={"query": [" "]})
        assert caught.value.code == "INVALID_ARGUMENT"
        assert [one.field for one in caught.value.violations] == ["features.query"]


def test_a_wrong_request_is_refused_and_a_long_one_is_said(published: Published) -> None:
    whole, _ = load_retriever(published.path)
    for features, message in (
        ({"query": [""]}, "features.query: position 0 must be a text that is not blank"),
        ({"query": "rain"}, "features.query: must be a list of texts, got str"),
        ({"query": [7]}, "features.query: position 0 must be a string, got int 7"),
        ({"query": ["x" * 4097]}, "features.query: .* at most 4096 characters, got 4097"),
        ({"history": [1]}, "features.history: unknown user feature; the schema has query"),
    ):
        with pytest.raises(RequestError, match=message):
            whole([Request(features=features)])  # type: ignore[arg-type]
    answers = whole([Request(features={"query": [SENTENCES[3]]}), Request()])
    assert [answer.warnings for answer in answers] == [
        ("query: only the first 48 tokens count",),
        ("query: no text was given",),
    ]


def test_a_schema_with_tasks_or_other_heads_does_not_fit(
    published: Published, prepared: Prepared, tmp_path: Path
) -> None:
    schema = film_schema(prepared.schema)
    for change, field in (({"tasks": ("liked",)}, "tasks"), ({"heads": ("rated",)}, "heads")):
        with pytest.raises(SchemaError, match=f"{field}: the schema has"):
            publish_generation(
                tmp_path,
                name="films",
                model=published.tower,
                builder="text_tower",
                config=published.tower.config.model_dump(mode="json"),
                catalogue=published.catalogue,
                schema=schema.model_copy(update=change),
                defaults=SearchDefaults(probes=4, ann_k=60),
                num_clusters=16,
            )

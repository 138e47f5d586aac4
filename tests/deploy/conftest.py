import csv
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from silvershard.cluster import retrieval_pb2
from silvershard.deploy import generation_verbs
from silvershard.deploy.cluster_store import Launched, PlacedHost
from silvershard.deploy.config import load
from silvershard.deploy.control_store import Control
from silvershard.deploy.processes import myself
from silvershard.deploy.state import ClusterRecord, RouterRecord, ShardRecord, StateDir
from silvershard.deploy.synthetic import generate
from silvershard.model.catalogue import NULL_INT
from silvershard.model.spec import SearchDefaults
from silvershard.shard.generations import generation_dir
from silvershard.shard.publish import publish_generation


@pytest.fixture(autouse=True)
def stepped_back(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """How often a verb stepped back, which would slow down this process for good."""
    steps: list[None] = []
    monkeypatch.setattr(generation_verbs, "step_back", lambda: steps.append(None))
    return steps


@pytest.fixture(scope="session")
def sentence_encoder_folder(films_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small encoder with random weights that knows the words of the films."""
    transformers = pytest.importorskip("transformers", reason="the extra `text` is not installed")
    tokenizers = pytest.importorskip("tokenizers", reason="the extra `text` is not installed")
    words = re.findall(r"[A-Za-z]+|[:.,()]", (films_folder / "movies.csv").read_text() + ":.,()")
    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted({word.lower() for word in words})]
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(
            {word: row for row, word in enumerate(known)}, unk_token="[UNK]"
        )
    )
    made.normalizer = tokenizers.normalizers.Lowercase()
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    torch.manual_seed(4)
    encoder = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=len(known),
            hidden_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=40,
            max_position_embeddings=48,
        )
    )
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("sentences")
    encoder.save_pretrained(folder)
    made.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def films_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MovieLens folder with 400 films and the ratings of 80 people with planted tastes."""
    films = generate(400, 80, 40, seed=3)
    folder = tmp_path_factory.mktemp("ml")
    with (folder / "movies.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("movieId", "title", "genres"))
        for row, movie in enumerate(films.movie_ids.tolist()):
            year = int(films.years[row])
            title = f"{films.titles[row]}{'' if year == NULL_INT else f' ({year})'}"
            genres = "|".join(films.genres.row(row)) or "(no genres listed)"
            writer.writerow((movie, title, genres))
    with (folder / "ratings.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("userId", "movieId", "rating", "timestamp"))
        columns = (films.user_ids, films.rated_movie_ids, films.ratings, films.timestamps)
        writer.writerows(zip(*(column.tolist() for column in columns), strict=True))
    return folder


@pytest.fixture(scope="session")
def two_generations(tmp_path_factory: pytest.TempPathFactory, generation: Any) -> Path:
    """A repository with the generation of the fixture, as 1 and clustered otherwise as 2."""
    repository = tmp_path_factory.mktemp("two")
    shutil.copytree(generation.path, generation_dir(repository, 1))
    publish_generation(
        repository,
        name="films",
        model=generation.model,
        builder="two_tower",
        config=generation.model.config.model_dump(mode="json"),
        catalogue=generation.catalogue,
        schema=generation.schema,
        defaults=SearchDefaults(probes=4, ann_k=40),
        num_clusters=16,
        false_positive_rate=0.1,
        max_exact_planes=6,
        seed=18,
        generation=2,
    )
    return repository


@pytest.fixture
def idle_state(tmp_path: Path, two_generations: Path) -> StateDir:
    """A state directory of two generations whose cluster, which is this process, does nothing."""
    state = StateDir(tmp_path / "idle")
    state.create()
    shutil.copytree(two_generations, state.generations)
    shard = ShardRecord(shard=0, state="serving", pid=os.getpid(), documents=600)
    record = ClusterRecord(
        guard=myself(),
        driver=myself(),
        address="127.0.0.1:9",
        model="films",
        generation=1,
        documents=600,
        map_version=1,
        router=RouterRecord(state="serving"),
        shards=(shard,),
        ray_dir="",
        since_unix_s=0.0,
    )
    state.write_record(record)
    state.control.write(Control(live=1))
    return state


class FakeRouter:
    """A router that answers by a function, given the number of requests before."""

    def __init__(self) -> None:
        self.asked: list[retrieval_pb2.RetrieveRequest] = []
        self.answer: Callable[[int], retrieval_pb2.RetrieveResponse] = self.full
        self.hold = threading.Event()
        """While it is not set, nobody is answered."""
        self.hold.set()
        self.reached = threading.Event()
        """Set with the first request."""
        handler = grpc.unary_unary_rpc_method_handler(
            self._retrieve,
            request_deserializer=retrieval_pb2.RetrieveRequest.FromString,
            response_serializer=retrieval_pb2.RetrieveResponse.SerializeToString,
        )
        self._server = grpc.server(ThreadPoolExecutor(8))
        self._server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(
                    "silvershard.v1.Retrieval", {"Retrieve": handler}
                ),
            )
        )
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    @staticmethod
    def full(number: int) -> retrieval_pb2.RetrieveResponse:
        message = retrieval_pb2.RetrieveResponse(item_ids=[number, 7])
        message.coverage.documents = 1.0
        message.version.generation = 1
        message.version.shard_map_version = 3
        message.version.cut.add(partition=0, position=number)
        return message

    @staticmethod
    def partial(number: int) -> retrieval_pb2.RetrieveResponse:
        message = FakeRouter.full(number)
        message.coverage.documents = 0.5
        message.coverage.degraded = True
        message.coverage.reasons.append(retrieval_pb2.DEGRADE_REASON_SHARD_UNAVAILABLE)
        return message

    def fail(self, number: int) -> retrieval_pb2.RetrieveResponse:
        raise RuntimeError

    def _retrieve(
        self, request: retrieval_pb2.RetrieveRequest, context: grpc.ServicerContext
    ) -> retrieval_pb2.RetrieveResponse:
        self.asked.append(request)
        self.reached.set()
        self.hold.wait(30)
        try:
            return self.answer(len(self.asked) - 1)
        except RuntimeError:
            context.abort(grpc.StatusCode.UNAVAILABLE, "it failed")

    def close(self) -> None:
        self.hold.set()
        self._server.stop(0).wait(10)


@pytest.fixture
def fake_router() -> Iterator[FakeRouter]:
    router = FakeRouter()
    yield router
    router.close()


def placed(name: str, number: int, *copies: tuple[int, int]) -> PlacedHost:
    return PlacedHost(
        name=name,
        address=f"10.0.0.{number}",
        cpus=2.0,
        memory_bytes=1 << 30,
        router=True,
        copies=copies,
    )


@pytest.fixture
def launched() -> Callable[..., Launched]:
    """``launched(root="/state", **options)`` is a cluster of two shards on hosts a and b."""

    def made(root: object = "/state", **options: Any) -> Launched:
        return Launched(
            config=load(None, environ={}, options=options),
            generation=3,
            model="films",
            root=str(root),
            ray="10.0.0.9:6379",
            hosts=(placed("a", 1, (0, 0), (1, 1)), placed("b", 2, (1, 0), (0, 1))),
            since_unix_s=1.0,
        )

    return made

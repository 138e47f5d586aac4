"""Cases of the whole pipeline in one process, beside the search that it replaces.

The peer of a case does the same job with plain PyTorch: encode, exact float32 products with every
item, a boolean filter mask, top-k, rerank of as many candidates with the same model, and the same
value.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from silvershard.deploy.movielens import catalogue, popularity, schema, split
from silvershard.deploy.synthetic import generate
from silvershard.kernels import fixed_sigmoid
from silvershard.model.catalogue import Catalogue
from silvershard.model.request import Request
from silvershard.model.retriever import Retriever
from silvershard.model.spec import SearchDefaults
from silvershard.model.training_config import TrainingConfig
from silvershard.model.training_data import Interactions, prepare
from silvershard.shard.load import load_retriever
from silvershard.shard.publish import publish_generation


@dataclass(frozen=True)
class Case:
    """One workload, ours and the peer's, on the same items and users."""

    name: str
    batch: int
    filter: str
    gate: str
    """Test file that must pass before a number is printed."""
    ours: Callable[[], object]
    peer: Callable[[], object]


class Workload:
    """Generated films, a model with its initial weights, and the index over them."""

    def __init__(self, num_movies: int) -> None:
        films = generate(num_movies=num_movies, num_users=400, ratings_per_user=60, seed=0)
        parts = split(films)
        counts, means = popularity(films, parts)
        self.items: Catalogue = catalogue(films, counts, means)
        rows = parts.train_rows
        interactions = Interactions(
            films.user_ids[rows], films.rated_movie_ids[rows], films.ratings[rows]
        )
        model, _ = prepare(
            schema(), self.items.features, self.items.signals, interactions, TrainingConfig()
        )
        self.model = model.eval()
        num_clusters = max(16, 1 << int(4 * num_movies**0.5).bit_length() - 1)
        with tempfile.TemporaryDirectory() as folder:
            published = publish_generation(
                Path(folder),
                name="films",
                model=self.model,
                builder="two_tower",
                config=self.model.config.model_dump(mode="json"),
                catalogue=self.items,
                schema=schema(),
                defaults=SearchDefaults(probes=num_clusters // 16, ann_k=256),
                num_clusters=num_clusters,
            )
            self.retriever: Retriever = load_retriever(published.path)[0]
        with torch.inference_mode():
            self.embeddings = self.model.embed_items(dict(self.items.features))
        self.histories = [
            parts.test_histories.row(user)[-50:].tolist()
            for user in range(min(64, len(parts.test_histories)))
        ]

    def requests(self, batch: int, text: str) -> list[Request]:
        """Return a batch of users, cycled, with one filter."""
        return [
            Request(features={"history": self.histories[at % len(self.histories)]}, filter=text)
            for at in range(batch)
        ]

    def mask(self, text: str) -> torch.Tensor:
        """Return which items pass one of the filters of the cases, ``(n,)`` bool."""
        years = self.items.numbers["year"]
        if not text:
            return torch.ones(len(self.items), dtype=torch.bool)
        return torch.from_numpy(years >= int(text.split()[-1]))

    def brute_force(self, requests: list[Request], mask: torch.Tensor) -> torch.Tensor:
        """Answer without an index: every product, a mask, top-k, then the same rerank."""
        with torch.inference_mode():
            encoded = self.model.encode([request.features for request in requests])
            scores = encoded.embedding @ self.embeddings.T  # (B, H, n)
            scores = scores.masked_fill(~mask, float("-inf"))
            best = torch.topk(scores, 256, 2).indices.flatten(1)  # (B, H * R)
            items = self.embeddings[best]  # (B, H * R, D)
            refined = (encoded.embedding[:, None] * items[:, :, None]).sum(3)
            signals = torch.from_numpy(self.items.signals)[best]
            logits = self.model.rank(encoded.embedding, encoded.user_state, items, refined, signals)
            value = fixed_sigmoid(logits).sum(2)
            return torch.topk(value, 10, 1).indices


def cases(num_movies: int) -> list[Case]:
    """Return every case over a catalogue of this size."""
    work = Workload(num_movies)
    years = work.items.numbers["year"]
    found = []
    for share in (1.0, 0.1, 0.01):
        text = "" if share == 1.0 else f"year >= {int(np.quantile(years, 1 - share))}"
        mask = work.mask(text)
        for batch in (1, 8, 64):
            requests = work.requests(batch, text)
            found.append(
                Case(
                    name=f"pipeline/items={num_movies}/share={share}/batch={batch}",
                    batch=batch,
                    filter=text,
                    gate="tests/model/test_retriever.py",
                    ours=lambda requests=requests: work.retriever(requests),
                    peer=lambda requests=requests, mask=mask: work.brute_force(requests, mask),
                )
            )
    return found

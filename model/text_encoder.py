"""A Hugging Face encoder of texts, whose embeddings have the same bits wherever they are made.

An encoder is made from its configuration and its tensors alone: the encoder's own configuration is
part of the first, the weights and the tokenizer's JSON are among the second. So a generation that
was published with it needs neither a path nor a network where it is served.

Every text is encoded by itself, at its own length and on one core. torch divides products and
element-wise functions by the number of its threads and rounds some lengths differently then; alone
on a core, an embedding is a function of the text, whatever batch, position, number of threads or
process it comes from.

Shapes: B requests, N items, n texts, L tokens of a text, E width of the encoder's states, D
embedding dimension.
"""

import functools
import importlib
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from silvershard.kernels import fixed_dot
from silvershard.model.catalogue import Ragged
from silvershard.model.dense import PaddedLinear
from silvershard.model.text_config import MAX_DIM, TextTowerConfig
from silvershard.model.unit_rows import unit_rows

_SLICE = 64


class EmbeddedTexts(NamedTuple):
    """What texts became."""

    embedding: Tensor
    """``(n, D)`` float32."""
    truncated: list[bool]
    """Whether a text had more tokens than count."""


def text_library(name: Literal["transformers", "tokenizers"]) -> Any:
    """The optional package of that name.

    Raises:
        ValueError: if it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"a text tower needs the package {name}: install silvershard[text] ({error})"
        ) from None


def encoder_class(config: Any) -> Any:
    """The transformers class that turns text of such a model into states.

    Args:
        config: a ``PretrainedConfig``.

    Raises:
        ValueError: if such a model is no encoder of text.
    """
    transformers = text_library("transformers")
    if type(config) in transformers.MODEL_FOR_TEXT_ENCODING_MAPPING:
        return transformers.AutoModelForTextEncoding
    if config.is_encoder_decoder or type(config) not in transformers.MODEL_MAPPING:
        raise ValueError(
            f"encoder must be a model that encodes text alone, got model_type {config.model_type!r}"
        )
    return transformers.AutoModel


def states_only(encoder: nn.Module) -> nn.Module:
    """The encoder without the pooler that some classes put behind the states."""
    if isinstance(getattr(encoder, "pooler", None), nn.Module):
        encoder.pooler = None  # type: ignore[assignment]
    return encoder


def _build_encoder(config: Mapping[str, Any]) -> nn.Module:
    transformers = text_library("transformers")
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in transformers.CONFIG_MAPPING:
        raise ValueError(
            "encoder.model_type must be one that transformers "
            f"{transformers.__version__} knows, got {model_type!r}"
        )
    made = transformers.AutoConfig.for_model(**config)
    # The attention that every model has; the choice between the others depends on the machine.
    encoder = encoder_class(made).from_config(
        made, attn_implementation="eager", dtype=torch.float32, trust_remote_code=False
    )
    return states_only(encoder)


@functools.cache
def _workers(process: int, count: int) -> ThreadPoolExecutor:
    """Threads of this process whose torch operators run on one core each."""
    pool = ThreadPoolExecutor(count, thread_name_prefix="text-tower")
    started = threading.Barrier(count + 1)

    def on_one_core() -> None:
        # The first question settles what the thread inherits; only then does its own choice last.
        torch.get_num_threads()
        torch.set_num_threads(1)
        started.wait()

    before = torch.get_num_threads()
    for _ in range(count):
        pool.submit(on_one_core)
    started.wait()
    # The setting is the thread's own, but threads that start later inherit the latest one.
    torch.set_num_threads(before)
    return pool


def _unshare(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Copy tensors that share memory, which safetensors would refuse to write."""
    seen: set[int] = set()
    for name, tensor in state.items():
        # Other modules of a model may have tensors there that are divided over processes.
        if name.startswith(prefix) and isinstance(tensor, Tensor) and tensor.numel():
            if tensor.data_ptr() in seen:
                state[name] = tensor.clone()
            seen.add(tensor.data_ptr())


class TextEncoder(nn.Module):
    """One encoder for queries and items; every embedding has the same bits wherever it is made.

    It serves and is not trained here. The encoder runs on the CPU in float32.
    """

    tokenizer_json: Tensor

    def __init__(self, config: TextTowerConfig) -> None:
        """Build the encoder with weights and a tokenizer yet to be loaded.

        Raises:
            ValueError: if a package is missing, or if the encoder is unknown, is no encoder of
                text, or cannot read ``max_tokens`` tokens.
        """
        super().__init__()
        self.config = config
        self.encoder = _build_encoder(config.encoder)
        width = self._state_width()
        self.projection = PaddedLinear(width, config.dim) if config.dim else None
        self.dim = config.dim or width
        if self.dim > MAX_DIM:
            raise ValueError(
                f"embedding dimension must be at most {MAX_DIM}, the encoder has {width}: set dim"
            )
        self.register_buffer(
            "tokenizer_json", torch.zeros(config.tokenizer_bytes, dtype=torch.uint8)
        )
        self._tokenizer: Any = None
        self.register_load_state_dict_post_hook(  # type: ignore[no-untyped-call]
            self._forget_tokenizer
        )
        self.register_state_dict_post_hook(_unshare)  # type: ignore[no-untyped-call]
        self.requires_grad_(requires_grad=False)
        self.eval()

    @staticmethod
    def _forget_tokenizer(module: nn.Module, keys: object) -> None:
        assert isinstance(module, TextEncoder)
        module._tokenizer = None

    def _state_width(self) -> int:
        """Width E of the states, found by encoding as many tokens as ever count."""
        made: Any = self.encoder.config
        # Some position encodings start at the first token that is no padding.
        padding = getattr(made, "pad_token_id", None)
        token = 1 if padding == 0 else 0
        try:
            states = self._states(torch.full((1, self.config.max_tokens), token))
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"encoder of model_type {made.model_type!r} cannot encode "
                f"max_tokens={self.config.max_tokens} tokens of text: {error}"
            ) from None
        return states.shape[1]

    @torch.no_grad()
    def _states(self, token_ids: Tensor) -> Tensor:
        """The states ``(L, E)`` float32 of the tokens ``(1, L)`` of one text."""
        made = self.encoder.eval()(input_ids=token_ids, attention_mask=torch.ones_like(token_ids))
        states = getattr(made, "last_hidden_state", None)
        if not isinstance(states, Tensor) or states.shape[:2] != token_ids.shape:
            raise ValueError("it has no state for each token")
        return states[0]

    @property
    def tokenizer(self) -> Any:
        """The ``tokenizers.Tokenizer`` that came with the weights, cutting at ``max_tokens``.

        Raises:
            ValueError: if it cannot be read.
        """
        if self._tokenizer is None:
            text = bytes(self.tokenizer_json.numpy()).decode(errors="replace")
            try:
                tokenizer = text_library("tokenizers").Tokenizer.from_str(text)
                tokenizer.no_padding()
                tokenizer.enable_truncation(self.config.max_tokens)
            # The package raises bare exceptions.
            except Exception as error:  # noqa: BLE001
                raise ValueError(f"tokenizer_json must be a tokenizer.json: {error}") from None
            self._tokenizer = tokenizer
        return self._tokenizer

    def _embed_one(self, text: str) -> tuple[Tensor, bool]:
        """The embedding ``(D,)`` of a text, and whether the text was too long."""
        try:
            encoding = self.tokenizer.encode(text)
        except (TypeError, UnicodeError):
            raise ValueError(f"a text must be valid Unicode, got {text[:40]!r}") from None
        if not encoding.ids:
            return torch.zeros(self.dim), False
        states = self._states(torch.tensor([encoding.ids], dtype=torch.int64))
        if self.config.pooling == "cls":
            pooled = states[:1]
        else:
            length = states.shape[0]
            # A quotient of the sum in one fixed order, whatever the length.
            pooled = (fixed_dot(states.T.contiguous(), torch.ones(length)) / length)[None]
        if self.projection is not None:
            pooled = self.projection(pooled)
        row = unit_rows(pooled) if self.config.normalize else pooled
        return row[0], bool(encoding.overflowing)

    @torch.no_grad()
    def _embed_slice(self, texts: Sequence[str]) -> list[tuple[Tensor, bool]]:
        return [self._embed_one(text) for text in texts]

    def embed_texts(self, texts: Sequence[str]) -> EmbeddedTexts:
        """Return the embedding of each text, several at a time where torch has several threads.

        A text without any token, which only a tokenizer without special tokens can make, has the
        embedding of zeros.

        Args:
            texts: n texts, prefixes included.

        Raises:
            ValueError: if a text is not valid Unicode, or the tokenizer cannot be read.
        """
        threads = torch.get_num_threads()
        size = max(min(-(-len(texts) // threads), _SLICE), 1)
        slices = [texts[start : start + size] for start in range(0, len(texts), size)]
        if threads == 1:
            done = [self._embed_slice(one) for one in slices]
        else:
            done = list(_workers(os.getpid(), threads).map(self._embed_slice, slices))
        rows = [row for one in done for row, _ in one]
        return EmbeddedTexts(
            torch.stack(rows) if rows else torch.zeros(0, self.dim),
            [truncated for one in done for _, truncated in one],
        )

    def query_texts(self, features: Sequence[Mapping[str, Sequence[Any]]]) -> list[str]:
        """Return the text of each request, its texts joined with a space; empty without any."""
        return [" ".join(one.get(self.config.query, ())) for one in features]

    def embed_queries(self, texts: Sequence[str]) -> EmbeddedTexts:
        """Return the embedding of each query, given without the prefix.

        Raises:
            ValueError: as ``embed_texts`` does.
        """
        return self.embed_texts([self.config.query_prefix + text for text in texts])

    @property
    def too_long(self) -> str:
        """What a request is told whose text was cut."""
        return f"{self.config.query}: only the first {self.config.max_tokens} tokens count"

    def item_texts(self, features: Mapping[str, Ragged]) -> list[str]:
        """Return the text of each item, prefix included.

        Args:
            features: the values of each item feature, N rows each; those that ``item_text`` does
                not name are ignored.

        Raises:
            ValueError: if a feature is missing or has another number of rows.
        """
        config = self.config
        columns = []
        for name in config.item_features:
            if name not in features:
                given = ", ".join(sorted(features)) or "none"
                raise ValueError(f"feature {name} is part of item_text, given are {given}")
            columns.append(features[name])
        num_items = len(columns[0])
        for name, column in zip(config.item_features, columns, strict=True):
            if len(column) != num_items:
                raise ValueError(f"feature {name} must have {num_items} rows, got {len(column)}")
        return [
            config.item_prefix
            + config.part_separator.join(
                part.replace(f"{{{name}}}", value)
                for part, name, column in zip(
                    config.item_text, config.item_features, columns, strict=True
                )
                if (value := config.value_separator.join(map(str, column.row(row).tolist())))
            )
            for row in range(num_items)
        ]

    def embed_present(self, features: Mapping[str, Ragged], num_items: int) -> Tensor:
        """Return the embedding of each item's text, ``(N, D)`` float32; zeros without a text.

        Args:
            features: as for ``item_texts``; those not here are absent.
            num_items: N.

        Raises:
            ValueError: if a feature has another number of rows.
        """
        empty = Ragged.from_rows([[]] * num_items)
        texts = self.item_texts(
            {name: features.get(name, empty) for name in self.config.item_features}
        )
        said = [row for row, text in enumerate(texts) if text != self.config.item_prefix]
        embedded = torch.zeros(num_items, self.dim)
        embedded[said] = self.embed_texts([texts[row] for row in said]).embedding
        return embedded

    def embed_items(self, features: Mapping[str, Ragged]) -> Tensor:
        """Return the embedding of each item, ``(N, D)`` float32.

        Args:
            features: as for ``item_texts``.

        Raises:
            ValueError: if a feature is missing or has another number of rows.
        """
        return self.embed_texts(self.item_texts(features)).embedding

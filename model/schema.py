"""What items and users consist of: features, filter attributes, signals, fields and tasks.

The schema is stored in the manifest of every snapshot; everything that names a feature, an
attribute or a value column is checked against it.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Self

import numpy as np
import pydantic
from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from silvershard.model.dtypes import INT64_MAX, INT64_MIN, ValueType
from silvershard.model.errors import FieldError
from silvershard.model.request import FeatureValues, WeightedIds
from silvershard.model.value import VALUE_KEYWORDS, compile_value

IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
SCORE_COLUMN = "score"

MAX_WIDTH = 1024
_MAX_FLOAT32 = float(np.finfo(np.float32).max)

FILTER_KEYWORDS = frozenset({"and", "or", "not", "in"})


class SchemaError(FieldError):
    """A feature, attribute or column that disagrees with the schema."""


class UserFeature(BaseModel):
    """What a tower reads of a user or an item: ids to look up in a table, texts, or numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = pydantic.Field(description="identifier of the feature")
    kind: Literal["ids", "text", "numbers"] = pydantic.Field(
        default="ids",
        description="how the feature is encoded; ids: a list of ids to look up; "
        "text: a list of texts for a text encoder, which dtype string goes with; numbers: so many "
        "numbers as width says, or none, which dtype float goes with",
    )
    dtype: ValueType = pydantic.Field(
        default="int", description="type of the values; string ids are hashed into the table"
    )
    max_length: int = pydantic.Field(
        default=128,
        ge=1,
        description="values kept of a user's list, the last of a longer one; an item with more ids "
        "is refused, and all of its texts are read",
    )
    max_characters: int = pydantic.Field(
        default=4096, ge=1, description="longest text of a request that is not refused"
    )
    width: int = pydantic.Field(
        default=1,
        ge=1,
        le=MAX_WIDTH,
        description="numbers of a feature of that kind; others have 1",
    )

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        return _identifier(name)

    @model_validator(mode="after")
    def _check_dtype(self) -> Self:
        allowed = {"ids": ("int", "string"), "text": ("string",), "numbers": ("float",)}[self.kind]
        what = {"ids": "ids", "text": "a text", "numbers": "numbers"}[self.kind]
        if self.dtype not in allowed:
            raise ValueError(
                f"feature {self.name!r}: dtype of {what} must be {' or '.join(allowed)}, "
                f"got {self.dtype}"
            )
        if self.kind != "numbers" and self.width != 1:
            raise ValueError(f"feature {self.name!r}: width of {what} must be 1, got {self.width}")
        return self


class Attribute(BaseModel):
    """A property of items that filters can name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = pydantic.Field(description="identifier of the attribute")
    kind: Literal["category", "number"] = pydantic.Field(
        description="category: any number of values per item, matched by equality; "
        "number: one value or none per item, compared"
    )
    dtype: ValueType = pydantic.Field(
        description="type of the values; category: int or string, number: int or float"
    )

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if _identifier(name).lower() in FILTER_KEYWORDS:
            raise ValueError(f"{name!r} is a keyword of the filter language")
        return name

    @model_validator(mode="after")
    def _check_dtype(self) -> Self:
        allowed = ("int", "string") if self.kind == "category" else ("int", "float")
        if self.dtype not in allowed:
            raise ValueError(
                f"attribute {self.name!r}: dtype of a {self.kind} must be "
                f"{' or '.join(allowed)}, got {self.dtype}"
            )
        return self


class Field(BaseModel):
    """A stored column that is returned on request and otherwise unused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = pydantic.Field(description="identifier of the field")
    dtype: ValueType = pydantic.Field(description="type of the values, one per item")

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        return _identifier(name)


class Schema(BaseModel):
    """The declaration that a catalogue, its towers, its filters and its value model share."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    user_features: tuple[UserFeature, ...] = pydantic.Field(
        default=(), description="what a request says about the user; input of the user tower"
    )
    item_features: tuple[UserFeature, ...] = pydantic.Field(
        default=(), description="what the item tower reads of an item"
    )
    attributes: tuple[Attribute, ...] = pydantic.Field(
        default=(), description="what filters can name"
    )
    signals: tuple[str, ...] = pydantic.Field(
        default=(), description="float columns of items that the value formula can name"
    )
    fields: tuple[Field, ...] = pydantic.Field(
        default=(), description="stored columns that a request can ask back"
    )
    heads: tuple[str, ...] = pydantic.Field(
        default=("user",), min_length=1, description="names of the query embeddings of a user"
    )
    head_merge: Literal["union", "intersection"] = pydantic.Field(
        default="union",
        description="which candidates of several heads are reranked: those of any head, or those "
        "that every head keeps",
    )
    tasks: tuple[str, ...] = pydantic.Field(
        default=(), description="names of the reranker's outputs"
    )
    value: str = pydantic.Field(
        default=SCORE_COLUMN, description="formula that orders the answer, in the value language"
    )
    weights: dict[str, float] = pydantic.Field(
        default_factory=dict, description="defaults of the formula's $names"
    )
    allow_task_weights: bool = pydantic.Field(
        default=True, description="whether a request may override the weights"
    )
    allow_value: bool = pydantic.Field(
        default=True, description="whether a request may bring a formula of its own"
    )

    @field_validator("signals", "heads", "tasks")
    @classmethod
    def _check_names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            _identifier(name)
        return names

    @field_validator("weights")
    @classmethod
    def _check_weights(cls, weights: dict[str, float]) -> dict[str, float]:
        for name, weight in weights.items():
            _identifier(name)
            if not math.isfinite(weight):
                raise ValueError(f"weight {name!r} must be finite, got {weight}")
        return weights

    @model_validator(mode="after")
    def _check_namespaces(self) -> Self:
        _unique("user feature", (feature.name for feature in self.user_features))
        _unique("item feature", (feature.name for feature in self.item_features))
        _unique("attribute", (attribute.name for attribute in self.attributes))
        _unique("field", (field.name for field in self.fields))
        _unique("head", self.heads)
        _unique("value column", self.value_columns)
        for name in self.value_columns:
            if name.lower() in VALUE_KEYWORDS:
                raise ValueError(f"value column {name!r} is a keyword of the value language")
        compile_value(self.value, self.value_columns, self.weights)
        return self

    @property
    def value_columns(self) -> tuple[str, ...]:
        """Names that the value formula can use, in column order: score, tasks, signals."""
        return (SCORE_COLUMN, *self.tasks, *self.signals)

    @property
    def categories(self) -> tuple[Attribute, ...]:
        """Attributes of kind category, in schema order."""
        return tuple(attribute for attribute in self.attributes if attribute.kind == "category")

    @property
    def numbers(self) -> tuple[Attribute, ...]:
        """Attributes of kind number, in schema order."""
        return tuple(attribute for attribute in self.attributes if attribute.kind == "number")

    def attribute(self, name: str) -> Attribute | None:
        """The attribute of that name, or None."""
        for attribute in self.attributes:
            if attribute.name == name:
                return attribute
        return None

    def check_features(self, features: Mapping[str, FeatureValues]) -> dict[str, FeatureValues]:
        """Every declared user feature with its checked values; ``()`` where none were given.

        Ids are a tuple, or ``WeightedIds`` of tuples where a weight differs from 1. Ids of weight 0
        are left out; lists that are then longer than ``max_length`` keep their last values, with
        their weights. Weights and numbers are rounded to float32. numpy numbers count as their
        kind; bools and numbers in strings do not. A text that is given must say something.

        Raises:
            SchemaError: naming the feature that is unknown or of the wrong type.
        """
        known = {feature.name for feature in self.user_features}
        for name in features:
            if name not in known:
                raise SchemaError(
                    str(name),
                    f"unknown user feature; the schema has {', '.join(sorted(known)) or 'none'}",
                )
        return {
            feature.name: _check_values(feature, features.get(feature.name, ()))
            for feature in self.user_features
        }


_FEATURES_OF = {
    "history": "user",
    "user_ids": "user",
    "user_numbers": "user",
    "tables": "item",
    "item_numbers": "item",
}
"""What a model's config may read, and of whom."""


def check_model(schema: Schema, config: Mapping[str, Any]) -> None:
    """Return if a model has the heads, tasks, signals and features of the schema.

    Args:
        schema: what requests and items have.
        config: of the model; what it does not name fits every schema.

    Raises:
        SchemaError: naming the part of the config.
    """
    for part in ("heads", "tasks", "signals"):
        wanted, made = tuple(getattr(schema, part)), tuple(config.get(part, getattr(schema, part)))
        if wanted != made:
            raise SchemaError(part, f"the schema has {wanted}, the model was made for {made}")
    reads = {part: config.get(part, ()) for part in _FEATURES_OF}
    if "history" in config:
        # The history names ids of an item feature, so it has their type.
        (item,) = (one for one in config["tables"] if one["name"] == config["item"])
        reads["history"] = [{"name": config["history"], "dtype": item["dtype"]}]
    for part, of_whom in _FEATURES_OF.items():
        features = schema.user_features if of_whom == "user" else schema.item_features
        kind = "numbers" if part.endswith("numbers") else "ids"
        declared = {
            one.name: {"dtype": one.dtype, "width": one.width}
            for one in features
            if one.kind == kind
        }
        for read in reads[part]:
            has = declared.get(read["name"])
            wants = {key: read[key] for key in ("dtype", "width") if key in read}
            if has is None or wants.items() - has.items():
                raise SchemaError(
                    part,
                    f"the model reads {kind} {read['name']} of {_listed(wants)}, "
                    f"the schema has {_listed(has or {}) or 'none'}",
                )
    query = (config.get("text") or {}).get("query")
    texts = [one.name for one in schema.user_features if one.kind == "text"]
    if query is not None and query not in texts:
        raise SchemaError(
            "text",
            f"the model reads the text {query}, the schema has {', '.join(texts) or 'none'}",
        )


def _listed(settings: Mapping[str, object]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items())


def _identifier(name: str) -> str:
    if not IDENTIFIER.fullmatch(name):
        raise ValueError(f"name must match [A-Za-z_][A-Za-z0-9_]*, got {name!r}")
    return name


def _unique(what: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{what} {name!r} is declared twice")
        seen.add(name)


def _check_values(feature: UserFeature, values: FeatureValues) -> FeatureValues:
    if isinstance(values, WeightedIds):
        return _check_weighted(feature, values)
    checked = _all_checked(feature, values)
    return checked if feature.kind == "numbers" else checked[-feature.max_length :]


def _all_checked(feature: UserFeature, values: FeatureValues) -> tuple[Any, ...]:
    """The values before a long list is cut."""
    if isinstance(values, np.ndarray) and values.ndim == 1:
        values = values.tolist()
    if isinstance(values, str | bytes | bytearray) or not isinstance(values, Sequence):
        what = {
            "ids": f"{feature.dtype} ids",
            "text": "texts",
            "numbers": "one number" if feature.width == 1 else f"{feature.width} numbers",
        }[feature.kind]
        raise SchemaError(feature.name, f"must be a list of {what}, got {type(values).__name__}")
    if feature.kind == "numbers":
        if len(values) not in (0, feature.width):
            raise SchemaError(
                feature.name, f"must have {feature.width} values or none, got {len(values)}"
            )
        return _float32(feature.name, "position", values)
    for position, value in enumerate(values):
        problem = _id_problem(feature.dtype, value)
        if problem is None and feature.kind == "text":
            problem = _text_problem(str(value), feature.max_characters)
        if problem:
            raise SchemaError(feature.name, f"position {position} must be {problem}")
    return tuple(map(str if feature.dtype == "string" else int, values))


def _check_weighted(feature: UserFeature, values: WeightedIds) -> FeatureValues:
    if feature.kind != "ids":
        raise SchemaError(
            feature.name, f"must have no weights, which go with ids alone, got {feature.kind}"
        )
    ids = _all_checked(feature, values.ids)
    given: Any = values.weights
    if isinstance(given, str | bytes) or not isinstance(given, Sequence | np.ndarray):
        raise SchemaError(
            feature.name, f"weights must be a list of numbers, got {type(given).__name__}"
        )
    if len(given) != len(ids):
        raise SchemaError(
            feature.name, f"must have as many weights as ids, {len(ids)}, got {len(given)}"
        )
    weights = _float32(feature.name, "weight", given)
    kept = [pair for pair in zip(ids, weights, strict=True) if pair[1] != 0]
    kept = kept[-feature.max_length :]
    if all(weight == 1.0 for _, weight in kept):
        return tuple(one for one, _ in kept)
    return WeightedIds(tuple(one for one, _ in kept), tuple(weight for _, weight in kept))


def _float32(name: str, what: str, values: Sequence[Any]) -> tuple[float, ...]:
    """The numbers rounded to float32."""
    for position, given in enumerate(values):
        value = given.item() if isinstance(given, np.generic) else given
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise SchemaError(name, f"{what} {position} must be a number, got {_described(value)}")
        if not -_MAX_FLOAT32 <= value <= _MAX_FLOAT32:
            raise SchemaError(
                name, f"{what} {position} must be a finite float32, got {_described(value)}"
            )
    return tuple(np.array(values, dtype=np.float64).astype(np.float32).tolist())


def _id_problem(dtype: ValueType, value: object) -> str | None:
    if dtype == "string":
        return None if isinstance(value, str) else f"a string, got {_described(value)}"
    if isinstance(value, bool | np.bool) or not isinstance(value, int | np.integer):
        return f"an int, got {_described(value)}"
    if not INT64_MIN <= value <= INT64_MAX:
        return f"a 64-bit signed int, got {value}"
    return None


def _text_problem(text: str, max_characters: int) -> str | None:
    if not text.strip():
        return f"a text that is not blank, got {_described(text)}"
    if len(text) > max_characters:
        return f"a text of at most {max_characters} characters, got {len(text)}"
    # A lone surrogate, as Python makes of undecodable bytes, is no character of any alphabet.
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        return f"a text of valid Unicode, got {_described(text)}"
    return None


def _described(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"

"""Requests checked and compiled against one generation."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

from torch import Tensor

from silvershard.kernels.value_program import ValueOp
from silvershard.model.filter import (
    CompiledFilter,
    FilterError,
    canonical,
    compile_filter,
    parse_filter,
)
from silvershard.model.limits import MAX_ANN_K
from silvershard.model.plan import Plan, PlanError, check_semantic_k, choose_plan, parse_plan
from silvershard.model.request import (
    FeatureValues,
    FilterMode,
    FilterParam,
    Request,
    RequestError,
)
from silvershard.model.schema import SchemaError
from silvershard.model.spec import ServingSpec
from silvershard.model.value import CompiledValue, ValueFormulaError, compile_value

# Filters and formulas that a compiler remembers, and the characters of the longest filter.
_REMEMBERED = 256
_LONGEST = 1000


@dataclass(frozen=True)
class CompiledRequest:
    """A checked request in the form the shards run."""

    features: Mapping[str, FeatureValues]
    k: int
    filter_key: str
    """Canonical filter text, empty without a filter; equal filters have equal keys."""
    scan: Tensor
    """``(L, 4)`` int64 filter program over the planes."""
    verify: Tensor
    """``(Lv, 4)`` int64 exact filter program, empty where the scan is exact."""
    exclude: tuple[int, ...]
    value_ops: Tensor
    """``(Y, 2)`` int32 value program."""
    value_constants: Tensor
    """``(Y,)`` float32."""
    pinned: Plan | None
    nprobe: int
    ann_k: int
    semantic_k: int | None
    exact: bool
    return_fields: tuple[str, ...]
    tasks: tuple[str, ...]
    """Of the model, in the order of the schema."""

    @property
    def tasks_read(self) -> frozenset[str]:
        """Return the tasks that the value formula reads."""
        columns = self.value_ops[self.value_ops[:, 0] == ValueOp.COLUMN, 1].tolist()
        # Column 0 is the score; signals follow the tasks.
        return frozenset(self.tasks[at - 1] for at in columns if 1 <= at <= len(self.tasks))

    @property
    def needs_count(self) -> bool:
        """True when the plan depends on how many items the filter lets through."""
        return bool(self.filter_key) and self.pinned is None

    def plan(self, spec: ServingSpec, eligible: int | None, documents: int | None = None) -> Plan:
        """Return the plan of this request, given its eligible count (None without a filter).

        Args:
            spec: the generation.
            eligible: items that pass the filter over all shards.
            documents: items there are now; None: as many as were published.

        Raises:
            RequestError: if an exact search would keep more candidates than allowed.
        """
        if self.pinned is not None:
            return self.pinned
        try:
            return choose_plan(
                spec,
                k=self.k,
                eligible=eligible,
                nprobe=self.nprobe,
                ann_k=self.ann_k,
                semantic_k=self.semantic_k,
                exact=self.exact,
                documents=documents,
            )
        except PlanError as error:
            raise RequestError("search.exact", str(error)) from None


def _bounded(name: str, value: int, low: int, high: int) -> int:
    if not low <= value <= high:
        raise RequestError(name, f"must be in {low}..{high}, got {value}")
    return value


def _checked_weights(request: Request, spec: ServingSpec) -> dict[str, float]:
    schema = spec.item_schema
    if request.task_weights and not schema.allow_task_weights:
        raise RequestError("task_weights", f"model {spec.model} does not allow them")
    unknown = sorted(set(request.task_weights) - set(schema.weights))
    # A formula of the request may have weights of its own.
    if unknown and not request.value:
        known = ", ".join(sorted(schema.weights)) or "none"
        raise RequestError("task_weights", f"unknown weight {unknown[0]!r}; the model has {known}")
    return {**schema.weights, **request.task_weights}


class RequestCompiler:
    """Compiles requests for one generation; what recurs among them is compiled once."""

    def __init__(self, spec: ServingSpec) -> None:
        """Make a compiler that has compiled nothing yet."""
        self._spec = spec
        self._filter = lru_cache(_REMEMBERED)(self._compile_filter)
        self._value = lru_cache(_REMEMBERED)(self._compile_value)

    def compile(self, request: Request) -> CompiledRequest:
        """Check a request and compile its filter and value formula; any thread may ask.

        Raises:
            RequestError: naming the field that is wrong, what is required and what was got.
        """
        spec, schema = self._spec, self._spec.item_schema
        _bounded("k", request.k, 1, spec.defaults.k_max)
        _bounded("search.nprobe", request.nprobe, 0, spec.num_clusters)
        _bounded("search.ann_k", request.ann_k, 0, MAX_ANN_K)
        if len(request.exclude_ids) > spec.defaults.max_exclusions:
            raise RequestError(
                "exclude_ids",
                f"at most {spec.defaults.max_exclusions} ids, got {len(request.exclude_ids)}",
            )
        try:
            features = schema.check_features(request.features)
        except SchemaError as error:
            raise RequestError(f"features.{error.field}", error.message) from None
        try:
            filter_key, compiled = self._filter_of(request)
        except FilterError as error:
            raise RequestError("filter", str(error)) from None
        weights = _checked_weights(request, spec)
        if request.value and not schema.allow_value:
            raise RequestError(
                "value", f"model {spec.model} does not allow a formula of the request"
            )
        try:
            value = self._value(request.value or schema.value, tuple(weights.items()))
        except ValueFormulaError as error:
            raise RequestError("value" if request.value else "task_weights", str(error)) from None
        try:
            check_semantic_k(request.semantic_k or 0, spec)
        except PlanError as error:
            raise RequestError("search.semantic_k", str(error)) from None
        own = request.exact or request.nprobe or request.ann_k or request.semantic_k is not None
        if request.plan and own:
            raise RequestError(
                "search.plan", "a pinned plan excludes exact, nprobe, ann_k, semantic_k"
            )
        try:
            pinned = parse_plan(request.plan, spec) if request.plan else None
        except PlanError as error:
            raise RequestError("search.plan", str(error)) from None
        known = {column.name for column in schema.fields}
        for name in request.return_fields:
            if name not in known:
                raise RequestError(
                    "return_fields",
                    f"unknown field {name!r}; the model has {', '.join(sorted(known)) or 'none'}",
                )
        made = CompiledRequest(
            features=features,
            k=request.k,
            filter_key=filter_key,
            scan=compiled.scan,
            verify=compiled.verify,
            # Ids at or above 2**63 cannot be items, so excluding them excludes nothing.
            exclude=tuple(sorted({item for item in request.exclude_ids if 0 <= item < 2**63})),
            value_ops=value.ops,
            value_constants=value.constants,
            pinned=pinned,
            nprobe=request.nprobe,
            ann_k=request.ann_k,
            semantic_k=request.semantic_k,
            exact=request.exact,
            return_fields=tuple(dict.fromkeys(request.return_fields)),
            tasks=schema.tasks,
        )
        for name in pinned.without if pinned is not None else ():
            if name in made.tasks_read:
                raise RequestError(
                    "search.plan",
                    f"the value formula reads task {name!r}, which the plan leaves out",
                )
        return made

    def _filter_of(self, request: Request) -> tuple[str, CompiledFilter]:
        text, mode = request.filter, request.filter_mode
        if request.params or len(text) > _LONGEST:
            return self._compile_filter(text, mode, request.params)
        return self._filter(text, mode)

    def _compile_filter(
        self, text: str, mode: FilterMode, params: Mapping[str, FilterParam] = MappingProxyType({})
    ) -> tuple[str, CompiledFilter]:
        """Return the canonical text of a filter, empty without one, and its programs."""
        schema = self._spec.item_schema
        expr = parse_filter(text, params, schema)
        key = canonical(expr) if text.strip() else ""
        return key, compile_filter(expr, self._spec.planes, schema, mode)

    def _compile_value(self, formula: str, weights: tuple[tuple[str, float], ...]) -> CompiledValue:
        return compile_value(formula, self._spec.item_schema.value_columns, dict(weights))


def compile_request(request: Request, spec: ServingSpec) -> CompiledRequest:
    """Check a request against a generation and compile its filter and value formula.

    Raises:
        RequestError: naming the field that is wrong, what is required and what was got.
    """
    return RequestCompiler(spec).compile(request)

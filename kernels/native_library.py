"""The native CPU library: where it is, what it can do and which of its instruction sets is used.

The library is optional: an installation without a C++ compiler lacks it, and the operators then run
their PyTorch references, which is said once. It is plain C, so it depends on neither the Python nor
the torch version.
"""

import ctypes
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

# Tests point this at a library that was built with sanitizers or with emulated instructions.
LIBRARY_PATH = Path(__file__).with_name("libsilvershard_native.so")
IMPLEMENTATIONS = ("reference", "scalar", "avx2", "avx512")
_ABI_VERSION = 3
_OPERATORS = (
    "ivf_scan",
    "ivf_search",
    "eligibility",
    "coarse_probe",
    "select_topk",
    "refine",
    "gather_linear",
    "quantize_rows",
    "fixed_map",
    "value_program",
    "bloom_build",
)

P = ParamSpec("P")
T = TypeVar("T")

_log = logging.getLogger(__name__)


class ValueRefused(Exception):
    """A native operator found a value, or made a score, outside its contract."""


_STATUS_ERRORS: dict[int, type[Exception]] = {1: ValueRefused, 2: MemoryError}


class NativeLibrary:
    """A loaded library.

    Args:
        path: the shared object.

    Raises:
        OSError: if it cannot be loaded or was built for another version of the interface.
    """

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        version = library.silvershard_abi_version()
        if version != _ABI_VERSION:
            raise OSError(f"{path} has interface version {version}, needed is {_ABI_VERSION}")
        self.functions = {name: library[f"silvershard_{name}"] for name in _OPERATORS}
        for function in self.functions.values():
            function.argtypes = (ctypes.c_int32, ctypes.c_char_p)
            function.restype = ctypes.c_int32
        # The scalar set is number 0, and every set includes those before it.
        self.best_isa: int = library.silvershard_best_isa()


class _Choice:
    """Which implementation CPU operators use; None until the first call decides."""

    def __init__(self) -> None:
        self.library: NativeLibrary | None = None
        self.isa: int | None = None


_choice = _Choice()


@cache
def load_library() -> NativeLibrary | None:
    """Return the library that was installed with the package, or None without one."""
    if not LIBRARY_PATH.exists():
        _log.warning(
            "the native operators were not built (no C++ compiler at installation?): "
            "CPU operators run in PyTorch and NumPy, which is several times slower"
        )
        return None
    try:
        return NativeLibrary(LIBRARY_PATH)
    except (OSError, AttributeError) as error:
        _log.warning("the native operators cannot be used, references run instead: %s", error)
        return None


def available() -> tuple[str, ...]:
    """Return the implementations that this machine can run, the best one last."""
    library = load_library()
    return IMPLEMENTATIONS[: 1 if library is None else library.best_isa + 2]


def in_use() -> str:
    """Return the name of the implementation that CPU operators use."""
    return "reference" if _native() is None else IMPLEMENTATIONS[1 + (_choice.isa or 0)]


def _native() -> NativeLibrary | None:
    if _choice.isa is None:
        _choose(available()[-1])
    return _choice.library


def _choose(name: str) -> None:
    # The library first: another thread takes a number for a sign that both are chosen.
    _choice.library = None if name == "reference" else load_library()
    _choice.isa = max(0, IMPLEMENTATIONS.index(name) - 1)


@contextmanager
def use(name: str) -> Iterator[None]:
    """Run the CPU operators of all threads with one implementation while the context is open.

    Args:
        name: one of ``available()``.

    Raises:
        ValueError: if this machine cannot run it.
    """
    if name not in available():
        raise ValueError(f"implementation must be one of {available()}, got {name!r}")
    before = _native(), _choice.isa
    _choose(name)
    try:
        yield
    finally:
        _choice.library, _choice.isa = before


def run_on_cpu(
    native: Callable[P, T],
    checked_reference: Callable[P, T],
    explain: Callable[P, None] | None = None,
) -> Callable[P, T]:
    """Return the CPU implementation of an operator: the native one, or else its reference.

    Args:
        native: the native implementation; checks the values that it reads.
        checked_reference: the reference behind checks of all values, which name the clause that
            failed.
        explain: looks further, after a refusal only, for what the reference does not mind.

    Returns:
        A function of the same arguments. It raises what ``checked_reference`` raises, and
        RuntimeError if the library refused values that the contract allows.
    """

    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        if _native() is None:
            return checked_reference(*args, **kwargs)
        try:
            return native(*args, **kwargs)
        except ValueRefused:
            checked_reference(*args, **kwargs)
            if explain is not None:
                explain(*args, **kwargs)
            raise RuntimeError(
                "the native operator refused values that its contract allows"
            ) from None

    return run


def is_plain_cpu(tensor: Tensor, *others: Tensor) -> bool:
    """Return whether an operator on these tensors may skip torch's dispatcher.

    That is so for ordinary tensors in eager mode, and saves 10 us and more per operator, which is a
    tenth of a whole search. Everything that watches the dispatcher needs the registered operator:
    compilation, export, tracers, fake tensors and function transforms, and gradients, which the
    registered operator refuses to lose.
    """
    if not tensor.is_cpu or type(tensor) is not Tensor or tensor.requires_grad:
        return False
    for other in others:
        if other.requires_grad:
            return False
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def call(operator: str, arguments: bytes) -> None:
    """Run one native operator; the interpreter lock is free meanwhile.

    Args:
        operator: its name without prefix.
        arguments: its structure of ``abi.h``.

    Raises:
        ValueRefused: if an index, a program, a float or a score lies outside the contract.
        MemoryError: if scratch memory cannot be had.
        RuntimeError: if the library is not in use.
    """
    library = _native()
    if library is None:
        raise RuntimeError("the native library is not in use")
    status = library.functions[operator](_choice.isa, arguments)
    if status:
        raise _STATUS_ERRORS[status]

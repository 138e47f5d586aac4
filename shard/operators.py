"""Which implementation of the operators computes on this machine's CPU."""

from typing import NamedTuple

from silvershard.kernels import native_library

REFERENCE, SCALAR, AVX2, AVX512 = native_library.IMPLEMENTATIONS


class CpuOperators(NamedTuple):
    """How operators run on a CPU."""

    in_use: str
    """One of ``reference``, ``scalar``, ``avx2`` and ``avx512``."""
    is_native: bool
    """The native library is installed and can be used."""


def cpu_operators() -> CpuOperators:
    """Return what the dispatch of the native library itself chooses here."""
    return CpuOperators(native_library.in_use(), native_library.load_library() is not None)

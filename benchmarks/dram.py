"""The DRAM read limit of this machine, measured in the run that is compared with it."""

import ctypes
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

_SOURCE = """
#include <stdint.h>
#include <stddef.h>
/* Sums words in eight independent chains, so that only the reads limit it. */
uint64_t read_all(const uint64_t *p, size_t n) {
  uint64_t s[64] = {0};
  for (size_t i = 0; i + 64 <= n; i += 64)
    for (int j = 0; j < 64; ++j) s[j] += p[i + j];
  uint64_t t = 0;
  for (int j = 0; j < 64; ++j) t += s[j];
  return t;
}
"""


class ReadLimit(NamedTuple):
    """How fast memory can be read."""

    bytes_per_s: float
    how: str
    """The loop that reached it."""


def read_limit(threads: int, *, num_bytes: int, rounds: int = 9) -> ReadLimit:
    """Return the best rate of several loops over a buffer that no cache holds.

    Args:
        threads: that read disjoint parts at once.
        num_bytes: size of the buffer.
        rounds: measurements of each loop; the best one counts.
    """
    buffer = np.ones(num_bytes // 8, dtype=np.int64)
    parts = np.array_split(buffer, threads)
    loops: dict[str, Callable[[np.ndarray], object]] = {
        "numpy.sum": np.sum,
        "torch.sum": lambda part: torch.from_numpy(part).sum(),
    }
    compiled = _compiled_loop()
    if compiled is not None:
        loops["C loop"] = compiled
    before = torch.get_num_threads()
    best = ReadLimit(0.0, "none")
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for how, loop in loops.items():
            for _ in range(rounds):
                began = time.perf_counter()
                list(pool.map(loop, parts))
                rate = buffer.nbytes / (time.perf_counter() - began)
                best = max(best, ReadLimit(rate, how))
    torch.set_num_threads(before)
    return best


def _compiled_loop() -> Callable[[np.ndarray], object] | None:
    """Return the loop in C, or None where there is no compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "read.c", Path(folder) / "read.so"
        source.write_text(_SOURCE)
        command = [compiler, "-O3", "-march=native", "-shared", "-fPIC"]
        done = subprocess.run(
            [*command, "-o", str(library), str(source)], capture_output=True, check=False
        )
        if done.returncode:
            return None
        function = ctypes.CDLL(str(library)).read_all
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    function.restype = ctypes.c_uint64
    return lambda part: function(part.ctypes.data, part.size)


def last_level_cache_bytes() -> int:
    """Return the size of the last-level cache that core 0 sees, 0 where it is not told."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1], 1)
        sizes.append(int(text.rstrip("KMG")) * unit)
    return max(sizes)

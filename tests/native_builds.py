"""Builds the native library in special ways and runs the tests of the operators against it.

    python -P tests/native_builds.py sanitized    # AddressSanitizer and UndefinedBehaviorSanitizer
    python -P tests/native_builds.py emulated     # AVX-512 on any machine, through SIMDe

Further arguments go to pytest. Sources and flags are those of setup.py, but for optimisation.
"""

import ctypes
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
COMPILER = "g++"
FLAGS = {
    "sanitized": [
        *("-O1", "-g", "-fno-omit-frame-pointer"),
        *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    ],
    "emulated": ["-O2", "-march=native", "-Wno-psabi", "-DSILVERSHARD_EMULATED", f"-I{TESTS}"],
}
# Tests name the implementation that they run; in the reference there is nothing to find.
SELECTION = {"sanitized": "scalar or avx2 or avx512", "emulated": "avx512"}
AVX512 = 2


def run(*command: str) -> str:
    """Run a compiler and return what it prints; its messages are the ones of a failure."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout


def native_extension() -> Any:
    """Return the extension that setup.py describes."""
    described: dict[str, Any] = {}
    with mock.patch("setuptools.setup", lambda **keywords: described.update(keywords)):
        runpy.run_path(str(ROOT / "setup.py"))
    (extension,) = described["ext_modules"]
    return extension


def build(kind: str) -> Path:
    """Compile all sources side by side, unless nothing has changed since the last time."""
    extension = native_extension()
    folder = ROOT / "build" / f"native-{kind}"
    library = folder / "libsilvershard_native.so"
    inputs = [*extension.sources, *extension.depends, "setup.py", "tests/native_builds.py"]
    inputs += [str(path) for path in TESTS.glob("emulated_*.h")]
    newest = max((ROOT / name).stat().st_mtime for name in inputs)
    if library.exists() and library.stat().st_mtime > newest:
        return library
    folder.mkdir(parents=True, exist_ok=True)
    flags = [flag for flag in extension.extra_compile_args if not flag.startswith(("-O", "-g"))]
    flags += ["-fPIC", *(f"-D{name}" for name, _ in extension.define_macros), *FLAGS[kind]]
    objects = [str(folder / Path(source).with_suffix(".o").name) for source in extension.sources]
    compilers = [
        subprocess.Popen([COMPILER, *flags, "-c", source, "-o", target], cwd=ROOT)
        for source, target in zip(extension.sources, objects, strict=True)
    ]
    statuses = [compiler.wait() for compiler in compilers]
    if any(statuses):
        sys.exit(f"the {kind} library cannot be compiled")
    run(COMPILER, *flags, *extension.extra_link_args, "-shared", *objects, "-o", str(library))
    return library


def environment(kind: str, library: Path) -> dict[str, str]:
    """Return the environment in which the tests load the library."""
    changes = {"SILVERSHARD_NATIVE_LIBRARY": str(library)}
    if kind == "sanitized":
        # Python is not built with the sanitizer, so its run-time libraries come first by force.
        # libstdc++ is among them because they look up the function that throws when they start.
        runtime = ("libasan.so", "libubsan.so", "libstdc++.so.6")
        found = [run(COMPILER, f"-print-file-name={name}").strip() for name in runtime]
        if missing := [name for name in found if not Path(name).is_absolute()]:
            sys.exit(f"{COMPILER} lacks {', '.join(missing)}")
        # Python keeps memory until it ends.
        changes |= {
            "LD_PRELOAD": " ".join(found),
            "ASAN_OPTIONS": "detect_leaks=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
    return os.environ | changes


def main(kind: str, *arguments: str) -> int:
    """Build and test; returns the status of pytest."""
    if shutil.which(COMPILER) is None:
        sys.exit(f"{COMPILER} is needed to test the native operators")
    if kind == "emulated":
        header = subprocess.run(
            [COMPILER, "-E", "-x", "c++", "-", "-o", os.devnull],
            input="#include <simde/x86/avx512.h>",
            capture_output=True,
            text=True,
            check=False,
        )
        if header.returncode:
            sys.exit("emulation needs SIMDe: install the package libsimde-dev")
    library = build(kind)
    if kind == "emulated" and ctypes.CDLL(str(library)).silvershard_best_isa() != AVX512:
        sys.exit(f"{library} does not offer AVX-512")
    done = subprocess.run(
        [
            *(sys.executable, "-P", "-m", "pytest", "tests/kernels", "-q", "-n", "2", "-rfE"),
            *("--dist", "worksteal", "--ignore-glob=*_triton.py", "-k", SELECTION[kind]),
            # What a dying process writes must not end in a file of pytest.
            *("--capture=sys", "-p", "no:cacheprovider", *arguments),
        ],
        cwd=ROOT,
        env=environment(kind, library),
        check=False,
    )
    return done.returncode


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in FLAGS:
        sys.exit(
            f"usage: python -P tests/native_builds.py {{{','.join(FLAGS)}}} [pytest arguments]"
        )
    sys.exit(main(*sys.argv[1:]))

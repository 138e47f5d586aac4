"""Builds the native CPU operators where a C++ compiler is there; all else is in pyproject.toml."""

import os
import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NATIVE = Path("kernels/native")
ON_X86 = platform.machine() in ("x86_64", "AMD64")


class BuildSharedLibrary(build_ext):
    """Names the result as a plain shared library: it is loaded with ctypes, not imported."""

    def get_ext_filename(self, fullname: str) -> str:
        """Return the path without the tag of a Python version."""
        return str(Path(*fullname.split(".")).with_suffix(".so"))


class WheelOfAnyPython(bdist_wheel):
    """Tags the wheel for the platform only, since nothing in it depends on the Python version."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return (python, abi, platform)."""
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            "silvershard.kernels.libsilvershard_native",
            sources=sorted(str(path) for path in NATIVE.glob("*.cpp")),
            depends=sorted(str(path) for path in NATIVE.glob("*.h")),
            define_macros=[("SILVERSHARD_X86", None)] if ON_X86 else [],
            # Products and sums must stay separate operations: every instruction set rounds alike.
            extra_compile_args=[
                "-std=c++17",
                "-O3",
                "-g0",
                "-fopenmp",
                "-ffp-contract=off",
                "-fno-math-errno",
                "-fno-trapping-math",
                "-fvisibility=hidden",
            ],
            extra_link_args=["-fopenmp"],
            language="c++",
            # Without a compiler the package installs all the same and runs in PyTorch; whoever
            # works on the sources sees what the compiler says.
            optional=not os.environ.get("SILVERSHARD_REQUIRE_NATIVE"),
        )
    ],
    cmdclass={"build_ext": BuildSharedLibrary, "bdist_wheel": WheelOfAnyPython},
)

"""Which versions are installed beside silvershard, which of them work, and which GPUs they see.

A build of fbgemm-gpu for CUDA beside a torch for the CPU is the classical breakage: pip installs
both without a word, and nothing that looks up a table runs.
"""

import importlib
import importlib.metadata
import platform
import re
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)(?:\[[^\]]*\])?\s*([^;]*)")
_CLAUSE = re.compile(r"(==|>=|<=|<|>|!=|~=)\s*([^,\s]+)")
_GPU_FIELDS = "index,name,driver_version,memory.total,memory.free,compute_mode"
_QUERY_TIMEOUT_S = 10.0

FBGEMM, FBGEMM_CPU, SHIM = "fbgemm-gpu", "fbgemm-gpu-cpu", "+cpushim"


class Gpu(NamedTuple):
    """One GPU as its driver sees it."""

    number: int
    name: str
    driver: str
    total: int
    """Bytes."""
    free: int
    """Bytes."""
    mode: str
    """``Default``, ``Exclusive_Process`` or ``Prohibited``."""


class Torch(NamedTuple):
    """The build of torch and what it can do here."""

    cuda: str
    """Version of CUDA that it was built for; empty: a build for the CPU."""
    sees_gpu: bool
    problem: str
    """Why it cannot be imported; empty if it can."""


class Software(NamedTuple):
    """Everything that is installed."""

    python: str
    requires_python: str
    installed: Mapping[str, str]
    """Versions by name of distribution, of those that are needed and of the builds of fbgemm."""
    required: Mapping[str, str]
    """Conditions on versions by name of distribution, as ``>=7,<8``."""
    torch: Torch
    fbgemm_problem: str
    """Why its operators cannot be loaded; empty if they can."""
    operators: str
    """Which operators run on the CPU: ``reference``, ``scalar``, ``avx2`` or ``avx512``."""
    gpus: tuple[Gpu, ...]


def read_software() -> Software:
    """Return what is installed in the environment of this process; it imports torch."""
    name = "silvershard"
    required = base_requirements(importlib.metadata.requires(name) or ())
    torch = _torch()
    return Software(
        python=platform.python_version(),
        requires_python=importlib.metadata.metadata(name)["Requires-Python"],
        installed=_installed((*required, FBGEMM, FBGEMM_CPU)),
        required=required,
        torch=torch,
        fbgemm_problem=torch.problem or import_problem("fbgemm_gpu"),
        operators="" if torch.problem else _operators(),
        gpus=read_gpus(),
    )


def base_requirements(lines: Iterable[str]) -> dict[str, str]:
    """Return the conditions of requirements that belong to no extra, by name of distribution.

    Args:
        lines: requirements, as ``ray[default]==2.60.0`` or ``x>=1,<2; extra == "y"``.
    """
    found = {}
    for line in lines:
        match = _REQUIREMENT.match(line)
        if match and ";" not in line:
            found[match[1]] = match[2].strip().strip("()")
    return found


def satisfies(version: str, condition: str) -> bool:
    """Return whether a version fulfils all of ``==1.2``, ``>=7,<8`` and so on.

    A local part such as ``+cpu`` counts only where the condition has one. Of versions before a
    release, only the numbers are compared.
    """
    return all(_fulfils(version, sign, wanted) for sign, wanted in _CLAUSE.findall(condition))


def _fulfils(version: str, sign: str, wanted: str) -> bool:
    if sign == "==":
        return (version if "+" in wanted else version.partition("+")[0]) == wanted
    if sign == "!=":
        return version.partition("+")[0] != wanted
    one, other = _numbers(version), _numbers(wanted)
    width = max(len(one), len(other))
    one, other = one + (0,) * (width - len(one)), other + (0,) * (width - len(other))
    if sign == "~=":
        prefix = len(_numbers(wanted)) - 1
        return one >= other and one[:prefix] == other[:prefix]
    return {">=": one >= other, "<=": one <= other, "<": one < other, ">": one > other}[sign]


def _numbers(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def import_problem(module: str) -> str:
    """Return why a module cannot be imported, in one line; empty if it can."""
    try:
        importlib.import_module(module)
    except Exception as error:  # noqa: BLE001 - a library that does not fit can raise anything
        lines = str(error).splitlines() or [""]
        return f"{type(error).__name__}: {lines[0]}"
    return ""


def read_gpus(run: Callable[[Sequence[str]], str] | None = None) -> tuple[Gpu, ...]:
    """Return the GPUs that the driver knows; none where there is no driver.

    Args:
        run: runs a program and returns what it prints; raises OSError or SubprocessError.
    """
    try:
        text = (run or _run)(
            ("nvidia-smi", f"--query-gpu={_GPU_FIELDS}", "--format=csv,noheader,nounits")
        )
    except (OSError, subprocess.SubprocessError):
        return ()
    found = []
    for line in text.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == 6 and fields[0].isdecimal():
            total, free = (int(field) << 20 if field.isdecimal() else 0 for field in fields[3:5])
            found.append(Gpu(int(fields[0]), fields[1], fields[2], total, free, fields[5]))
    return tuple(found)


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=_QUERY_TIMEOUT_S
    )
    return done.stdout


def _installed(names: Iterable[str]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _torch() -> Torch:
    problem = import_problem("torch")
    if problem:
        return Torch("", sees_gpu=False, problem=problem)
    import torch

    return Torch(torch.version.cuda or "", sees_gpu=torch.cuda.is_available(), problem="")


def _operators() -> str:
    from silvershard.shard.operators import cpu_operators

    return cpu_operators().in_use

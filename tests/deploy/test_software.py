import importlib.metadata
import platform
import subprocess
from collections.abc import Sequence

import pytest

from silvershard.deploy.software import (
    Gpu,
    base_requirements,
    import_problem,
    read_gpus,
    read_software,
    satisfies,
)


def test_requirements_of_extras_are_left_out() -> None:
    assert base_requirements(
        [
            "ray[default]==2.60.0",
            "protobuf<8,>=7.35.1",
            "numpy (>=2.1)",
            "tqdm",
            'redis[hiredis]==8.1.0; extra == "redis"',
        ]
    ) == {"ray": "==2.60.0", "protobuf": "<8,>=7.35.1", "numpy": ">=2.1", "tqdm": ""}


@pytest.mark.parametrize(
    ("version", "condition", "expected"),
    [
        ("2.13.0", "==2.13.0", True),
        ("2.13.0+cpu", "==2.13.0", True),
        ("2.13.1", "==2.13.0", False),
        ("1.8.0", "==1.8.0+cpushim", False),
        ("1.8.0+cpushim", "==1.8.0+cpushim", True),
        ("7.36.2", ">=7.35.1,<8", True),
        ("8.0", ">=7.35.1,<8", False),
        ("7.35", "<8,>=7.35.1", False),
        ("3.11.7", ">=3.11", True),
        ("3.9", ">=3.11", False),
        ("3.11", ">3.11.0", False),
        ("2.1", "<=2.1.0", True),
        ("2.1", "!=2.1", False),
        ("1.4.5", "~=1.4.2", True),
        ("1.5.0", "~=1.4.2", False),
        ("1.0", "", True),
        ("", ">=1", False),
    ],
)
def test_versions_are_compared_as_numbers(version: str, condition: str, expected: bool) -> None:
    assert satisfies(version, condition) is expected


def test_a_module_that_cannot_be_imported_says_why_in_one_line() -> None:
    assert import_problem("json") == ""
    assert import_problem("no_such_module") == (
        "ModuleNotFoundError: No module named 'no_such_module'"
    )


def test_gpus_are_read_from_the_driver() -> None:
    def run(command: Sequence[str]) -> str:
        assert command[0] == "nvidia-smi"
        return (
            "0, NVIDIA H100 80GB HBM3, 560.35.03, 81559, 80000, Default\n"
            "1, NVIDIA H100 80GB HBM3, 560.35.03, [N/A], [N/A], Exclusive_Process\n"
            "a line of a warning\n"
        )

    first, second = read_gpus(run)
    assert first == Gpu(
        0, "NVIDIA H100 80GB HBM3", "560.35.03", 81559 << 20, 80000 << 20, "Default"
    )
    assert (second.total, second.free, second.mode) == (0, 0, "Exclusive_Process")


@pytest.mark.parametrize(
    "error", [FileNotFoundError(), subprocess.CalledProcessError(9, "nvidia-smi")]
)
def test_without_a_driver_there_is_no_gpu(error: Exception) -> None:
    def run(command: Sequence[str]) -> str:
        raise error

    assert read_gpus(run) == ()


def test_what_is_installed_here_fits() -> None:
    found = read_software()
    assert found.python == platform.python_version()
    assert satisfies(found.python, found.requires_python)
    assert found.installed["ray"] == importlib.metadata.version("ray")
    for name, condition in found.required.items():
        assert satisfies(found.installed[name], condition), name
    assert (found.torch.problem, found.fbgemm_problem) == ("", "")
    assert found.operators in ("reference", "scalar", "avx2", "avx512")

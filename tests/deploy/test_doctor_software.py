from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from silvershard.deploy.doctor import Check
from silvershard.deploy.doctor_software import (
    RAY_SETTINGS,
    environment_checks,
    head_checks,
    software_checks,
)
from silvershard.deploy.head import Head
from silvershard.deploy.software import Gpu, Software, Torch

GIB = 1 << 30
CPU_FBGEMM = {"fbgemm-gpu": "1.8.0+cpushim", "fbgemm-gpu-cpu": "1.8.0"}
GOOD = Software(
    python="3.11.7",
    requires_python=">=3.11",
    installed={"torch": "2.13.0+cpu", "ray": "2.60.0", "grpcio": "1.85.1", **CPU_FBGEMM},
    required={"torch": "==2.13.0", "ray": "==2.60.0", "grpcio": "==1.85.1"},
    torch=Torch(cuda="", sees_gpu=False, problem=""),
    fbgemm_problem="",
    operators="avx512",
    gpus=(),
)
CUDA = Torch(cuda="12.8", sees_gpu=True, problem="")
H100 = Gpu(0, "H100", "560.35", 80 * GIB, 80 * GIB, "Exclusive_Process")
ON_GPU = GOOD._replace(
    torch=CUDA, gpus=(H100,), installed={**GOOD.installed, "fbgemm-gpu": "1.8.0"}
)
del ON_GPU.installed["fbgemm-gpu-cpu"]  # type: ignore[attr-defined]


def by_name(checks: list[Check]) -> dict[str, Check]:
    assert all(one.advice for one in checks if one.verdict != "ok"), checks
    return {one.name: one for one in checks}


@pytest.mark.parametrize("software", [GOOD, ON_GPU])
def test_what_fits_together_is_well(software: Software) -> None:
    checks = by_name(software_checks(software))
    assert {one.verdict for one in checks.values()} == {"ok"}
    assert "ray 2.60.0" in checks["versions"].found


@pytest.mark.parametrize(
    ("software", "name", "verdict", "found", "advice"),
    [
        (
            GOOD._replace(python="3.10.2"),
            *("python", "fail", "Python 3.10.2", ">=3.11 is needed"),
        ),
        (
            GOOD._replace(installed={**GOOD.installed, "ray": "2.61.0"}),
            *("versions", "fail", "ray 2.61.0, needed is ==2.60.0", "fresh environment"),
        ),
        (
            GOOD._replace(required={**GOOD.required, "tqdm": ""}),
            *("versions", "fail", "tqdm is missing, needed is any version", "fresh environment"),
        ),
        (
            GOOD._replace(torch=Torch("", sees_gpu=False, problem="OSError: libfoo"), operators=""),
            *("builds", "fail", "torch cannot be imported: OSError: libfoo", "fresh environment"),
        ),
        (
            GOOD._replace(installed={"torch": "2.13.0+cpu", "fbgemm-gpu": "1.8.0"}, required={}),
            *("builds", "fail", "1.8.0 for CUDA beside torch for the CPU", "silvershard[cpu]"),
        ),
        (
            GOOD._replace(installed={**GOOD.installed, "fbgemm-gpu": "1.9.0"}),
            *("builds", "fail", "lie over each other", "pip uninstall both"),
        ),
        (
            GOOD._replace(fbgemm_problem="OSError: undefined symbol"),
            *("builds", "fail", "cannot be loaded: OSError: undefined symbol", "move together"),
        ),
        (
            GOOD._replace(operators="reference"),
            *("operators", "warn", "the native library was not built", "C++ compiler"),
        ),
        (GOOD._replace(operators="scalar"), "operators", "warn", "native, scalar", "AVX2"),
        (
            GOOD._replace(gpus=(H100,)),
            *("gpu", "warn", "1 x H100, but torch is a build for the CPU", "silvershard[gpu]"),
        ),
        (
            ON_GPU._replace(torch=CUDA._replace(sees_gpu=False)),
            *("gpu", "fail", "driver 560.35, which torch for CUDA 12.8 cannot use", "driver"),
        ),
        (
            ON_GPU._replace(gpus=(H100._replace(free=8 * GIB),)),
            *("gpu 0", "warn", "8,192.0 MiB of 81,920.0 MiB free", "nvidia-smi"),
        ),
        (
            ON_GPU._replace(gpus=(H100._replace(mode="Prohibited"),)),
            *("gpu 0", "fail", "Prohibited", "-i 0 -c EXCLUSIVE_PROCESS"),
        ),
    ],
)
def test_what_does_not_fit_is_named_with_what_to_do(
    software: Software, name: str, verdict: str, found: str, advice: str
) -> None:
    check = by_name(software_checks(software))[name]
    assert check.verdict == verdict
    assert found in check.found
    assert advice in check.advice


def test_without_torch_the_operators_are_unknown() -> None:
    broken = GOOD._replace(torch=Torch("", sees_gpu=False, problem="x"), operators="")
    assert by_name(software_checks(broken))["operators"].verdict == "fail"


def test_torch_for_cuda_runs_without_a_gpu() -> None:
    check = by_name(software_checks(ON_GPU._replace(gpus=())))["gpu"]
    assert (check.verdict, "runs on the CPU too" in check.found) == ("ok", True)


def test_a_gpu_that_others_may_use_is_well_with_a_hint() -> None:
    check = by_name(software_checks(ON_GPU._replace(gpus=(H100._replace(mode="Default"),))))[
        "gpu 0"
    ]
    assert check.verdict == "ok"
    assert "EXCLUSIVE_PROCESS" in check.advice


PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE"}
TUNED = {**PASSIVE, **RAY_SETTINGS, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "x"}
CLOSED, OPEN = 0o100600, 0o100644


def environment(
    environ: Mapping[str, str], modes: Mapping[str, int] | None = None, *, joins: bool = False
) -> dict[str, Check]:
    known = modes or {}
    return by_name(
        environment_checks(
            environ, Path("/home/me"), joins=joins, mode_of=lambda path: known.get(str(path))
        )
    )


def test_a_machine_on_its_own_needs_no_settings_of_ray() -> None:
    checks = environment(PASSIVE)
    assert set(checks) == {"OpenMP", "Ray token"}
    assert {one.verdict for one in checks.values()} == {"ok"}


def test_a_machine_that_joins_needs_them_all() -> None:
    checks = environment(TUNED, joins=True)
    assert {one.verdict for one in checks.values()} == {"ok"}
    for name in RAY_SETTINGS:
        fewer = {key: value for key, value in TUNED.items() if key != name}
        check = environment(fewer, joins=True)["Ray settings"]
        assert (check.verdict, check.found) == ("warn", f"{name} is not set")
        assert f"{name}={RAY_SETTINGS[name]}" in check.advice


@pytest.mark.parametrize(
    ("environ", "joins", "name", "verdict", "found", "advice"),
    [
        ({}, False, "OpenMP", "warn", "not set", "PASSIVE"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, False, "OpenMP", "warn", "ACTIVE", "unset it"),
        ({}, True, "Ray token", "fail", "RAY_AUTH_MODE is not set", "RAY_AUTH_TOKEN_PATH"),
        ({"RAY_AUTH_MODE": "disabled"}, False, "Ray token", "warn", "disabled", "may run code"),
        ({"RAY_AUTH_MODE": "disabled"}, True, "Ray token", "fail", "disabled", "may run code"),
        (
            {"RAY_AUTH_MODE": "token"},
            True,
            *("Ray token", "fail", "/home/me/.ray/auth_token cannot be read", "0600"),
        ),
        (
            {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/open"},
            True,
            *("Ray token", "warn", "/open is open to other users", "chmod 600 /open"),
        ),
        (
            {"RAY_AUTH_MODE": "TOKEN", "RAY_AUTH_TOKEN_PATH": "/closed"},
            True,
            *("Ray token", "ok", "in /closed", ""),
        ),
        (
            {"RAY_gcs_storage": "memory"},
            False,
            *("GCS storage", "warn", "RAY_gcs_storage is memory", "rocksdb"),
        ),
        (
            {"RAY_gcs_storage_path": "/there"},
            False,
            *("GCS storage", "warn", "RAY_gcs_storage is not set", "rocksdb"),
        ),
        (
            {"RAY_gcs_storage": "rocksdb"},
            False,
            *("GCS storage", "fail", "RAY_gcs_storage_path is not set", "directory"),
        ),
        (
            {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": "/gone"},
            False,
            *("GCS storage", "fail", "/gone, which is not there", "directory"),
        ),
        (
            {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": "/there"},
            False,
            *("GCS storage", "ok", "RocksDB in /there", ""),
        ),
    ],
)
def test_the_environment_is_judged(
    environ: dict[str, str], joins: bool, name: str, verdict: str, found: str, advice: str
) -> None:
    modes = {"/open": OPEN, "/closed": CLOSED, "/there": 0o40700}
    check = environment(environ, modes, joins=joins)[name]
    assert check.verdict == verdict
    assert found in check.found
    assert advice in check.advice


HEAD = Head("head:6379", 0.0004, ray="2.60.0", python="3.11.7", silvershard="0.1.0")


@pytest.mark.parametrize(
    ("change", "name", "verdict", "found", "advice"),
    [
        ({}, "head", "ok", "head:6379, 0.40 ms away", ""),
        ({}, "head versions", "ok", "silvershard 0.1.0 too", ""),
        ({"silvershard": ""}, "head versions", "ok", "no router answers there", ""),
        ({"problem": "timed out"}, "head", "fail", "head:6379: timed out", "ray start --head"),
        ({"round_trip_s": 0.02}, "head", "warn", "20.00 ms away", "same data centre"),
        ({"refused": "bad token"}, "head versions", "fail", "bad token", "token of this machine"),
        ({"ray": "2.59.0"}, "head versions", "fail", "Ray 2.59.0 there, 2.60.0 here", "same"),
        (
            {"python": "3.12.1"},
            *("head versions", "fail", "Python 3.12.1 there, 3.11.7 here", "same"),
        ),
        (
            {"silvershard": "0.2.0"},
            *("head versions", "fail", "silvershard 0.2.0 there, 0.1.0 here", "same image"),
        ),
    ],
)
def test_the_head_is_judged(
    change: dict[str, Any], name: str, verdict: str, found: str, advice: str
) -> None:
    check = by_name(head_checks(HEAD._replace(**change), GOOD, "0.1.0"))[name]
    assert check.verdict == verdict
    assert found in check.found
    assert advice in check.advice

"""Judges the software of a machine, how its Ray is set up, and the head that it shall join."""

import stat
from collections.abc import Callable, Mapping
from pathlib import Path

from silvershard.deploy.doctor import Check
from silvershard.deploy.head import Head
from silvershard.deploy.memory_plan import mib
from silvershard.deploy.software import FBGEMM, FBGEMM_CPU, SHIM, Gpu, Software, satisfies

_SLOW_ROUND_TRIP_S = 0.005
_LEAST_FREE_GPU = 0.9
_DEFAULT_TOKEN = ".ray/auth_token"

RAY_SETTINGS = {
    "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "500",
    "RAY_health_check_failure_threshold": "2",
    "RAY_timeout_ms_task_wait_for_death_info": "50",
}
"""Settings of Ray for many hosts, set on every one before Ray starts; what was measured with.

By default every process of Ray ends 60 s after the head is lost, and a host that is cut off counts
as alive for 63 s, with these for 2 s.
"""
GCS_STORAGE, GCS_PATH = "RAY_gcs_storage", "RAY_gcs_storage_path"


def software_checks(software: Software) -> list[Check]:
    """Return a verdict on versions, builds, operators and GPUs."""
    return [
        _python(software),
        _versions(software),
        _builds(software),
        _operators(software.operators),
        *_gpus(software),
    ]


def _python(software: Software) -> Check:
    found = f"Python {software.python}"
    if satisfies(software.python, software.requires_python):
        return Check("python", "ok", found)
    return Check(
        "python",
        "fail",
        found,
        f"{software.requires_python} is needed: make another virtual environment",
    )


def _versions(software: Software) -> Check:
    wrong = [
        f"{name} {software.installed[name]}, needed is {condition}"
        if name in software.installed
        else f"{name} is missing, needed is {condition or 'any version'}"
        for name, condition in software.required.items()
        if not satisfies(software.installed.get(name, ""), condition)
        or name not in software.installed
    ]
    if not wrong:
        shown = ("torch", "torchrec", FBGEMM, "ray", "grpcio")
        return Check(
            "versions",
            "ok",
            ", ".join(
                f"{name} {software.installed[name]}" for name in shown if name in software.installed
            ),
        )
    return Check(
        "versions",
        "fail",
        "; ".join(wrong),
        "install silvershard into a fresh environment with its extra cpu or gpu",
    )


def _builds(software: Software) -> Check:
    torch, installed = software.torch, software.installed
    if torch.problem:
        return Check(
            "builds",
            "fail",
            f"torch cannot be imported: {torch.problem}",
            "install silvershard into a fresh environment",
        )
    build = f"torch for CUDA {torch.cuda}" if torch.cuda else "torch for the CPU"
    fbgemm = installed.get(FBGEMM, "")
    is_cuda = bool(fbgemm) and not fbgemm.endswith(SHIM)
    if is_cuda and FBGEMM_CPU in installed:
        return Check(
            "builds",
            "fail",
            f"{FBGEMM} {fbgemm} and {FBGEMM_CPU} {installed[FBGEMM_CPU]} lie over each other",
            "pip uninstall both, then install the one extra, cpu or gpu, that this machine needs",
        )
    if is_cuda and not torch.cuda:
        return Check(
            "builds",
            "fail",
            f"{FBGEMM} {fbgemm} for CUDA beside {build}",
            f"pip uninstall {FBGEMM}, then install silvershard[cpu] with the shim of "
            "deploy/packaging",
        )
    if software.fbgemm_problem:
        return Check(
            "builds",
            "fail",
            f"{build}, but fbgemm cannot be loaded: {software.fbgemm_problem}",
            "torch, torchrec and fbgemm move together: install silvershard into a fresh "
            "environment with its extra cpu or gpu",
        )
    which = "for CUDA" if is_cuda else "for the CPU"
    return Check("builds", "ok", f"{build}, fbgemm {fbgemm or '-'} {which}")


def _operators(in_use: str) -> Check:
    name = "operators"
    if not in_use:
        return Check(name, "fail", "unknown without torch", "see builds")
    if in_use == "reference":
        return Check(
            name,
            "warn",
            "in PyTorch: the native library was not built or cannot be loaded",
            "several times slower with the same results: install a C++ compiler and silvershard "
            "again",
        )
    if in_use == "scalar":
        return Check(
            name,
            "warn",
            "native, scalar",
            "several times slower with the same results: choose a CPU with AVX2 or AVX-512 VNNI",
        )
    return Check(name, "ok", f"native, {in_use}")


def _gpus(software: Software) -> list[Check]:
    torch, gpus = software.torch, software.gpus
    if not gpus:
        if torch.cuda and not torch.problem:
            return [Check("gpu", "ok", f"none; torch for CUDA {torch.cuda} runs on the CPU too")]
        return [Check("gpu", "ok", "none")]
    if not torch.cuda:
        return [
            Check(
                "gpu",
                "warn",
                f"{len(gpus)} x {gpus[0].name}, but torch is a build for the CPU",
                "training on them needs silvershard[gpu] in an environment of its own",
            )
        ]
    if not torch.sees_gpu:
        return [
            Check(
                "gpu",
                "fail",
                f"{gpus[0].name}, driver {gpus[0].driver}, which torch for CUDA {torch.cuda} "
                "cannot use",
                "install a driver for that version of CUDA, and look at CUDA_VISIBLE_DEVICES",
            )
        ]
    return [_gpu(one) for one in gpus]


def _gpu(gpu: Gpu) -> Check:
    name = f"gpu {gpu.number}"
    found = f"{gpu.name}, driver {gpu.driver}, {mib(gpu.free)} of {mib(gpu.total)} free"
    if gpu.mode == "Prohibited":
        return Check(
            name,
            "fail",
            f"{found}, compute mode Prohibited",
            f"allow it: nvidia-smi -i {gpu.number} -c EXCLUSIVE_PROCESS",
        )
    if gpu.free < _LEAST_FREE_GPU * gpu.total:
        return Check(
            name,
            "warn",
            found,
            "another process holds the rest, maybe one that is gone: look at nvidia-smi",
        )
    if gpu.mode == "Default":
        return Check(
            name,
            "ok",
            f"{found}, shared mode",
            f"nvidia-smi -i {gpu.number} -c EXCLUSIVE_PROCESS keeps others away",
        )
    return Check(name, "ok", f"{found}, {gpu.mode}")


def environment_checks(
    environ: Mapping[str, str], home: Path, *, joins: bool, mode_of: Callable[[Path], int | None]
) -> list[Check]:
    """Return a verdict on the variables that Ray and OpenMP read.

    Args:
        environ: the environment.
        home: home directory of the user.
        joins: this machine shall become a node of another one's Ray.
        mode_of: the mode of a file; None where it is not there.
    """
    return [
        _wait_policy(environ.get("OMP_WAIT_POLICY", "")),
        _token(environ, home, joins=joins, mode_of=mode_of),
        *([_ray_settings(environ)] if joins or GCS_STORAGE in environ else []),
        *_gcs_storage(environ, mode_of),
    ]


def _wait_policy(policy: str) -> Check:
    if policy.upper() == "PASSIVE":
        return Check("OpenMP", "ok", "threads that wait sleep")
    return Check(
        "OpenMP",
        "warn",
        f"OMP_WAIT_POLICY is {policy or 'not set'}",
        "threads that wait spin on cores that others need: unset it, silvershard sets PASSIVE",
    )


def _token(
    environ: Mapping[str, str],
    home: Path,
    *,
    joins: bool,
    mode_of: Callable[[Path], int | None],
) -> Check:
    name, mode = "Ray token", environ.get("RAY_AUTH_MODE", "").lower()
    if not joins and not mode:
        return Check(name, "ok", "the embedded Ray makes its own")
    if mode != "token":
        return Check(
            name,
            "fail" if joins else "warn",
            f"RAY_AUTH_MODE is {mode or 'not set'}",
            "whoever reaches a port of Ray may run code: set RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN_PATH, the same on every machine",
        )
    if environ.get("RAY_AUTH_TOKEN"):
        return Check(name, "ok", "RAY_AUTH_TOKEN is set")
    path = Path(environ.get("RAY_AUTH_TOKEN_PATH") or home / _DEFAULT_TOKEN)
    bits = mode_of(path)
    if bits is None:
        return Check(
            name,
            "fail",
            f"RAY_AUTH_MODE is token, but {path} cannot be read",
            "copy the token of the head there with mode 0600, or name it in RAY_AUTH_TOKEN_PATH",
        )
    if bits & (stat.S_IRWXG | stat.S_IRWXO):
        return Check(name, "warn", f"{path} is open to other users", f"close it: chmod 600 {path}")
    return Check(name, "ok", f"in {path}")


def _ray_settings(environ: Mapping[str, str]) -> Check:
    name = "Ray settings"
    other = {one: value for one, value in RAY_SETTINGS.items() if environ.get(one, "") != value}
    if not other:
        return Check(name, "ok", "as for many hosts")
    exports = " ".join(f"{one}={value}" for one, value in other.items())
    return Check(
        name,
        "warn",
        ", ".join(f"{one} is {environ.get(one) or 'not set'}" for one in other),
        "a lost host is noticed after a minute, and a lost head ends what it started: "
        f"export {exports}",
    )


def _gcs_storage(environ: Mapping[str, str], mode_of: Callable[[Path], int | None]) -> list[Check]:
    storage, path = environ.get(GCS_STORAGE, ""), environ.get(GCS_PATH, "")
    if not storage and not path:
        return []
    name = "GCS storage"
    if storage != "rocksdb":
        return [
            Check(
                name,
                "warn",
                f"{GCS_STORAGE} is {storage or 'not set'}",
                f"a head that is started again forgets its cluster: export {GCS_STORAGE}=rocksdb",
            )
        ]
    if not path or mode_of(Path(path)) is None:
        return [
            Check(
                name,
                "fail",
                f"{GCS_PATH} is {f'{path}, which is not there' if path else 'not set'}",
                "name a directory on a disk that outlives this machine's process",
            )
        ]
    return [Check(name, "ok", f"RocksDB in {path}")]


def head_checks(head: Head, software: Software, version: str) -> list[Check]:
    """Return a verdict on the head that this machine shall join.

    Args:
        head: what it says.
        software: what is installed here.
        version: of silvershard here.
    """
    if head.problem:
        return [
            Check(
                "head",
                "fail",
                f"{head.address}: {head.problem}",
                "start it with `ray start --head`, and open its ports to this machine",
            )
        ]
    found = f"{head.address}, {head.round_trip_s * 1e3:.2f} ms away"
    slow = head.round_trip_s > _SLOW_ROUND_TRIP_S
    checks = [
        Check("head", "warn", found, "every query pays that twice: join in the same data centre")
        if slow
        else Check("head", "ok", found)
    ]
    if head.refused:
        return [
            *checks,
            Check(
                "head versions",
                "fail",
                f"the GCS does not say them: {head.refused}",
                "is it a Ray head, and is the token of this machine the same as there?",
            ),
        ]
    ray = software.installed.get("ray", "")
    here = {"Ray": ray, "Python": software.python, "silvershard": version}
    there = {
        "Ray": head.ray,
        "Python": head.python,
        "silvershard": head.silvershard or version,
    }
    differ = [
        f"{name} {there[name]} there, {here[name]} here"
        for name in here
        if there[name] != here[name]
    ]
    if differ:
        advice = "install the same versions on every machine, or use the same image"
        return [*checks, Check("head versions", "fail", "; ".join(differ), advice)]
    same = f"Ray {head.ray} and Python {head.python} on both"
    router = f", silvershard {version} too" if head.silvershard else ", no router answers there"
    return [*checks, Check("head versions", "ok", f"{same}{router}")]

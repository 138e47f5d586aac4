"""An environment of its own for a peer, and jobs that run in processes of their own.

A job is a JSON file, its answer a JSON line and an npz file, so that the two sides of a comparison
need nothing in common.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.mixture import progress

# The C library would give big blocks back to the system after every step, which costs the peer a
# third of its time; both sides run with it off.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "MALLOC_MMAP_THRESHOLD_": "2000000000",
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
}


def torch_requirement() -> str:
    """Return the torch that the peer gets: the release that we run."""
    return f"torch=={version('torch').split('+')[0]}"


def peer_python(folder: Path, requirements: Sequence[str]) -> Path:
    """Return the interpreter of an environment with these packages, made unless it is there.

    Raises:
        subprocess.CalledProcessError: if it cannot be made; nothing usable is left behind.
    """
    key = hashlib.sha256("\n".join(requirements).encode()).hexdigest()[:12]
    home = folder / f"rectools-{key}"
    python, stamp = home / "bin" / "python", home / "complete"
    if not stamp.exists():
        progress(f"installing the peer into {home}")
        shutil.rmtree(home, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
        subprocess.run([*pip, *requirements], check=True)
        stamp.write_text("\n".join(requirements) + "\n")
    return python


def run_job(
    python: Path, script: Path, job: Mapping[str, Any], folder: Path
) -> tuple[dict[str, Any], dict[str, NDArray[np.int64]]]:
    """Run one job in a process of its own and return its report and its rankings.

    Raises:
        RuntimeError: with the last lines of what it wrote, if it failed.
    """
    folder = Path(tempfile.mkdtemp(dir=folder))
    given, out = folder / "job.json", folder / "out.npz"
    given.write_text(json.dumps({**job, "out": str(out)}))
    done = subprocess.run(
        [str(python), "-P", str(script), str(given)],
        env={**os.environ, **_ENVIRONMENT},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{script.name} failed:\n{done.stderr[-2000:]}")
    with np.load(out) as arrays:
        rankings = {name: arrays[name] for name in arrays.files}
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report, rankings

import importlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("kernels", "model", "shard", "cluster", "deploy")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def tracked() -> list[str]:
    done = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip("not a git checkout")
    return [name for name in done.stdout.split("\0") if name]


@pytest.mark.parametrize("layer", LAYERS)
def test_every_folder_is_one_module_under_the_namespace(layer: str) -> None:
    module = importlib.import_module(f"silvershard.{layer}")
    assert Path(str(module.__file__)).parent.resolve() == ROOT / layer
    assert layer not in sys.modules, "the checkout's root is on sys.path"


def test_packages_list_every_folder_with_python_modules() -> None:
    setuptools = PROJECT["tool"]["setuptools"]
    assert setuptools["packages"] == [f"silvershard.{layer}" for layer in LAYERS]
    nested = [
        str(path.parent.relative_to(ROOT))
        for layer in LAYERS
        for path in (ROOT / layer).glob("*/**/*.py")
        if path.name != "setup.py"
    ]
    assert nested == []


def test_the_namespace_links_point_at_the_folders() -> None:
    links = {path.name: path.resolve() for path in (ROOT / ".namespace" / "silvershard").iterdir()}
    links = {name: target for name, target in links.items() if not name.startswith("__")}
    assert links == {layer: ROOT / layer for layer in LAYERS}


def test_the_version_is_written_once_and_in_the_changelog() -> None:
    version = PROJECT["project"]["version"]
    assert importlib.metadata.version("silvershard") == version
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


def test_what_breaks_between_versions_is_pinned() -> None:
    pinned = dict(
        re.fullmatch(r"([a-z-]+)(?:\[[a-z]+\])?==([\w.+]+)", line).groups()  # type: ignore[union-attr]
        for line in [
            *PROJECT["project"]["dependencies"],
            *PROJECT["project"]["optional-dependencies"]["cpu"],
        ]
        if "==" in line
    )
    assert pinned["torch"].startswith("2.13.")
    assert pinned["torchrec"].startswith("1.8.")
    assert pinned["ray"].startswith("2.60.")
    assert pinned["fbgemm-gpu"].startswith("1.8.")


def packaging(*command: str, directory: Path, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-P", *command],
        cwd=directory,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def build_wheel(source: Path, out: Path, **environment: str) -> Path:
    packaging(
        *("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"),
        *("--disable-pip-version-check", "--wheel-dir", str(out), str(source)),
        directory=out.parent,
        **environment,
    )
    (wheel,) = out.glob("*.whl")
    return wheel


def implementations(wheel: Path, folder: Path) -> list[str]:
    """What the CPU operators of a wheel can run, tried out."""
    zipfile.ZipFile(wheel).extractall(folder)
    code = (
        "import torch; from silvershard.kernels import native_library, quantize_rows\n"
        f"assert native_library.__file__.startswith({str(folder)!r})\n"
        "assert quantize_rows(torch.tensor([[1.0, -2.0]])).codes.tolist() == [[64, -127]]\n"
        "print(*native_library.available())"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert ("native operators were not built" in done.stderr) == (done.stdout == "reference\n")
    return done.stdout.split()


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, because setuptools builds in the tree and packages what earlier builds left."""
    source = tmp_path_factory.mktemp("packaging") / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "*.so")
    for layer in LAYERS:
        shutil.copytree(ROOT / layer, source / layer, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    return source


@pytest.fixture(scope="session")
def sdist(source: Path) -> Path:
    code = "from setuptools import build_meta; build_meta.build_sdist('../sdist')"
    packaging("-c", code, directory=source)
    (archive,) = (source.parent / "sdist").glob("*.tar.gz")
    return archive


@pytest.fixture(scope="session")
def wheel(sdist: Path) -> Path:
    """The wheel that the source distribution makes, native operators and all."""
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    return build_wheel(sdist, sdist.parent.parent / "wheel")


def test_without_a_compiler_the_wheel_holds_the_folders_and_runs_on_references(
    source: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "source"
    shutil.copytree(source, copy)
    wheel = build_wheel(copy, tmp_path / "out", CC="/bin/false", CXX="/bin/false")
    names = zipfile.ZipFile(wheel).namelist()
    for layer in LAYERS:
        assert f"silvershard/{layer}/__init__.py" in names
        assert f"silvershard/{layer}/py.typed" in names
    assert "silvershard/cluster/retrieval.proto" in names
    assert {f"silvershard/{name}" for name in launch_files()} <= set(names)
    tops = {name.split("/")[0] for name in names}
    assert tops == {"silvershard", f"silvershard-{PROJECT['project']['version']}.dist-info"}
    assert [name for name in names if "test" in name or name.endswith(".so")] == []
    modules = {
        f"silvershard/{layer}/{path.name}"
        for layer in LAYERS
        for path in (source / layer).glob("*.py")
    }
    assert {name for name in names if name.endswith(".py")} == modules
    assert implementations(wheel, tmp_path / "installed") == ["reference"]


def launch_files() -> set[str]:
    """What is copied to launch a cluster, by path in the repository."""
    folders = ("docker", "kuberay", "ray", "systemd")
    return {
        str(path.relative_to(ROOT))
        for folder in folders
        for path in (ROOT / "deploy" / folder).iterdir()
    } | {"deploy/packaging/fbgemm-gpu-shim/pyproject.toml"}


@pytest.mark.slow
def test_the_source_distribution_holds_the_native_sources_and_the_launch_files(
    sdist: Path,
) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert len(launch_files()) > 5
    assert launch_files() <= names
    expected = {
        f"kernels/native/{path.name}"
        for path in (ROOT / "kernels" / "native").iterdir()
        if path.suffix in (".h", ".cpp")
    }
    assert expected
    assert expected <= names
    assert "setup.py" in names


@pytest.mark.slow
def test_with_a_compiler_the_wheel_holds_the_library_for_any_python(
    wheel: Path, tmp_path: Path
) -> None:
    libraries = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    assert libraries == ["silvershard/kernels/libsilvershard_native.so"]
    python, abi, platform = wheel.stem.split("-")[-3:]
    assert (python, abi) == ("py3", "none")
    assert platform == sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert implementations(wheel, tmp_path / "installed")[:2] == ["reference", "scalar"]


def test_no_data_set_is_committed() -> None:
    assert [name for name in tracked() if name.endswith((".csv", ".zip", ".safetensors"))] == []

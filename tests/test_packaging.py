import importlib
import importlib.metadata
import re
import shutil
import subprocess
import sys
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


def test_the_wheel_holds_the_folders_and_no_tests(tmp_path: Path) -> None:
    # Built from a copy: setuptools builds in the tree and would package what earlier builds left.
    source, out = tmp_path / "source", tmp_path / "out"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    for layer in LAYERS:
        shutil.copytree(ROOT / layer, source / layer, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    done = subprocess.run(
        [
            *(sys.executable, "-P", "-m", "pip", "wheel", "--quiet", "--no-deps"),
            *("--no-build-isolation", "--disable-pip-version-check", "--wheel-dir"),
            *(str(out), str(source)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = out.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for layer in LAYERS:
        assert f"silvershard/{layer}/__init__.py" in names
        assert f"silvershard/{layer}/py.typed" in names
    assert "silvershard/cluster/retrieval.proto" in names
    tops = {name.split("/")[0] for name in names}
    assert tops == {"silvershard", f"silvershard-{PROJECT['project']['version']}.dist-info"}
    assert [name for name in names if "test" in name] == []
    modules = {
        f"silvershard/{layer}/{path.name}"
        for layer in LAYERS
        for path in (ROOT / layer).glob("*.py")
    }
    assert {name for name in names if name.endswith(".py")} == modules


def test_no_data_set_is_committed() -> None:
    assert [name for name in tracked() if name.endswith((".csv", ".zip", ".safetensors"))] == []

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("kernels", "model", "shard", "cluster", "deploy")
MAX_LINES = 500

# What each folder must never import, besides any higher folder.
FORBIDDEN = {
    "kernels": {"torchrec", "fbgemm_gpu", "ray", "grpc"},
    "model": {"ray", "grpc", "torch.distributed", "socket", "requests", "urllib"},
    "shard": {"ray", "grpc"},
    "cluster": {"silvershard.kernels", "triton", "torchrec", "fbgemm_gpu"},
    "deploy": {"silvershard.kernels", "triton", "torchrec"},
}
# Training divides tables with TorchRec, whose sharding is written against torch.distributed.
ALLOWED = {"model/distributed.py": {"torch.distributed"}}
# Modules that hold tables or data instead of one idea, and are checked against nothing.
GENERATED = ("_pb2.py", "_pb2_grpc.py")
VAGUE_NAMES = {"utils", "util", "common", "core", "helpers", "misc"}


def modules(folder: str) -> list[Path]:
    return sorted(
        path for path in (ROOT / folder).glob("*.py") if not path.name.endswith(GENERATED)
    )


def all_modules() -> list[tuple[str, Path]]:
    return [(folder, path) for folder in LAYERS for path in modules(folder)]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            assert node.module is not None
            yield node.lineno, node.module
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def violations(folder: str, path: Path) -> list[str]:
    higher = {f"silvershard.{name}" for name in LAYERS[LAYERS.index(folder) + 1 :]}
    refused = higher | FORBIDDEN[folder] - ALLOWED.get(f"{folder}/{path.name}", set())
    found = []
    for line, name in imports(path):
        for prefix in refused:
            if name == prefix or name.startswith(prefix + "."):
                found.append(f"{folder}/{path.name}:{line} imports {name}")
    return found


def test_the_folders_are_read_at_all() -> None:
    assert len(all_modules()) > 30


def test_no_folder_imports_a_higher_one_or_what_it_must_not_see() -> None:
    found = [line for folder, path in all_modules() for line in violations(folder, path)]
    assert found == []


def test_a_forbidden_import_is_noticed(tmp_path: Path) -> None:
    path = ROOT / "kernels" / "__init__.py"
    assert violations("kernels", path) == []
    source = tmp_path / "bad.py"
    source.write_text("from silvershard.cluster import client\nimport ray.util\n")
    assert set(violations("kernels", source)) == {
        "kernels/bad.py:1 imports silvershard.cluster",
        "kernels/bad.py:1 imports silvershard.cluster.client",
        "kernels/bad.py:2 imports ray.util",
    }
    assert violations("deploy", source) == []


def test_torchrec_is_imported_by_the_modules_of_lookup_and_of_training_only() -> None:
    users = {
        str(path.relative_to(ROOT))
        for _, path in all_modules()
        for _, name in imports(path)
        if name.split(".")[0] == "torchrec"
    }
    assert users == {"model/embeddings.py", "model/distributed.py"}


def test_triton_is_imported_by_triton_modules_only() -> None:
    users = {
        path.name
        for _, path in all_modules()
        for _, name in imports(path)
        if name.split(".")[0] == "triton"
    }
    assert {name for name in users if not name.endswith("_triton.py")} == set()


def test_no_import_is_hidden_behind_type_checking() -> None:
    found = [str(path) for _, path in all_modules() if "TYPE_CHECKING" in path.read_text()]
    assert found == []


def test_no_module_has_a_vague_name() -> None:
    assert {path.stem for _, path in all_modules()} & VAGUE_NAMES == set()


def test_no_module_is_longer_than_the_cap() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for _, path in all_modules()
        if (lines := len(path.read_text().splitlines())) > MAX_LINES
    }
    assert long == {}


def defines_behaviour(path: Path) -> bool:
    tree = ast.parse(path.read_text())
    return any(isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) for node in ast.walk(tree))


def test_every_module_with_behaviour_has_its_test_file() -> None:
    missing = [
        f"tests/{folder}/test_{path.stem}.py"
        for folder, path in all_modules()
        if defines_behaviour(path)
        and not (ROOT / "tests" / folder / f"test_{path.stem}.py").is_file()
    ]
    assert missing == []


def test_every_test_file_has_its_module() -> None:
    stray = [
        str(path.relative_to(ROOT))
        for folder in LAYERS
        for path in (ROOT / "tests" / folder).glob("test_*.py")
        if not (ROOT / folder / f"{path.stem.removeprefix('test_')}.py").is_file()
    ]
    assert stray == []


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("silvershard.kernels", ("torchrec", "fbgemm_gpu", "ray", "grpc", "triton")),
        ("silvershard.model.retriever", ("torchrec", "fbgemm_gpu", "ray", "grpc")),
        ("silvershard.shard.executor", ("ray", "grpc")),
        ("silvershard.cluster", ("torch", "ray")),
        ("silvershard.deploy.verbs", ("torch", "ray")),
        ("silvershard.deploy.operate", ("torch", "ray")),
        ("silvershard.deploy.ask", ("torch", "ray")),
    ],
)
def test_importing_a_layer_loads_nothing_heavier(module: str, unwanted: tuple[str, ...]) -> None:
    code = f"import sys, {module}\nprint([name for name in {unwanted!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"

import json
from pathlib import Path

import pytest

from benchmarks import model
from benchmarks.model import PARTS, Part, run_parts

SCRIPT = """
import json, sys
from pathlib import Path
log = Path(__file__).parent / "log"
with log.open("a") as file:
    file.write("begin {name}\\n")
print("table of {name}")
with log.open("a") as file:
    file.write("end {name}\\n")
print(json.dumps({{"told": sys.argv[1:]}}))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(model, "_HERE", tmp_path)
    for name in ("a", "b", "c", "d"):
        (tmp_path / f"{name}.py").write_text(SCRIPT.format(name=name))
    return tmp_path


def test_every_part_is_a_script_beside_this_one() -> None:
    here = Path(model.__file__).parent
    for part in PARTS:
        text = (here / f"{part.name}.py").read_text()
        assert all(f'"{one}"' in text for one in part.quick if one.startswith("--")), part.name


def test_parts_tell_what_they_found(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = [Part("a", timed=False), Part("b", ("--rows", "7")), Part("c")]
    found = run_parts(parts, quick=True)
    assert {name: one["result"] for name, one in found.items()} == {
        "a": {"told": ["--quick"]},
        "b": {"told": ["--rows", "7"]},
        "c": {"told": ["--quick"]},
    }
    assert all(one["failure"] == "" for one in found.values())
    printed = capsys.readouterr().out
    assert all(f"table of {name}" in printed for name in "abc")
    assert "told" not in printed
    assert run_parts(parts[1:2], quick=False)["b"]["result"] == {"told": []}


def test_parts_that_measure_time_run_alone(folder: Path) -> None:
    run_parts([Part("a"), Part("b", timed=False), Part("c", timed=False), Part("d")], quick=True)
    events = (folder / "log").read_text().split("\n")[:-1]
    assert sorted(events[:4]) == ["begin b", "begin c", "end b", "end c"]
    assert events[4:] == ["begin a", "end a", "begin d", "end d"]


def test_a_part_without_numbers_is_a_failure(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "a.py").write_text("import sys\nprint('the gate is red')\nsys.exit(3)\n")
    (folder / "b.py").write_text("import signal\nsignal.pause()\n")
    monkeypatch.setattr(model, "PARTS", (Part("a"), Part("b"), Part("c")))
    monkeypatch.setattr(model, "QUICK_LIMIT_S", 0.0)
    monkeypatch.setattr("sys.argv", ["model.py", "--quick", "--only", "b"])
    assert model.main() == 1
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["failures"] == ["b"]
    assert last["parts"]["b"]["failure"] == "out of time"
    found = run_parts([Part("a"), Part("c")], quick=True)
    assert found["a"]["failure"] == "exit status 3"
    assert found["a"]["result"] is None
    assert found["c"]["result"] == {"told": ["--quick"]}
    assert "the gate is red" in capsys.readouterr().out

from pathlib import Path

import pytest

from silvershard.cluster.dialer import Dialer
from silvershard.deploy import golden, verbs
from silvershard.deploy.errors import CommandError
from silvershard.deploy.state import StateDir


@pytest.fixture
def state(tmp_path: Path) -> StateDir:
    directory = StateDir(tmp_path)
    directory.create()
    return directory


def test_without_a_generation_nothing_is_asked(state: StateDir) -> None:
    with pytest.raises(CommandError, match="must have a generation: name the state directory"):
        golden.check(state, "127.0.0.1:1", timeout_s=1)


@pytest.mark.parametrize(("texts", "code"), [([], 0), (["golden request 3: so"], 1)])
def test_the_verb_fails_where_an_answer_differs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    texts: list[str],
    code: int,
) -> None:
    def check(
        state: StateDir, address: str, *, timeout_s: float, dialer: Dialer
    ) -> dict[str, object]:
        assert (state.root, address, timeout_s) == (tmp_path, "here:1", 5.0)
        wrong = [{"request": {}, "text": text} for text in texts]
        return {"generation": 2, "requests": 24, "differences": wrong}

    monkeypatch.setattr(golden, "check", check)
    arguments = ["golden", "--state", str(tmp_path), "--address", "here:1", "--timeout", "5"]
    assert verbs.run(arguments) == code
    assert capsys.readouterr().out.count("golden request 3: so") == len(texts)


def test_every_difference_is_shown() -> None:
    wrong = [{"request": {}, "text": f"golden request {at}: so"} for at in (3, 8)]
    document = {"generation": 2, "requests": 24, "differences": wrong}
    assert golden.render(document).splitlines() == [
        "2 of 24 golden requests of generation 2 are answered otherwise than by the model:",
        "  golden request 3: so",
        "  golden request 8: so",
    ]
    assert golden.render({**document, "differences": []}) == (
        "24 golden requests of generation 2 are answered bit for bit as by the model that was "
        "published"
    )

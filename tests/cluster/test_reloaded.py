from pathlib import Path

import pytest

from silvershard.cluster.reloaded import Reloaded
from silvershard.shard.errors import ConfigError


class Numbers:
    """A file of a number, and a clock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.now_s = 0.0
        self.reads = 0

    def write(self, text: str) -> None:
        partial = self.path.with_suffix(".tmp")
        partial.write_text(text)
        partial.replace(self.path)

    def read(self) -> int:
        self.reads += 1
        try:
            return int(self.path.read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(str(error)) from None

    def reloaded(self) -> Reloaded[int]:
        return Reloaded([self.path], self.read, every_s=1.0, clock=lambda: self.now_s)


@pytest.fixture
def numbers(tmp_path: Path) -> Numbers:
    made = Numbers(tmp_path / "number")
    made.write("1")
    return made


def test_what_changed_is_read_anew_at_the_next_look(numbers: Numbers) -> None:
    reloaded = numbers.reloaded()
    numbers.write("2")
    numbers.now_s = 0.9
    assert reloaded.value == 1
    numbers.now_s = 1.0
    assert reloaded.value == 2


def test_what_did_not_change_is_read_once(numbers: Numbers) -> None:
    reloaded = numbers.reloaded()
    for numbers.now_s in (1.0, 2.0, 3.0):
        assert reloaded.value == 1
    assert numbers.reads == 1


def test_the_last_good_value_stays_until_there_is_a_better_one(
    numbers: Numbers, caplog: pytest.LogCaptureFixture
) -> None:
    reloaded = numbers.reloaded()
    numbers.write("damaged")
    for numbers.now_s in (1.0, 2.0):
        assert reloaded.value == 1
    assert numbers.reads == 2
    assert "what was read before stays in force" in caplog.text
    numbers.path.unlink()
    numbers.now_s = 3.0
    assert reloaded.value == 1
    numbers.write("3")
    numbers.now_s = 4.0
    assert reloaded.value == 3


def test_it_must_be_good_at_first(numbers: Numbers) -> None:
    numbers.write("damaged")
    with pytest.raises(ConfigError, match="damaged"):
        numbers.reloaded()

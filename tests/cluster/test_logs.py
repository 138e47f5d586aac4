import json
import logging
import sys

import pytest

from silvershard.cluster.logs import JsonLines, log_to_stderr


def record(message: str, *args: object, **more: object) -> logging.LogRecord:
    return logging.LogRecord("a.b", logging.ERROR, __file__, 1, message, args, **more)


def test_a_record_is_one_line_of_json() -> None:
    text = JsonLines().format(record("two\nlines of %s", "text", exc_info=None))
    assert "\n" not in text
    line = json.loads(text)
    assert line["message"] == "two\nlines of text"
    assert line["level"] == "error"
    assert line["logger"] == "a.b"
    assert "trace" not in line


def test_a_stack_trace_is_a_field_of_the_line() -> None:
    try:
        raise ValueError("odd")
    except ValueError:
        text = JsonLines().format(record("failed", exc_info=sys.exc_info()))
    assert "\n" not in text
    assert "ValueError: odd" in json.loads(text)["trace"]


def test_everything_goes_to_stderr(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    monkeypatch.setattr(root, "handlers", [])
    try:
        log_to_stderr()
        logging.getLogger("silvershard.somewhere").info("hello")
    finally:
        root.handlers = before
        root.setLevel(level)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert json.loads(printed.err)["message"] == "hello"

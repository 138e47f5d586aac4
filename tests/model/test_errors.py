import pickle

import pytest

from silvershard.model.errors import FieldError, TextError
from silvershard.model.filter_parser import FilterError
from silvershard.model.request import RequestError
from silvershard.model.schema import SchemaError
from silvershard.model.value import ValueFormulaError


@pytest.mark.parametrize("kind", [FieldError, SchemaError, RequestError])
def test_an_error_of_a_field_crosses_processes_as_its_own_class(kind: type[FieldError]) -> None:
    error = pickle.loads(pickle.dumps(kind("year", "must be int")))
    assert type(error) is kind
    assert (error.field, error.message, str(error)) == ("year", "must be int", "year: must be int")
    assert isinstance(error, ValueError)


@pytest.mark.parametrize("kind", [TextError, FilterError, ValueFormulaError])
def test_an_error_of_a_text_crosses_processes_as_its_own_class(kind: type[TextError]) -> None:
    error = pickle.loads(pickle.dumps(kind("bad", 3, "genre:x")))
    assert type(error) is kind
    assert (error.message, error.position, error.text) == ("bad", 3, "genre:x")
    assert isinstance(error, ValueError)


def test_the_position_is_marked_below_its_surroundings() -> None:
    assert str(TextError("bad", 3, "a\nb c")) == "position 3: bad\n  a b c\n     ^"
    _, line, caret = str(TextError("bad", 5000, "x" * 5000 + "y" * 5000)).splitlines()
    assert len(line) == 62
    assert line[caret.index("^") :] == "y" * 30

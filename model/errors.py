"""Errors of what a caller states: which field is wrong, or where a text goes wrong.

ValueError
├── FieldError         names a field: ``SchemaError``, ``RequestError``
└── TextError          names a position in a text: ``FilterError``, ``ValueFormulaError``
"""

from typing import Self

_EXCERPT = 60


class FieldError(ValueError):
    """A field that is not as required.

    Attributes:
        field: the field at fault.
        message: what was required and what was got.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message

    def __reduce__(self) -> tuple[type[Self], tuple[str, str]]:
        """Keep both attributes when the error crosses a process."""
        return type(self), (self.field, self.message)


class TextError(ValueError):
    """A text that cannot be parsed, or that names what does not exist.

    Attributes:
        message: what was required and what was got.
        position: 0-based character of the text at which it goes wrong; the text's length at its
            end.
        text: the whole text.
    """

    def __init__(self, message: str, position: int = 0, text: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.position = position
        self.text = text

    def __str__(self) -> str:
        """Return the message, the surroundings of the position, and a mark below it."""
        start = max(0, self.position - _EXCERPT // 2)
        line = "".join(
            letter if letter.isprintable() else " "
            for letter in self.text[start : start + _EXCERPT]
        )
        caret = " " * (self.position - start) + "^"
        return f"position {self.position}: {self.message}\n  {line}\n  {caret}"

    def __reduce__(self) -> tuple[type[Self], tuple[str, int, str]]:
        """Keep all attributes when the error crosses a process."""
        return type(self), (self.message, self.position, self.text)

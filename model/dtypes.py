"""Types of the values that items, filters and requests hold."""

from typing import Literal

ValueType = Literal["int", "float", "string"]

INT64_MIN = -(2**63)
INT64_MAX = 2**63 - 1

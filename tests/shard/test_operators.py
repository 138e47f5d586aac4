import pytest

from silvershard.kernels import native_library
from silvershard.shard.operators import AVX2, AVX512, REFERENCE, SCALAR, cpu_operators


def test_the_names_are_those_of_the_library() -> None:
    assert (REFERENCE, SCALAR, AVX2, AVX512) == native_library.IMPLEMENTATIONS


@pytest.mark.parametrize("name", native_library.available())
def test_what_is_chosen_is_what_computes(name: str) -> None:
    before = native_library.in_use()
    with native_library.use(name):
        assert cpu_operators().in_use == name
    found = cpu_operators()
    assert found.in_use == before
    assert found.is_native == (len(native_library.available()) > 1)

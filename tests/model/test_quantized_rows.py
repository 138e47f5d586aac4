import struct

import pytest
import torch

from silvershard.model.errors import FieldError
from silvershard.model.placement import Precision
from silvershard.model.quantized_rows import (
    StoredTable,
    check_rows,
    quantize_rows,
    records_problem,
    restore_rows,
    sizes_of,
)


def test_a_record_is_scale_bias_and_codes() -> None:
    values = torch.tensor([[-1.0, 0.0, 126.5, 1.0]])
    (record,) = quantize_rows(values, "int8")
    assert struct.unpack("<2e4B", bytes(record.tolist())) == (0.5, -1.0, 0, 2, 255, 4)
    assert restore_rows(record[None], "int8").tolist() == values.tolist()


def test_a_byte_of_4_bit_codes_holds_the_earlier_column_in_its_low_half() -> None:
    values = torch.tensor([[-1.0, 0.0, 6.5, 1.0, 2.0, 2.5, 3.0, 3.5]])
    (record,) = quantize_rows(values, "int4")
    scale, bias, *codes = struct.unpack("<2e4B", bytes(record.tolist()))
    assert (scale, bias, codes) == (0.5, -1.0, [0x20, 0x4F, 0x76, 0x98])
    assert restore_rows(record[None], "int4").tolist() == values.tolist()


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_constant_and_tiny_rows_come_back(precision: Precision) -> None:
    values = torch.stack([torch.zeros(8), torch.full((8,), -2.5), torch.linspace(0, 1e-7, 8)])
    found = restore_rows(quantize_rows(values, precision), precision)
    assert found.isfinite().all()
    assert torch.equal(found[:2], values[:2])
    assert float((found[2] - values[2]).abs().max()) < 1.01e-7


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_row_has_one_record_whatever_rows_surround_it(precision: Precision) -> None:
    values = torch.randn(33, 24)
    together = quantize_rows(values, precision)
    for row in range(33):
        assert torch.equal(quantize_rows(values[row : row + 1], precision)[0], together[row])
    assert quantize_rows(values[:0], precision).shape == (0, together.shape[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 65536.0])
def test_a_value_that_has_no_code_is_refused(value: float) -> None:
    values = torch.zeros(5, 8)
    values[3, 1] = value
    with pytest.raises(FieldError, match=r"films: must be finite and within ±65504, .* in row 3"):
        quantize_rows(values, "int8", field="films")


def test_values_of_another_type_are_refused() -> None:
    with pytest.raises(FieldError, match=r"values: must be \(n, D\) float32, got \(2, 8\)"):
        quantize_rows(torch.zeros(2, 8, dtype=torch.float64), "int8")
    with pytest.raises(FieldError, match=r"values: must be \(n, D\) float32, got \(8,\)"):
        quantize_rows(torch.zeros(8), "int8")


def stored(cut: str, precision: Precision) -> StoredTable:
    """A table of 11 rows and 16 columns: whole, in a wider layout, or in parts."""
    table = StoredTable(11, 16, precision)
    width = table.shape[1]
    half = 4 + (width - 4) // 2
    sizes = {"first_row": 0, "first_column": 0, "num_columns": 16}
    if cut == "whole":
        table.add(torch.zeros(11, width, dtype=torch.uint8), **sizes)
    elif cut == "aligned":
        table.add(torch.full((11, 32), 7, dtype=torch.uint8), **sizes)
    elif cut == "row":
        for first, count in ((0, 5), (5, 1), (6, 5)):
            memory = torch.zeros(count, 32, dtype=torch.uint8)
            table.add(memory, **{**sizes, "first_row": first})
    else:
        for first in (0, 8):
            memory = torch.zeros(11, half, dtype=torch.uint8)
            table.add(memory, first_row=0, first_column=first, num_columns=8)
    return table


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("cut", ["whole", "aligned", "row", "column"])
def test_a_stored_table_gives_back_its_records_however_it_is_cut(
    cut: str, precision: Precision
) -> None:
    table = stored(cut, precision)
    records = quantize_rows(torch.randn(11, 16), precision)
    table.fill(records)
    assert torch.equal(table.records(), records)
    rows = torch.tensor([10, 0, 5, 5, 6, 4])
    assert torch.equal(table.take(rows), records[rows])
    assert table.take(rows[:0]).shape == (0, records.shape[1])
    changed, values = torch.tensor([9, 0, 5]), torch.randn(3, 16)
    table.write(changed, values, field="films")
    records[changed] = quantize_rows(values, precision)
    assert torch.equal(table.records(), records)


def test_records_may_begin_at_any_byte_of_a_larger_tensor() -> None:
    table = stored("row", "int8")
    records = quantize_rows(torch.randn(11, 16), "int8")
    larger = torch.cat([torch.zeros(3, dtype=torch.uint8), records.flatten()])
    table.fill(larger[3:].view(records.shape))
    assert torch.equal(table.records(), records)


def test_a_write_touches_nothing_beside_its_rows() -> None:
    table = stored("aligned", "int8")
    table.write(torch.tensor([4]), torch.randn(1, 16), field="films")
    memory = table.pieces[0].memory.view(torch.uint8)
    assert (memory[:, 20:] == 7).all()
    assert (memory[torch.arange(11) != 4] == 7).all()


@pytest.mark.parametrize(
    ("rows", "values", "message"),
    [
        ([11], torch.zeros(1, 16), "rows must be from 0 to 10, got 11"),
        ([-1, 3], torch.zeros(2, 16), "rows must be from 0 to 10, got -1"),
        ([3, 3], torch.zeros(2, 16), "rows must be distinct"),
        ([3], torch.zeros(1, 8), r"values must be \(1, 16\), got \(1, 8\)"),
        ([3], torch.zeros(2, 16), r"values must be \(1, 16\), got \(2, 16\)"),
        ([3, 4], torch.full((2, 16), float("nan")), "must be finite .* in row 0"),
        ([3], torch.zeros(1, 16, dtype=torch.float16), "float32, got .* torch.float16"),
        ([[3]], torch.zeros(1, 16), r"rows must be \(n,\) int64, got \(1, 1\)"),
    ],
)
def test_a_write_that_does_not_fit_names_the_field_and_writes_nothing(
    rows: list[int], values: torch.Tensor, message: str
) -> None:
    table = stored("row", "int8")
    with pytest.raises(FieldError, match=f"films: .*{message}"):
        table.write(torch.tensor(rows), values, field="films")
    assert not table.records().any()


def test_rows_of_another_type_are_refused() -> None:
    with pytest.raises(FieldError, match=r"films: rows must be \(n,\) int64, got .* torch.int32"):
        stored("row", "int8").write(
            torch.zeros(1, dtype=torch.int32), torch.zeros(1, 16), field="films"
        )


def test_rows_within_a_table_are_let_through() -> None:
    check_rows(torch.tensor([0, 10, 10]), 11, field="films")
    check_rows(torch.zeros(0, dtype=torch.int64), 11, field="films")


def test_records_are_recognised() -> None:
    records = quantize_rows(torch.randn(3, 8), "int8")
    assert records_problem(records, (3, 12)) is None
    assert "must be (4, 12) uint8" in str(records_problem(records, (4, 12)))
    assert "int64" in str(records_problem(records.long(), (3, 12)))
    records[1, :2] = torch.tensor([0x00, 0x7C])
    assert "finite" in str(records_problem(records, (3, 12)))


def test_sizes_are_read_from_weights() -> None:
    weights = {"films": torch.zeros(9, 4), "genres": torch.zeros(3, 4)}
    assert sizes_of(weights) == ({"films": 9, "genres": 3}, 4)

import pytest
import torch

from silvershard.model.bags import Bags
from silvershard.model.embeddings import QuantizedTables
from silvershard.model.placement import Precision
from silvershard.model.quantized_rows import quantize_rows
from silvershard.model.record_pool import RecordPool


def test_a_pool_sums_the_records_it_is_given() -> None:
    values = torch.arange(24.0).view(3, 8)
    records = quantize_rows(values, "int8")
    bags = {
        "first": Bags(torch.tensor([0, 1]), torch.tensor([1.0, 2.0]), torch.tensor([2])),
        "second": Bags(torch.tensor([2]), torch.tensor([1.0]), torch.tensor([1])),
    }
    found = RecordPool(2, 8, "int8")(bags, {"first": records[:2], "second": records[2:]})
    assert list(found) == ["first", "second"]
    assert torch.allclose(found["first"][0], values[0] + 2 * values[1], atol=0.1)
    assert torch.allclose(found["second"][0], values[2], atol=0.1)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_pool_has_the_bits_of_tables_with_the_same_rows(precision: Precision) -> None:
    torch.manual_seed(0)
    weights = {"a": torch.randn(500, 16), "b": torch.randn(50, 16)}
    tables = QuantizedTables({"a": 500, "b": 50}, 16, precision)
    tables.quantize(weights)
    pool = RecordPool(2, 16, precision)
    for lengths in ([7, 0, 33], [0], [1] * 40, [0, 0]):
        count = sum(lengths)
        bags = {
            name: Bags(
                torch.randint(0, len(weight), (count,)), torch.randn(count), torch.tensor(lengths)
            )
            for name, weight in weights.items()
        }
        records = {name: tables.records(name)[one.rows] for name, one in bags.items()}
        found, wanted = pool(bags, records), tables(bags)
        assert all(torch.equal(found[name], wanted[name]) for name in weights)

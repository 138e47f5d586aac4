import numpy as np
import pytest
import torch

from silvershard.model.request import RequestError
from silvershard.shard.table_rows import (
    MAX_VALUE,
    check_records,
    dequantize_rows,
    quantize_rows,
    record_bytes,
    split,
    whole,
)


def make_values(num_rows: int, dim: int, scale: float = 1.0, seed: int = 0) -> np.ndarray:
    """Random rows behind rows of zeros, of one value, of a tiny spread, and of the largest."""
    generator = np.random.default_rng(seed)
    values = (generator.standard_normal((num_rows, dim)) * scale).astype(np.float32)
    values[0] = 0
    values[1] = np.float32(0.123) * scale
    values[2] = np.linspace(1, np.float32(1) + 2**-23, dim, dtype=np.float32)
    values[3] = np.linspace(-MAX_VALUE, MAX_VALUE, dim, dtype=np.float32)
    return values


@pytest.mark.parametrize("scale", [1e-5, 1e-2, 1.0, 1e3])
@pytest.mark.parametrize("dim", [2, 8, 64, 100])
def test_records_are_those_of_fbgemm_byte_for_byte(dim: int, scale: float) -> None:
    import fbgemm_gpu  # noqa: F401

    values = make_values(500, dim, scale)
    theirs = torch.ops.fbgemm.FloatOrHalfToFusedNBitRowwiseQuantizedSBHalf(
        torch.from_numpy(values), 8
    ).numpy()
    ours = quantize_rows(values, dim)
    assert ours.shape == (500, record_bytes(dim))
    np.testing.assert_array_equal(ours, np.roll(theirs, 4, axis=1))


def test_restored_values_are_those_of_an_fbgemm_table_bit_for_bit() -> None:
    from fbgemm_gpu.split_embedding_configs import SparseType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
    from fbgemm_gpu.split_table_batched_embeddings_ops_inference import (
        IntNBitTableBatchedEmbeddingBagsCodegen,
    )

    records = quantize_rows(make_values(200, 64), 64)
    table = IntNBitTableBatchedEmbeddingBagsCodegen(
        [("table", 200, 64, SparseType.INT8, EmbeddingLocation.HOST)],
        pooling_mode=PoolingMode.NONE,
        device="cpu",
        output_dtype=SparseType.FP32,
    )
    table.initialize_weights()
    weights = table.split_embedding_weights(split_scale_shifts=False)[0][0]
    weights.copy_(torch.from_numpy(records))
    theirs = table(torch.arange(200).int(), torch.tensor([0, 200]).int())
    np.testing.assert_array_equal(dequantize_rows(records), theirs.numpy())


def test_restoring_rounds_once_so_fused_arithmetic_gives_the_same() -> None:
    records = quantize_rows(make_values(500, 33, 0.7), 33)
    header = np.ascontiguousarray(records[:, :4]).view(np.float16).astype(np.float64)
    fused = (records[:, 4:] * header[:, :1] + header[:, 1:]).astype(np.float32)
    np.testing.assert_array_equal(dequantize_rows(records), fused)


def test_restored_values_are_within_a_step_of_the_scale() -> None:
    values = make_values(500, 64)
    records = quantize_rows(values, 64)
    scale = np.ascontiguousarray(records[:, :2]).view(np.float16).astype(np.float32)
    # Half a step of rounding, and the largest value beyond a scale that was rounded down.
    bound = scale * 0.5 + (values.max(1) - values.min(1))[:, None] * 2**-11 + 2**-9
    bound[3] = scale[3] * 0.5 + 2 * MAX_VALUE * 2**-11
    assert (np.abs(dequantize_rows(records) - values) <= bound).all()


def test_half_precision_values_are_taken_and_no_rows_give_no_rows() -> None:
    values = make_values(9, 6).astype(np.float16)
    expected = quantize_rows(values.astype(np.float32), 6)
    np.testing.assert_array_equal(quantize_rows(values, 6), expected)
    assert quantize_rows(values[:0], 6).shape == (0, 10)
    assert dequantize_rows(expected[:0]).shape == (0, 6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 65505.0, -1e9])
def test_a_value_that_has_no_record_is_refused_with_its_row(bad: float) -> None:
    values = np.ones((7, 4), dtype=np.float32)
    values[5, 2] = bad
    with pytest.raises(RequestError, match=r"values: must be finite .* in row 5$"):
        quantize_rows(values, 4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.ones((2, 4)), "must be float32 or float16, got float64"),
        (np.ones((2, 3), dtype=np.float32), r"must be of shape \(n, 4\), got \(2, 3\)"),
        (np.ones(4, dtype=np.float32), r"must be of shape \(n, 4\), got \(4,\)"),
    ],
)
def test_values_of_another_form_are_refused(values: np.ndarray, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        quantize_rows(values, 4)


@pytest.mark.parametrize("place", [0, 2])
def test_a_record_without_a_finite_scale_and_bias_is_refused(place: int) -> None:
    records = quantize_rows(make_values(6, 4), 4)
    check_records(records)
    records[4, place : place + 2] = np.array([np.inf], dtype=np.float16).view(np.uint8)
    with pytest.raises(RequestError, match=r"records: .* row 4 has others"):
        check_records(records)


def test_whole_records_share_memory_and_split_again() -> None:
    records = quantize_rows(make_values(6, 4), 4)
    elements = whole(records)
    assert np.shares_memory(records, elements)
    np.testing.assert_array_equal(split(elements[[3, 1]], 8), records[[3, 1]])
    assert split(elements[:0], 8).shape == (0, 8)

import numpy as np
import pytest
import torch
from torch import Tensor

from silvershard.kernels import quantize_rows

pytestmark = pytest.mark.usefixtures("implementation")


def test_hand_computed_row() -> None:
    codes, scales = quantize_rows(torch.tensor([[127.0, -63.5, 0.5, 1.5, 2.5, -127.0]]))
    assert scales.tolist() == [1.0]
    # Halves go to the even neighbour.
    assert codes.tolist() == [[127, -64, 0, 2, 2, -127]]
    assert codes.dtype == torch.int8


@pytest.mark.parametrize(("rows", "dim"), [(1, 1), (7, 16), (33, 63), (3, 1024), (0, 5)])
def test_codes_and_scales_agree_with_numpy(rows: int, dim: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn((rows, dim), generator=generator) * 10.0 ** torch.arange(rows)[:, None].float()
    codes, scales = quantize_rows(x)
    assert (codes.shape, scales.shape) == ((rows, dim), (rows,))
    for row in range(rows):
        scale = np.abs(x[row].numpy()).max() / np.float32(127)
        assert float(scales[row]) == float(scale)
        assert codes[row].tolist() == np.rint(x[row].numpy() / scale).astype(int).tolist()
    assert int(codes.abs().amax() if rows else 127) == 127


def test_a_row_of_zeros_has_scale_zero() -> None:
    codes, scales = quantize_rows(torch.tensor([[0.0, -0.0], [1.0, 0.0]]))
    assert codes.tolist() == [[0, 0], [127, 0]]
    assert scales[0] == 0.0


def test_tiny_and_huge_rows_stay_in_range() -> None:
    for magnitude in (1e-45, 6e-44, 1e-43, 3e-43, 1e-40, 1e-38, 3.4e38):
        codes, scales = quantize_rows(torch.tensor([[magnitude, -magnitude, 0.0]]))
        code = int(codes[0, 0])
        assert codes[0].tolist() == [code, -code, 0]
        assert 0 <= code <= 127
        assert (float(scales[0]) == 0.0) == (code == 0)
        if magnitude > 1e-38:
            assert code == 127


def test_rows_do_not_influence_each_other() -> None:
    x = torch.randn((40, 24), generator=torch.Generator().manual_seed(0))
    codes, scales = quantize_rows(x)
    for row in range(40):
        alone = quantize_rows(x[row : row + 1])
        assert torch.equal(alone.codes[0], codes[row])
        assert torch.equal(alone.scales[0], scales[row])
    assert torch.equal(quantize_rows(x.T.contiguous().T).codes, codes)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(2, 3).half(), "x must be torch.float32"),
        (torch.ones(3), r"x must have shape \(n, D\)"),
        (torch.ones(2, 0), "x must have D >= 1"),
        (torch.tensor([[1.0, torch.nan]]), "x must be finite"),
        (torch.tensor([[1.0, -torch.inf]]), "x must be finite"),
    ],
)
def test_bad_input_is_refused(x: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_rows(x)

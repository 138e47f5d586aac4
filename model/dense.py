"""Linear layers whose output rows have the same bits alone and in any batch.

Shapes: n rows, I input features, O output features.
"""

import math

import torch
from torch import Tensor, nn

_PAD = 16
# Padded inputs are built in pieces of this many rows, to bound memory.
_CHUNK_ROWS = 16384


def padded(size: int) -> int:
    """The size rounded up to a multiple of 16, at least 16."""
    return max(-(-size // _PAD) * _PAD, _PAD)


def padded_product(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x @ weight`` so that each row has the same bits whatever surrounds it.

    Args:
        x: ``(n, I)`` float32; n may be 0.
        weight: ``(I, O)`` float32, or both dimensions padded with zeros.

    Returns:
        ``(n, O)`` float32, contiguous; O as ``weight`` has it.
    """
    rows, inputs = x.shape
    outputs = weight.shape[1]
    filled = x.new_zeros(padded(rows), padded(inputs))
    filled[:rows, :inputs] = x
    extra = (0, padded(outputs) - outputs, 0, padded(inputs) - weight.shape[0])
    wide = torch.nn.functional.pad(weight, extra) if any(extra) else weight
    return (filled @ wide)[:rows, :outputs].contiguous()


class PaddedLinear(nn.Module):
    """A linear layer that multiplies zero-padded matrices only.

    The kernels of a matrix product, and so the order of its sums, change with the shape; where
    rows, I and O are multiples of 16 each row comes out the same whatever surrounds it. The padding
    of ``weight`` is zero and stays zero in training: neither its inputs nor its outputs are used.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        if in_features < 1 or out_features < 1:
            raise ValueError(
                "in_features and out_features must be at least 1, "
                f"got {in_features} and {out_features}"
            )
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.zeros(padded(in_features), padded(out_features)))
        """``(I, O)`` float32, both padded."""
        self.bias = nn.Parameter(torch.zeros(out_features))
        bound = 1.0 / math.sqrt(in_features)
        with torch.no_grad():
            self.weight[:in_features, :out_features].uniform_(-bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x @ weight + bias``.

        Args:
            x: ``(n, I)`` float32; n may be 0.

        Returns:
            ``(n, O)`` float32, contiguous.

        Raises:
            ValueError: if the shape is another.
        """
        if x.ndim != 2 or x.shape[1] != self.in_features:
            raise ValueError(f"x must be (n, {self.in_features}), got {tuple(x.shape)}")
        chunks = [self._product(chunk) for chunk in torch.split(x, _CHUNK_ROWS)]
        return chunks[0] if len(chunks) == 1 else torch.cat(chunks)

    def _product(self, x: Tensor) -> Tensor:
        return padded_product(x, self.weight)[:, : self.out_features].contiguous() + self.bias

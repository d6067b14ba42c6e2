"""The dtype and shape of a tensor, known without torch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class TensorInfo:
    """The dtype and shape of a tensor.

    Attributes:
        dtype: Name of the dtype in torch, such as "bfloat16".
        shape: Sizes of the dimensions.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        bits = re.search(r"\d+", self.dtype)  # the first number in the name; "bool" has none
        return 1 if bits is None else max(1, int(bits[0]) // 8)

    @property
    def is_floating_point(self) -> bool:
        """Whether the elements are floating-point numbers."""
        return self.dtype.startswith(("float", "bfloat"))

    @property
    def rows(self) -> int:
        """Size of the first dimension. A scalar has one row."""
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return math.prod(self.shape[1:]) * self.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.rows * self.row_bytes

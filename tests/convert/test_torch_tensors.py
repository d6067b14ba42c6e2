"""Bytes and tensors are each other's, whatever the dtype."""

import pytest
import torch

from llama_te_convert.layout.tensor_info import TensorInfo
from llama_te_convert.sources.safetensors import DTYPES
from llama_te_convert.sources.torch_tensors import as_bytes, as_tensor, cast, dtype_name, info_of, torch_dtype

EVERY = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)


@pytest.mark.parametrize("dtype", EVERY, ids=str)
def test_what_is_known_of_a_dtype_by_its_name(dtype):
    info = TensorInfo(dtype_name(dtype), (3, 5))
    assert (info.itemsize, info.is_floating_point) == (dtype.itemsize, dtype.is_floating_point)
    assert (info.rows, info.row_bytes, info.nbytes) == (3, 5 * dtype.itemsize, 15 * dtype.itemsize)
    assert torch_dtype(info.dtype) is dtype


@pytest.mark.parametrize("name", DTYPES.values())
@pytest.mark.parametrize("shape", [(), (0, 3), (4, 3)], ids=str)
def test_there_and_back(name, shape):
    tensor = (torch.arange(torch.Size(shape).numel()) % 2).view(shape).to(torch_dtype(name))
    assert info_of(tensor) == TensorInfo(name, shape)
    data = as_bytes(tensor)
    assert data.nbytes == tensor.nbytes
    assert torch.equal(as_tensor(data, name).float(), tensor.reshape(-1).float())


def test_elements_that_are_not_one_behind_the_other():
    transposed = torch.arange(12.0).view(3, 4).T
    for tensor in (transposed, transposed[:1], transposed[1]):
        assert torch.equal(as_tensor(as_bytes(tensor), "float32"), tensor.reshape(-1))


def test_a_cast_is_that_of_torch():
    numbers = torch.tensor([1 / 3, -0.0, 1e30, float("nan"), float("-inf")])
    for name in ("bfloat16", "float16", "float64"):
        made = as_tensor(cast(as_bytes(numbers), "float32", name), name)
        assert as_bytes(made) == as_bytes(numbers.to(torch_dtype(name)))

"""Arrays on their way to a device, in one copy."""

import numpy as np
import torch

from deepserve.transfer import pack, send_all, unpack

ARRAYS = (
    np.arange(3, dtype=np.float32), np.arange(5), np.arange(6, dtype=np.int32).reshape(2, 3), np.zeros(0, np.float64),
    np.array([1.5, 2.5]), np.arange(10, dtype=np.int32).reshape(5, 2).T, np.zeros((0, 4), np.int32),
)  # fmt: skip


def test_they_arrive_as_they_were_and_aligned() -> None:
    packed = torch.from_numpy(pack(ARRAYS))
    for received in (unpack(packed, ARRAYS), send_all(torch.device("cpu"), *ARRAYS)):
        for array, tensor in zip(ARRAYS, received, strict=True):
            assert tensor.numpy().dtype == array.dtype
            assert tensor.is_contiguous()
            assert np.array_equal(tensor.numpy(), array)
    for tensor in unpack(packed, ARRAYS):
        assert (tensor.data_ptr() - packed.data_ptr()) % 16 == 0

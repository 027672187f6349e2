"""rope on a CPU: interleaved pairs are complex numbers, turned by one product; halves are turned in place."""

from __future__ import annotations

import torch

from deepserve.ops.op import Kernel

CHUNK = 512


def rope(x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """See spec.py. Many tokens go through in chunks: temporaries stay in the cache of the core."""
    if len(x) > CHUNK:
        out = torch.empty(x.shape, dtype=x.dtype)
        for start in range(0, len(x), CHUNK):
            part = slice(start, start + CHUNK)
            out[part] = rope(x[part], positions[part], cos_sin, interleaved)
        return out
    cos, sin = cos_sin.index_select(0, positions).unsqueeze(1).chunk(2, -1)
    wide = x.float()
    if interleaved:
        pairs = torch.view_as_complex(wide.contiguous().view(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).to(x.dtype)
    first, second = wide.chunk(2, -1)
    left = (first * cos).addcmul_(second, sin, value=-1)
    right = (second * cos).addcmul_(first, sin)
    return torch.cat((left, right), -1).to(x.dtype)


KERNEL = Kernel("rope", "cpu", rope)

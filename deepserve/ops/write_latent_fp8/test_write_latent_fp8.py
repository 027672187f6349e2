"""What the cases cannot say of latents in FP8: the bytes of an entry, and what comes back of them."""

import struct

import pytest
import torch

from deepserve.kv_cache.spec import LatentFp8, latent_fp8
from deepserve.ops import check
from deepserve.ops.check import FP8
from deepserve.ops.inventory import KernelInfo
from deepserve.ops.op import Kernel
from deepserve.ops.write_latent_fp8.spec import fp8_cache, latent_parts, read_latents, write_latent_fp8

LARGEST = {FP8[0]: 448, FP8[1]: 240}
SUBNORMAL = {FP8[0]: 2**-9, FP8[1]: 2**-10}
ROPE = {torch.bfloat16: "<8H", torch.float16: "<8e", torch.float32: "<8f"}


def test_the_layout() -> None:
    assert latent_fp8(512, 128) == LatentFp8(rope=512, scale=640, size=656)
    assert latent_fp8(512, 256) == LatentFp8(rope=512, scale=768, size=784)  # computed in fp32
    assert latent_fp8(32, 28).size == 64  # no padding


@pytest.mark.parametrize("fp8", FP8)
@pytest.mark.parametrize("dtype", ROPE)
def test_the_bytes_of_an_entry(fp8: torch.dtype, dtype: torch.dtype) -> None:
    rank, rope_dim, slots = 32, 8, torch.tensor([6, 4, 1])
    cache = fp8_cache(3, 4, rank, rope_dim * dtype.itemsize, "cpu")
    latent = (torch.randn(3, rank) * torch.tensor([[1.0], [300.0], [0.0]])).to(dtype)
    k_rope = torch.randn(3, rope_dim).to(dtype)
    assert write_latent_fp8(latent, k_rope, cache, slots, fp8) is cache
    at = latent_fp8(rank, rope_dim * dtype.itemsize)
    for token, slot in enumerate(slots.tolist()):
        entry = cache.view(12, -1)[slot].numpy().tobytes()
        (scale,) = struct.unpack_from("<f", entry, at.scale)
        least = latent[token].float().abs().max().item() / LARGEST[fp8]
        assert scale.hex().startswith("0x1.0000000000000p") and max(least, 1e-7) <= scale < max(2 * least, 1e-6)
        values = torch.frombuffer(bytearray(entry[:rank]), dtype=fp8).float()
        assert torch.equal(values, (latent[token].float() / scale).to(fp8).float())
        told = struct.unpack_from(ROPE[dtype], entry, at.rope)
        bits = k_rope[token].view(torch.int16).long() & 0xFFFF if dtype == torch.bfloat16 else k_rope[token]
        assert list(told) == bits.tolist()
    untouched = [slot for slot in range(12) if slot not in slots]
    assert (cache.view(12, -1)[untouched] == 0xFF).all()


@pytest.mark.parametrize("fp8", FP8)
def test_what_is_read_is_within_half_a_step_of_what_was_written(fp8: torch.dtype) -> None:
    latent, k_rope = torch.randn(200, 512) * torch.rand(200, 1) * 50, torch.randn(200, 64)
    cache, slots = fp8_cache(15, 16, 512, 256, "cpu"), torch.randperm(240)[:200]
    write_latent_fp8(latent, k_rope, cache, slots, fp8)
    entries = cache.flatten(0, 1)[slots]
    back, rope = read_latents(entries, 512, 64, torch.float32, fp8)
    assert torch.equal(rope, k_rope)
    scales = latent_parts(entries, 512, 64, torch.float32)[2].unsqueeze(1)
    assert ((back - latent).abs() <= (latent.abs() / 16).maximum(scales * SUBNORMAL[fp8] / 2)).all()
    assert 0.02 < (back - latent).norm() / latent.norm() < 0.03
    for dtype in (torch.bfloat16, torch.float16):  # exact, whoever multiplies with the scale and in whatever dtype
        assert torch.equal(back.to(dtype).float(), back)
    again = fp8_cache(15, 16, 512, 256, "cpu")
    write_latent_fp8(back, rope, again, slots, fp8)
    assert torch.equal(read_latents(again.flatten(0, 1)[slots], 512, 64, torch.float32, fp8)[0], back)


def test_the_check_compares_what_the_bytes_stand_for(monkeypatch) -> None:
    """A scale twice as large with halves of its values is the same latent; padding is nobody's; the rest shows."""
    write = write_latent_fp8.reference

    def other_bytes(latent, k_rope, cache, slots, fp8):
        write(latent, k_rope, cache, slots, fp8)
        values, _, scales = latent_parts(cache.flatten(0, 1), latent.shape[1], k_rope.shape[1], k_rope.dtype)
        halves = (values[slots].view(fp8).float() / 2).to(fp8)
        assert torch.equal(halves.float() * 2, values[slots].view(fp8).float())
        values[slots], scales[slots] = halves.view(torch.uint8), scales[slots] * 2
        cache[..., -12:] = 7
        return cache

    def beside(latent, k_rope, cache, slots, fp8):
        return write(latent, k_rope, cache, (slots + 1) % 32, fp8)

    def rounded(latent, k_rope, cache, slots, fp8):
        return write(latent, (k_rope * 1.1).to(k_rope.dtype), cache, slots, fp8)

    def elsewhere(latent, k_rope, cache, slots, fp8):
        return write(latent, k_rope, cache, slots, fp8).clone()

    case = write_latent_fp8.cases[0]
    infos = (KernelInfo("x", exactness="bitwise"),)
    monkeypatch.setattr(check, "inventory", lambda: {"write_latent_fp8": infos})
    for function, sentence in ((other_bytes, None), (beside, "part 0"), (rounded, "part 1"), (elsewhere, "something")):
        kernel = Kernel("write_latent_fp8", "x", function)
        monkeypatch.setattr(check, "load_kernel", lambda op, name, kernel=kernel: kernel)
        said = check.check("write_latent_fp8", "x", case, torch.bfloat16, "cpu", 5)
        assert said is None if sentence is None else sentence in (said or ""), function.__name__

"""FP8 linears: the checkpoint's FP8 weights kept, activations quantised as they come."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deepserve.architecture import load_architecture
from deepserve.errors import AskError
from deepserve.graph.trace import trace
from deepserve.layers.linear import Fp8Linear, Linear
from deepserve.models.decoder import Decoder
from deepserve.models.registry import build_model
from deepserve.models.weights import load_weights
from deepserve.ops.dequant_fp8_block.spec import BLOCK, dequant_fp8_block
from deepserve.ops.linear_fp8_block.spec import linear_fp8_block
from deepserve.ops.quant_fp8.spec import quant_fp8
from tests import tiny
from tests.driver import Driver, Request

# Every part of a stacked linear but the last has whole blocks; kv_a ends in a ragged one, as it does in V3.
ALIGNED = {"intermediate_size": 384, "moe_intermediate_size": 128, "q_lora_rank": 128, "kv_lora_rank": 128}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint("deepseek-v3-fp8", tmp_path_factory.mktemp("fp8"), **ALIGNED)


def load(path: Path, fp8_linear: bool, dtype: torch.dtype = torch.float32) -> Decoder:
    model = build_model(load_architecture(path), dtype, "cpu", fp8_linear)
    load_weights(model, path)
    return model


def test_stored_bytes_are_kept(path: Path) -> None:
    kept, plain = load(path, True), load(path, False)
    for a, b in ((kept.layers[1].attention, plain.layers[1].attention), (kept.layers[0].mlp, plain.layers[0].mlp)):
        for name in ("qkv_a", "q_b", "o", "gate_up", "down"):
            if hasattr(a, name):
                fp8, wide = getattr(a, name), getattr(b, name)
                assert fp8.weight.dtype == torch.float8_e4m3fn
                assert torch.equal(dequant_fp8_block(fp8.weight, fp8.scale, torch.float32), wide.weight)
    assert kept.layers[1].attention.kv_b.dtype == torch.float32
    assert torch.equal(kept.layers[1].attention.kv_b, plain.layers[1].attention.kv_b)
    assert torch.equal(kept.layers[1].mlp.gate_up, plain.layers[1].mlp.gate_up)


@pytest.mark.parametrize("bias", [False, True])
def test_only_activations_are_rounded(bias: bool) -> None:
    """The op is the dequantised product of what quant_fp8 made of x, which is within e4m3's half step (1/16) of x."""
    x, weight = torch.randn(7, 320), torch.randn(200, 320) / 320**0.5
    shift = torch.randn(200) if bias else None
    w8, scale = tiny.quantise_fp8(weight)
    x8, x_scale = quant_fp8(x, BLOCK, False, torch.float8_e4m3fn)
    rounded = x8.float() * x_scale.repeat_interleave(BLOCK, 1)[:, :320]
    assert ((rounded - x).abs() <= x.abs() / 16 + x_scale.max() * 2**-9).all()
    expected = torch.nn.functional.linear(rounded.double(), tiny.dequantise_fp8(w8, scale).double(), None)
    expected = expected if shift is None else expected + shift.double()
    y = linear_fp8_block(x8, x_scale, w8, scale, shift, torch.float32)
    assert (y - expected).abs().max() < 1e-5


def round_trip(module: torch.nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """What an FP8 linear sees of its input."""
    x8, scale = quant_fp8(args[0], BLOCK, False, torch.float8_e4m3fn)
    return (x8.float() * scale.repeat_interleave(BLOCK, 1)[:, : x8.shape[1]],)


def test_the_model_is_its_dequantised_self_with_rounded_activations(path: Path) -> None:
    prompt = torch.randint(0, tiny.VOCAB_SIZE, (60,)).tolist()
    kept, plain = load(path, True), load(path, False)
    logits = Driver(kept).step([(Request(prompt), 60)])[0]
    exact = Driver(plain).step([(Request(prompt), 60)])[0]
    for name, module in plain.named_modules():
        if isinstance(module, Linear):
            assert isinstance(kept.get_submodule(name), Fp8Linear)
            module.register_forward_pre_hook(round_trip)
    rounded = Driver(plain).step([(Request(prompt), 60)])[0]
    # Sums in another order may round an activation to the other side, and a route may flip: a few logits move.
    assert (logits - rounded).abs().median() < 1e-5
    assert (logits - rounded).abs().mean() < 0.02
    # What the rounding itself costs a tiny random model, whose routes flip easily; not 0, or nothing was rounded.
    assert 0.005 < (logits - exact).abs().mean() / exact.std() < 0.4
    chunked, driver = Request(prompt), Driver(kept, "reference")
    pieces = torch.cat([driver.step([(chunked, count)])[0] for count in (1, 30, 1, 28)])
    assert (pieces - logits).abs().median() < 1e-5 and (pieces - logits).abs().mean() < 0.02


def test_the_graph_quantises_and_multiplies_in_fp8(path: Path) -> None:
    names = [getattr(node.target, "name", "") for node in trace(load(path, True)).graph.nodes]
    # 3 layers: qkv_a, q_b, o; the dense MLP and two shared experts: gate_up, down
    assert names.count("linear_fp8_block") == names.count("quant_fp8") == 3 * 3 + 3 * 2
    assert names.count("linear") == 2  # routers


def test_what_cannot_be_kept_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AskError, match=r"gate_proj.*320 rows"):
        load(tiny.write_checkpoint("deepseek-v3-fp8", tmp_path / "ragged"), True)

"""Weights: streaming, FP8, refusals that name what is wrong, and dummy weights of unit gain."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepserve.architecture import load_architecture
from deepserve.errors import AskError
from deepserve.layers.rope import frequencies
from deepserve.models.decoder import Decoder
from deepserve.models.registry import build_model
from deepserve.models.shards import INDEX, SINGLE
from deepserve.models.weights import fill_dummy, load_weights
from tests import tiny
from tests.driver import Driver, Request
from tests.tiny import write_checkpoint


def load(path: Path, dtype: torch.dtype = torch.float32, **options: bool) -> Decoder:
    model = build_model(load_architecture(path), dtype, "cpu", **options)
    load_weights(model, path)
    return model


def edit(path: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Rewrites model.safetensors with some tensors changed or, at None, left out."""
    tensors = {**load_file(path / SINGLE), **change}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path / SINGLE)


def refused(path: Path, **options: bool) -> AskError:
    with pytest.raises(AskError) as caught:
        load(path, **options)
    return caught.value


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write_checkpoint("llama", tmp_path / "llama")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    path = write_checkpoint("deepseek-v2", tmp_path / "sharded", shard_size="1MB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


def test_shards_hold_the_same_weights_as_one_file(sharded: Path, tmp_path: Path) -> None:
    whole = load(write_checkpoint("deepseek-v2", tmp_path / "whole"))
    for (name, a), (_, b) in zip(whole.named_parameters(), load(sharded).named_parameters()):
        assert torch.equal(a, b), name


def test_weights_are_cast_to_the_dtype_asked(llama: Path) -> None:
    model = load(llama, dtype=torch.bfloat16)
    stored = load_file(llama / SINGLE)["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(model.layers[1].mlp.gate_up.weight[160:], stored.bfloat16())


@pytest.mark.parametrize("shape", [(128, 128), (40, 192), (300, 129)])
def test_fp8_blocks_are_dequantised_ragged_ones_too(shape: tuple[int, int]) -> None:
    from deepserve.ops.dequant_fp8_block.spec import dequant_fp8_block

    weight, scale = tiny.quantise_fp8(torch.randn(shape))
    expected = torch.empty(shape)
    for row in range(shape[0]):
        for column in range(shape[1]):
            expected[row, column] = weight[row, column].float() * scale[row // 128, column // 128]
    assert torch.equal(dequant_fp8_block(weight, scale, torch.float32), expected)


def test_a_scale_may_lie_in_another_shard(tmp_path: Path) -> None:
    path = write_checkpoint("deepseek-v3-fp8", tmp_path)
    whole = load(path)
    tensors = load_file(path / SINGLE)
    files = {name: f"model-0000{1 + name.endswith('_inv')}-of-00002.safetensors" for name in tensors}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, path / file)
    (path / SINGLE).unlink()
    (path / INDEX).write_text(json.dumps({"weight_map": files}))
    for (name, a), (_, b) in zip(whole.named_parameters(), load(path).named_parameters()):
        assert torch.equal(a, b), name


def test_missing_unexpected_and_misshapen_tensors_are_named(llama: Path) -> None:
    norm = "model.layers.2.input_layernorm.weight"
    edit(llama, {norm: None})
    assert refused(llama).field == f"tensor {norm}"
    edit(llama, {norm: torch.ones(96), "model.layers.2.extra.weight": torch.ones(3)})
    assert refused(llama).field == "tensor model.layers.2.extra.weight"
    edit(llama, {"model.layers.2.extra.weight": None, norm: torch.ones(95)})
    error = refused(llama)
    assert error.field == f"tensor {norm}" and "[95]" in error.message and "[96]" in error.message
    edit(llama, {norm: torch.ones(96, dtype=torch.int32)})
    assert "int32" in refused(llama).message


def test_fp8_scales_are_checked(tmp_path: Path) -> None:
    path = write_checkpoint("deepseek-v3-fp8", tmp_path)
    name = "model.layers.1.self_attn.o_proj.weight_scale_inv"
    edit(path, {name: torch.ones(3, 3)})
    assert refused(path).field == f"tensor {name}"
    edit(path, {name: None})
    assert refused(path).field == f"tensor {name}"


def test_a_truncated_shard_is_refused(sharded: Path) -> None:
    file = sorted(sharded.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-100])
    error = refused(sharded)
    assert error.field == f"file {file.name}" and "truncated" in error.hint


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x00" * 200])
def test_a_file_that_is_not_safetensors_is_refused(llama: Path, content: bytes) -> None:
    (llama / SINGLE).write_bytes(content)
    assert refused(llama).field == f"file {SINGLE}"


def test_an_index_that_names_a_missing_file_is_refused(sharded: Path) -> None:
    file = sorted(sharded.glob("*.safetensors"))[0]
    file.unlink()
    assert file.name in refused(sharded).message


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..\\x.safetensors", 3, "x.bin"]
)
def test_an_index_cannot_point_elsewhere(sharded: Path, name: object) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = name
    (sharded / INDEX).write_text(json.dumps(index))
    assert refused(sharded).field == f"file {INDEX}"


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', "{}"])
def test_a_broken_index_is_refused(sharded: Path, text: str) -> None:
    (sharded / INDEX).write_text(text)
    assert refused(sharded).field == f"file {INDEX}"


def test_pickles_are_refused(llama: Path) -> None:
    (llama / SINGLE).unlink()
    assert "no model.safetensors" in refused(llama).message
    torch.save({}, llama / "pytorch_model.bin")
    error = refused(llama)
    assert "pickled" in error.message and "safetensors" in error.hint


def test_shards_without_their_index_are_refused(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    assert INDEX in refused(sharded).hint


def test_a_tied_head_has_no_tensor_and_may_have_one(tmp_path: Path) -> None:
    path = write_checkpoint("qwen3", tmp_path)
    model = load(path)
    assert model.head.weight is model.embedding.weight
    edit(path, {"lm_head.weight": torch.zeros(tiny.VOCAB_SIZE, 96)})
    assert torch.equal(load(path).head.weight, model.head.weight)


@pytest.mark.parametrize("name", tiny.CHECKPOINTS)
def test_dummy_weights_have_unit_gain(name: str, tmp_path: Path) -> None:
    path = write_checkpoint(name, tmp_path)
    first, second = (build_model(load_architecture(path), torch.float32, "cpu") for _ in range(2))
    for model in (first, second):
        fill_dummy(model, seed=3)
    for (key, a), (_, b) in zip(first.named_parameters(), second.named_parameters()):
        assert torch.equal(a, b), key
    prompt = torch.randint(0, tiny.VOCAB_SIZE, (50,)).tolist()
    logits = Driver(first).step([(Request(prompt), 50)])[0]
    assert 0.5 < logits.std() < 2


MEMORY = """
import sys
import torch
from deepserve.architecture import load_architecture
from deepserve.models.registry import build_model
from deepserve.models.weights import load_weights

def kib(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

torch.set_num_threads(1)
model = build_model(load_architecture(sys.argv[1]), torch.bfloat16, "cpu")
before = kib("VmRSS")
load_weights(model, sys.argv[1])
print(kib("VmHWM") - before)
"""


def test_the_peak_is_the_weights_and_one_shard(tmp_path: Path) -> None:
    path = write_checkpoint(
        "llama", tmp_path, dtype="bfloat16", shard_size="16MB", hidden_size=1024, intermediate_size=2816,
        num_hidden_layers=6, num_attention_heads=8, head_dim=128, num_key_value_heads=8,
    )  # fmt: skip
    sizes = [file.stat().st_size for file in path.glob("*.safetensors")]
    assert len(sizes) > 5
    command = [sys.executable, "-c", MEMORY, str(path)]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) * 1024
    assert sum(sizes) * 0.9 < grown < sum(sizes) + max(sizes) + (8 << 20)


def test_every_released_rope_has_the_frequencies_of_transformers(tmp_path: Path) -> None:
    for name in ("deepseek-v2", "deepseek-v2-lite", "llama", "llama-linear", "qwen3"):
        oracle = tiny.build_oracle(name)
        rope = load_architecture(write_checkpoint(name, tmp_path / name)).rope
        torch.testing.assert_close(frequencies(rope), oracle.model.rotary_emb.inv_freq, rtol=1e-6, atol=0)

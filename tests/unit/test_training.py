"""The training model is the model that transformers, and so DeepServe, will run."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
transformers = pytest.importorskip("transformers")


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch):
    """training/model.py, importable as its scripts import it."""
    monkeypatch.syspath_prepend(str(ROOT / "training"))
    import model

    yield model
    sys.modules.pop("model", None)


def test_a_saved_checkpoint_gives_the_same_logits_in_transformers(training, tmp_path: Path) -> None:
    torch.seed()
    config = replace(
        training.ModelConfig(),
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        moe_intermediate_size=32,
        q_lora_rank=32,
        kv_lora_rank=32,
    )
    model = training.DemoModel(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=weight.shape[-1] ** -0.5) if weight.dim() > 1 else weight.uniform_(0.5, 1.5)
        for name, buffer in model.named_buffers():
            if name.endswith("bias"):
                buffer.normal_(std=0.1)
    training.save_checkpoint(model, tmp_path, shard_bytes=200_000)
    ours = training.load_checkpoint(tmp_path).eval()
    theirs = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.randint(0, 128, (2, 40))
    with torch.no_grad():
        cos, sin = ours.angles(40, torch.device("cpu"))
        torch.testing.assert_close(ours.lm_head(ours(ids, cos, sin)), theirs(ids).logits, atol=1e-4, rtol=1e-4)


def test_the_shipped_demo_is_what_the_training_code_reads(training) -> None:
    model = training.load_checkpoint(ROOT / "deepserve/demo")
    assert sum(weight.numel() for weight in model.parameters()) == 20_610_816

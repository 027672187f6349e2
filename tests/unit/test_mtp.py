"""The multi-token prediction layer against transformers' MtpModel, however the tokens are cut into batches."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest
import torch

from deepserve.architecture import load_architecture
from deepserve.errors import AskError
from deepserve.graph.bind import bind
from deepserve.graph.trace import trace
from deepserve.models.decoder import Decoder
from deepserve.models.registry import build_model
from deepserve.models.weights import load_weights
from deepserve.ops.inventory import inventory
from deepserve.ops.load import load_kernel
from tests import tiny
from tests.driver import Driver, Request, _pick

LIMIT = 2e-5
KERNELS = ("eager", "reference", "cpu")
LENGTHS = (41, 2, 17, 66)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint("deepseek-v3", tmp_path_factory.mktemp("mtp"))


@pytest.fixture(scope="module")
def model(path: Path) -> Decoder:
    model = build_model(load_architecture(path), torch.float32, "cpu", with_mtp=True)
    load_weights(model, path)
    return model


@pytest.fixture(scope="module")
def oracle(path: Path) -> list[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """Prompts, and the layer's result for all of their rows: once, and once more with its own result as input."""
    from transformers import DeepseekV3ForCausalLM
    from transformers.modeling_layers import MtpModel

    class Main(DeepseekV3ForCausalLM):
        _keys_to_ignore_on_load_unexpected = [r"model\.layers\.3\..*"]

    main = Main.from_pretrained(path, attn_implementation="eager").eval()
    mtp = MtpModel.from_pretrained(main, device_map={"": "cpu"}).eval()
    generator = torch.Generator().manual_seed(3)
    found = []
    with torch.no_grad():
        for length in LENGTHS:
            ids = torch.randint(0, tiny.VOCAB_SIZE, (1, length + 2), generator=generator)
            hidden = main.model(ids[:, :length]).last_hidden_state
            once = mtp.forward_layer(0, hidden, torch.arange(length)[None], None, ids[:, 1 : length + 1])
            again = mtp.forward_layer(0, once, torch.arange(length)[None], None, ids[:, 2 : length + 2])
            found.append((ids[0].tolist(), once[0], again[0]))
        assert torch.equal(mtp._project_to_logits(once), main.lm_head(once))
    return found


def run(model: Decoder, kernels: str, hidden: torch.Tensor, batch) -> torch.Tensor:
    if kernels == "eager":
        return model.mtp(hidden, batch)
    return bind(trace(model.mtp), {op: load_kernel(op, _pick(op, kernels, "fp32")) for op in inventory()})(
        hidden, batch
    )


def shifted(batch, rows: list[tuple[Request, int]], by: int = 1):
    tokens = [token for r, n in rows for token in r.token_ids[r.num_computed + by : r.num_computed + n + by]]
    return dataclasses.replace(batch, token_ids=torch.tensor(tokens))


@pytest.mark.parametrize("kernels", KERNELS)
def test_it_equals_transformers(model: Decoder, oracle, kernels: str) -> None:
    for ids, once, again in oracle:
        driver = Driver(model, kernels)
        rows = [(Request(ids), len(ids) - 2)]
        batch = driver.batch(rows)
        found = run(model, kernels, driver.forward(batch), shifted(batch, rows))
        assert (found - once).abs().max() <= LIMIT
        assert torch.equal(model.mtp.logits(found), model.logits(found))
        second = run(model, kernels, found, shifted(driver.batch(rows), rows, 2))
        assert (second - again).abs().max() <= LIMIT


@pytest.mark.parametrize("kernels", KERNELS)
def test_it_equals_transformers_in_random_batches(model: Decoder, oracle, kernels: str) -> None:
    driver, rng = Driver(model, kernels), random.Random(5)
    requests = [Request(ids) for ids, *_ in oracle]
    while waiting := [r for r in requests if r.num_computed < len(r.token_ids) - 2]:
        chosen = [r for r in waiting if rng.random() < 0.7]
        rows = [(r, min(rng.choice((1, 1, 2, 5, 20)), len(r.token_ids) - 2 - r.num_computed)) for r in chosen]
        rows.sort(key=lambda row: row[1] > 1)
        if not rows:
            continue
        batch = driver.batch(rows)
        found, start = run(model, kernels, driver.forward(batch), shifted(batch, rows)), 0
        for request, count in rows:
            expected = oracle[requests.index(request)][1][request.num_computed : request.num_computed + count]
            assert (found[start : start + count] - expected).abs().max() <= LIMIT
            start, request.num_computed = start + count, request.num_computed + count


def test_it_is_loaded_only_where_asked(path: Path, model: Decoder) -> None:
    plain = build_model(load_architecture(path), torch.float32, "cpu")
    load_weights(plain, path)
    assert plain.mtp is None
    names = {slot.name for slot in model.slots()} - {slot.name for slot in plain.slots()}
    assert {name.split(".")[2] for name in names} == {"3"}
    assert not any("embed_tokens" in name or "shared_head.head" in name for name in names)
    assert sum(p.numel() for p in model.parameters()) > sum(p.numel() for p in plain.parameters())


def test_a_checkpoint_without_its_tensors_is_refused_by_name(tmp_path: Path) -> None:
    path = tiny.write_checkpoint("deepseek-v3", tmp_path, num_mtp_layers=0)
    broken = build_model(load_architecture(path), torch.float32, "cpu", with_mtp=True)
    with pytest.raises(AskError, match=r"model\.layers\.3\..*missing"):
        load_weights(broken, path)

"""The tuner over real kernels, by a clock that knows what it wants: nothing is measured here, and all else is real."""

import dataclasses
import itertools

import pytest
import torch
from triton.runtime.interpreter import GridExecutor
from triton.runtime.jit import JITFunction

from deepserve import LLM, SamplingParams
from deepserve.bench.replay import recorded_cases
from deepserve.ops.check import Comparison
from deepserve.ops.gqa_attention.spec import _case as gqa_case
from deepserve.ops.launch import CHIPS
from deepserve.ops.load import load_op
from deepserve.ops.mla_attention.spec import _case as mla_case
from deepserve.ops.moe_experts.spec import _case as moe_case
from deepserve.ops.tiles import forced, noted, read_table, table_file
from deepserve.tune.run import cases_of, tune
from deepserve.tune.search import Unfit, distance
from deepserve.tune.tables import Tables
from deepserve.tune.tuner import CallTrial, Tuner
from tests.tiny import write_checkpoint

CHIP = dataclasses.replace(CHIPS["sm_90"], gpu="h100")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LATENT = mla_case("small", [1, 1, 1], [1, 9, 20], (4, 16, 8, 32, 24, 4))
GROUPED = gqa_case("small", [1], [20], (4, 2, 16, 4))
STAMP = {"date": "2026-01-02", "torch": "2.11.0", "triton": "3.6.0"}


def preferring(**wanted):
    """A clock that finds the tiles wanted, by the space's name, the fastest. Launchers run, kernels do not."""

    def clock(call):
        with pytest.MonkeyPatch.context() as patch, noted() as asked:
            patch.setattr(GridExecutor, "__call__", lambda *args, **kwargs: None)
            patch.setattr(JITFunction, "run", lambda *args, **kwargs: None)
            call()
        far = [distance(one.tile, wanted[one.space.name]) for one in asked if one.space.name in wanted]
        return 1.0 + 0.1 * sum(far)

    return clock


def tuner(clock, num_tiles, dtype=torch.float32):
    """One that has time for so many tiles."""
    return Tuner(dtype, DEVICE, CHIP, clock, num_tiles + 1, now=itertools.count().__next__)


def test_the_tuner_finds_what_the_clock_wants_and_the_launcher_then_uses_it(tmp_path):
    one = tuner(preferring(decode=(16, 8, 2)), 8)
    (outcome,) = tune({"mla_attention": [LATENT]}, one, Tables(tmp_path, CHIP, "fp32", STAMP))
    assert outcome.verdict.tile == (16, 8, 2) and outcome.verdict.is_kept
    assert outcome.asked.key == {"heads": 4, "entry": 40, "element_bytes": 4, "requests": 4}
    assert not outcome.tally.wrong and outcome.tally.num_tried == 8
    rows = read_table("mla_attention", CHIP, table_file("mla_attention", "h100", tmp_path))
    assert rows == one.kept
    with forced(rows), noted() as asked:
        assert Comparison("mla_attention", "triton", LATENT, torch.float32, DEVICE, 1).difference() is None
    assert [one.tile for one in asked] == [(16, 8, 2)]


def test_the_second_product_is_tuned_for_the_rows_that_the_first_one_got():
    one = tuner(preferring(gate_up=(64, 32, 32, 4, 3, 0), down=(32, 32, 4, 3, 0)), 14, torch.bfloat16)
    gate_up, down = one.tune("moe_experts", moe_case(24, 3, 2, 32, 32))
    assert gate_up.asked.key == {"hidden": 32, "width": 32, "element_bytes": 2, "rows": 16, "experts": 4}
    assert (gate_up.asked.default[0], gate_up.verdict.tile) == (32, (64, 32, 32, 4, 3, 0))
    assert down.asked.key == {**gate_up.asked.key, "tile_rows": 64}
    assert down.verdict.is_kept and not (gate_up.tally.wrong or down.tally.wrong)


def test_another_call_of_the_same_key_can_take_the_row_away(tmp_path):
    cases = {"gqa_attention": [GROUPED]}
    wanted = {"decode": (32, 4, 3)}
    one, tables = tuner(lambda call: preferring(**wanted)(call), 1), Tables(tmp_path, CHIP, "fp32", STAMP)
    file = table_file("gqa_attention", "h100", tmp_path)
    (won,) = tune(cases, one, tables)
    assert won.verdict.is_kept and file.exists()
    (again,) = tune(cases, one, tables)
    assert again.is_second_look and again.problem is None and file.exists()
    wanted["decode"] = (32, 4, 2)
    (lost,) = tune(cases, one, tables)
    assert lost.is_second_look and lost.problem == "slower here, dropped"
    assert not one.kept and not file.exists()
    assert not list(tune(cases, one, tables))


def test_an_op_without_tiles_asks_nothing():
    one = tuner(preferring(), 1)
    assert not list(one.tune("rms_norm", load_op("rms_norm").cases[0]))
    assert one.silent == {"rms_norm"}


def test_a_tile_that_triton_refuses_is_unfit():
    comparison = Comparison("mla_attention", "triton", LATENT, torch.float32, DEVICE, 1)
    with noted() as asked:
        comparison.call()
    trial = CallTrial(comparison, asked[0].place, {}, preferring())
    assert trial.difference((32, 4, 2)) is None
    with pytest.raises(Unfit, match="does not compile"):
        trial.difference((48, 4, 2))
    assert trial.difference((32, 4, 2)) is None


def test_what_breaks_the_gpu_is_not_swallowed():
    class Broken:
        def difference(self):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    trial = CallTrial(Broken(), ("mla_attention", "decode", (4, 40, 4, 4)), {}, preferring())
    with pytest.raises(RuntimeError, match="illegal memory access") as broken:
        trial.difference((32, 4, 2))
    assert "(32, 4, 2)" in broken.value.__notes__[0]


def test_a_comparison_can_be_asked_again():
    """Even if the op writes: what the first call wrote may not be taken for the second one's work."""
    op = load_op("write_latent")
    comparison = Comparison("write_latent", "triton", op.cases[0], torch.float32, DEVICE, 1)
    assert comparison.difference() is None
    assert comparison.difference() is None
    comparison._kernel = dataclasses.replace(comparison._kernel, function=lambda *arguments: arguments[1])
    assert comparison.difference() is not None


def test_recorded_calls_are_tuned(tmp_path):
    checkpoint = write_checkpoint("deepseek-v2-lite", tmp_path / "model")
    llm = LLM(str(checkpoint), dtype="float32", max_model_len=64, max_num_seqs=4, num_gpu_blocks_override=20,
              capture_shapes=str(tmp_path / "shapes"))  # fmt: skip
    sampling = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    llm.generate([[5, 6, 7], [8, 9, 10, 11]], sampling, use_tqdm=False)
    llm.shutdown()
    dtype, live = recorded_cases(str(tmp_path / "shapes"))
    cases = cases_of(["mla_attention"], live)
    assert dtype == "fp32"
    one = tuner(preferring(decode=(16, 8, 2), prefill=(16, 32, 4, 1)), 1)
    outcomes = list(tune(cases, one, Tables(tmp_path / "tables", CHIP, dtype, STAMP)))
    assert {outcome.asked.space.name for outcome in outcomes} == {"decode", "prefill"}
    assert all(outcome.verdict is not None and not outcome.tally.wrong for outcome in outcomes)
    assert {outcome.case.split()[0] for outcome in outcomes} <= {case.name.split()[0] for case in live["mla_attention"]}
    assert read_table("mla_attention", CHIP, table_file("mla_attention", "h100", tmp_path / "tables")) == one.kept

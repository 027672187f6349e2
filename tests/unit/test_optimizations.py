"""The table of optimizations: well-formed rows, and how switches, defaults and needs decide."""

import dataclasses

import pytest

from deepserve.config import Config, field_types
from deepserve.errors import AskError
from deepserve.ops.inventory import inventory
from deepserve.optimizations import EXACTNESS, ROWS, TABLE, decide, row_of_kernel
from tests.unit.test_plan import CPU, facts

FP8 = facts("deepseek-v3", dataclasses.replace(CPU, memory_bytes=2**42))


def on(known=FP8, **asked) -> set[str]:
    return {name for name, decision in decide(Config(**asked), known, "bf16").items() if decision.on}


def test_rows_are_well_formed() -> None:
    assert len(ROWS) == len(TABLE)
    kernels = {info.name for infos in inventory().values() for info in infos}
    for row in TABLE:
        assert row.exactness in EXACTNESS
        assert row.default in ("on", "gpu", "off")
        required = {one for name in row.requires for one in name.split(" or ")}
        assert required | set(row.covers) <= set(list(ROWS)[: TABLE.index(row)])
        assert {name for name, _ in row.excludes} <= set(list(ROWS)[: TABLE.index(row)])
        assert set(row.kernels) <= kernels
        assert row.field is None or row.field in field_types()
        assert row.fuses is None or row.fuses in inventory()
        assert row.sentence.endswith(".")


def test_every_kernel_but_the_reference_has_one_row() -> None:
    for infos in inventory().values():
        for info in infos:
            rows = [row for row in TABLE if info.name in row.kernels]
            assert len(rows) == (info.name != "reference"), info.name
            assert row_of_kernel(info.name) == (rows[0] if rows else None)


def test_every_fused_op_has_its_row() -> None:
    from deepserve.graph.rewrite import fused_ops

    assert {row.fuses for row in TABLE if row.fuses} == set(fused_ops())


def test_defaults() -> None:
    off = {"fp8_linear", "fp8_kv_cache", "triton_kernels", "triton_kernels or native_kernels"}  # it has no compiler
    fusions = {row.name for row in TABLE if row.fuses and not off & set(row.requires)}
    assert on() == {"prefix_caching", "chunked_prefill", "cpu_kernels", "packed_linear", *fusions}
    assert on(facts("deepseek-v3", "mi300x")) >= {"async_scheduling", "triton_kernels", "cuda_graphs"}


def test_what_is_asked_for_happens() -> None:
    assert "async_scheduling" in on(on=("async_scheduling",))
    assert "async_scheduling" in on(async_scheduling=True)
    assert "speculative_decoding" in on(speculative_config={"method": "ngram"})
    assert "async_scheduling" not in on(facts("deepseek-v3", "mi300x"), speculative_config={"method": "mtp"})
    assert "prefix_caching" not in on(off=("prefix_caching",))
    assert "prefix_caching" not in on(enable_prefix_caching=False)
    assert all("fp8_kv_cache" in on(kv_cache_dtype=asked) for asked in ("fp8", "fp8_e4m3"))
    assert not any("fp8_kv_cache" in on(kv_cache_dtype=asked) for asked in ("auto", "bf16", "fp8_e5m2"))
    assert on(off=tuple(ROWS)) == set()


def test_requirements_follow() -> None:
    quantised = {name for name in ROWS if name.endswith("quant_fp8")}
    assert len(quantised) == 3
    assert not quantised & on()
    assert quantised | {"fp8_linear"} <= on(on=("fp8_linear",))
    assert not quantised & on(on=("fp8_linear",), off=tuple(quantised))
    latents = {"fusion_rms_norm_rope_write_latent", "fusion_rms_norm_rope_write_latent_fp8"}
    assert latents & on() == {"fusion_rms_norm_rope_write_latent"}
    assert latents & on(kv_cache_dtype="fp8") == {"fusion_rms_norm_rope_write_latent_fp8"}


@pytest.mark.parametrize(
    ("asked", "field", "said"),
    [
        ({"on": ("prefix_cashing",)}, "on/off", "did you mean prefix_caching"),
        ({"on": ("prefix_caching",), "off": ("prefix_caching",)}, "prefix_caching", "both"),
        ({"on": ("prefix_caching",), "enable_prefix_caching": False}, "prefix_caching", "both"),
        ({"on": ("fp8_kv_cache",), "kv_cache_dtype": "bf16"}, "fp8_kv_cache", "both"),
        ({"off": ("fp8_kv_cache",), "kv_cache_dtype": "fp8"}, "fp8_kv_cache", "both"),
        ({"on": ("cuda_graphs",)}, "cuda_graphs", "cannot be on: Test CPU has no graphs"),
        ({"off": ("async_scheduling",), "async_scheduling": True}, "async_scheduling", "both"),
        ({"on": ("triton_kernels",)}, "triton_kernels", "GPU"),
        ({"on": ("async_scheduling", "speculative_decoding")}, "async_scheduling", "how much of a step was accepted"),
        ({"off": ("speculative_decoding",), "speculative_config": {"method": "mtp"}}, "speculative_decoding", "both"),
        ({"on": ("fusion_rms_norm_quant_fp8",)}, "fusion_rms_norm_quant_fp8", "fp8_linear is off"),
    ],
)
def test_contradictions_and_impossibilities_are_refused(asked, field, said) -> None:
    with pytest.raises(AskError) as caught:
        on(**asked)
    assert caught.value.field == field
    assert said in str(caught.value)


def test_fp8_needs_an_fp8_checkpoint() -> None:
    with pytest.raises(AskError, match="not FP8"):
        on(facts(), on=("fp8_linear",))

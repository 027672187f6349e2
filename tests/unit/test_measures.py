"""The measures of a load run on outcomes whose values are known."""

from __future__ import annotations

import random
import statistics
from itertools import islice

import numpy
import pytest

from deepserve.bench.dataset import length_drawer
from deepserve.bench.measures import Outcome, console, goodput, latency_keys, percentile, totals
from deepserve.errors import AskError

ONE = Outcome(10, start=100.0, ttft=0.5, latency=1.5, itls=[0.25, 0.25, 0.5], num_output_tokens=5)
TWO = Outcome(30, start=101.0, ttft=0.1, latency=0.3, itls=[0.2], num_output_tokens=2)
LOST = Outcome(10, start=100.0, latency=2.0, error="HTTP 500")


@pytest.mark.parametrize("percent", [0, 25, 50, 90, 99, 100])
def test_percentiles_are_numpys(percent: float) -> None:
    values = [random.random() for _ in range(17)]
    assert percentile(values, percent) == pytest.approx(numpy.percentile(values, percent))
    assert percentile([], percent) == 0


def test_definitions() -> None:
    assert ONE.tpot == pytest.approx((1.5 - 0.5) / 4)
    found = latency_keys([ONE, TWO, LOST], (50, 99))
    assert found["mean_ttft_ms"] == pytest.approx(300) and found["median_e2el_ms"] == pytest.approx(900)
    assert found["mean_tpot_ms"] == pytest.approx(1e3 * statistics.fmean([0.25, 0.2]))
    assert found["mean_itl_ms"] == pytest.approx(1e3 * statistics.fmean([0.25, 0.25, 0.5, 0.2]))
    assert found["std_ttft_ms"] == pytest.approx(200) and set(found) >= {"p50_itl_ms", "p99_itl_ms"}


def test_totals_and_goodput() -> None:
    found = totals([ONE, TWO, LOST], 2.0)
    assert (found["completed"], found["failed"], found["total_output_tokens"]) == (2, 1, 7)
    assert found["output_throughput"] == 3.5 and found["merge_factor"] == pytest.approx(7 / 6)
    assert found["max_concurrent_requests"] == 3
    assert found["realised_lengths"]["input"] == {"min": 10, "mean": 20, "max": 30}
    assert goodput([ONE, TWO, LOST], {"ttft": 200}, 2.0) == 0.5
    assert goodput([ONE, TWO, LOST], {"ttft": 600, "tpot": 300, "e2el": 2000}, 2.0) == 1.0


def test_the_console_has_fixed_columns() -> None:
    result = {**totals([ONE, TWO], 2.0), **latency_keys([ONE, TWO], (99.0,))}
    lines = console(result, ("ttft",), (99.0,)).splitlines()
    assert lines[0] == "=" * 12 + " Serving Benchmark Result " + "=" * 12 and lines[-1] == "=" * 50
    assert f"{'Benchmark duration (s):':<40} {2.0:<10.2f}" in lines
    assert f"{'P99 TTFT (ms):':<40} {result['p99_ttft_ms']:<10.2f}" in lines


def test_length_distributions() -> None:
    def lengths(distribution: str) -> list[int]:
        draw = length_drawer(100, distribution, random.Random(1))
        return list(islice(iter(draw, None), 500))

    assert set(lengths("fixed")) == {100}
    assert min(lengths("pm:0.2")) == 80 and max(lengths("pm:0.2")) == 120
    assert min(lengths("low:0.8")) == 80 and max(lengths("low:0.8")) == 100
    for wrong in ("pm:2", "normal", "pm:x"):
        with pytest.raises(AskError):
            length_drawer(100, wrong, random.Random(1))

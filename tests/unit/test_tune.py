"""`deepserve tune` without a GPU: the search over a pure function, the merging of rows, and what is refused."""

import dataclasses
import itertools
import math

import pytest

from deepserve.bench.replay import recorded_cases
from deepserve.cli.main import main
from deepserve.cli.tune import run
from deepserve.errors import AskError
from deepserve.hardware import this_cpu
from deepserve.ops.inventory import inventory
from deepserve.ops.launch import CHIPS
from deepserve.ops.mla_attention.tiles import DECODE
from deepserve.ops.tiles import Asked, read_rows, table_file
from deepserve.tune.run import Report, cases_of
from deepserve.tune.search import ALTERNATIONS, Tally, Unfit, Verdict, distance, duel, search
from deepserve.tune.tables import Tables
from deepserve.tune.tuner import Outcome

TILES = list(itertools.product((16, 32, 64, 128), (2, 4, 8), (1, 2, 3, 4)))
HEURISTIC, BEST = (64, 4, 3), (32, 8, 2)
CHIP = dataclasses.replace(CHIPS["sm_90"], gpu="h100")


class Landscape:
    """A trial whose time grows with the distance from BEST, on a machine that gets slower while it is looked at."""

    def __init__(self, drift=0.0, wrong=(), unfit=(), best=BEST):
        self.wrong, self.unfit, self.best = set(wrong), set(unfit), best
        self.drift, self.looks = drift, 0
        self.checked, self.timed = [], []

    def difference(self, tile):
        if tile in self.unfit:
            raise Unfit("more shared memory than there is")
        self.checked.append(tile)
        return "3 of 4 elements differ" if tile in self.wrong else None

    def seconds(self, tile):
        assert tile in self.checked and tile not in self.wrong, "timed before it was found right"
        self.looks += 1
        self.timed.append(tile)
        return (1 + 0.1 * distance(tile, self.best)) * (1 + self.drift * self.looks)


def test_the_fastest_tile_wins():
    verdict, tally = search(HEURISTIC, TILES, trial := Landscape(), math.inf)
    assert (verdict.heuristic, verdict.tile) == (HEURISTIC, BEST)
    assert verdict.is_kept and verdict.gain == pytest.approx(1 + 0.1 * distance(HEURISTIC, BEST))
    assert tally == Tally(num_tried=len(TILES) - 1)
    assert set(trial.timed) == set(TILES)


def test_a_wrong_tile_is_told_and_never_timed():
    near = [tile for tile in TILES if distance(tile, BEST) <= 1]
    verdict, tally = search(HEURISTIC, TILES, trial := Landscape(wrong=near), math.inf)
    assert verdict.tile not in near and verdict.is_kept
    assert tally.wrong == dict.fromkeys(near, "3 of 4 elements differ")
    assert not set(trial.timed) & set(near)


def test_what_does_not_fit_is_counted_by_reason():
    unfit = [tile for tile in TILES if tile[2] == 2]
    verdict, tally = search(HEURISTIC, TILES, Landscape(unfit=unfit), math.inf)
    assert verdict.tile[2] != 2
    assert tally.unfit == {"more shared memory than there is": len(unfit)}
    assert tally.num_tried == len(TILES) - 1 - len(unfit)


def test_a_heuristic_that_is_wrong_is_no_ground_to_search_from():
    with pytest.raises(ValueError, match="3 of 4 elements differ"):
        search(HEURISTIC, TILES, Landscape(wrong=[HEURISTIC]), math.inf)
    with pytest.raises(Unfit):
        search(HEURISTIC, TILES, Landscape(unfit=[HEURISTIC]), math.inf)


def test_in_a_limited_time_the_search_goes_downhill():
    clock = itertools.count()
    trial = Landscape()
    verdict, tally = search(HEURISTIC, TILES, trial, 20.0, now=lambda: next(clock))
    assert verdict.tile == BEST
    assert tally.num_tried == 19 and tally.num_left == len(TILES) - 20
    steps = [distance(one, other) for one, other in itertools.pairwise(trial.timed[:5])]
    assert max(steps) <= 3, "neighbours first"


def test_a_machine_that_slows_down_decides_nothing():
    trial = Landscape(drift=0.1)
    trial.checked += [HEURISTIC, BEST]
    verdict = duel(HEURISTIC, BEST, trial)
    assert trial.timed[:4] == [BEST, HEURISTIC, HEURISTIC, BEST]
    assert trial.timed.count(BEST) == trial.timed.count(HEURISTIC) == ALTERNATIONS >= 5
    assert verdict.gain == pytest.approx(1 + 0.1 * distance(HEURISTIC, BEST), rel=0.001)


@pytest.mark.parametrize("seconds, kept", [(1 / 1.029, False), (1 / 1.031, True), (2.0, False)])
def test_a_row_needs_three_per_cent(seconds, kept):
    assert Verdict(HEURISTIC, 1.0, BEST, seconds).is_kept is kept


def test_the_heuristic_itself_needs_no_row():
    verdict, _ = search(HEURISTIC, TILES, Landscape(best=HEURISTIC), math.inf)
    assert verdict.tile == HEURISTIC and not verdict.is_kept


def outcome(requests, tile_s=0.5, tile=BEST, **fields):
    place = ("mla_attention", "decode", (16, 576, 2, requests))
    verdict = Verdict(HEURISTIC, 1.0, tile, tile_s) if tile_s else None
    return Outcome("mla_attention", f"decode_{requests}", Asked(DECODE, place, HEURISTIC, HEURISTIC), verdict, Tally(),
                   **fields)  # fmt: skip


def tables(tmp_path, date="2026-01-02"):
    return Tables(tmp_path, CHIP, "bf16", {"date": date, "torch": "2.11.0", "triton": "3.6.0"})


def rows(tmp_path):
    return {row.key["requests"]: row for row in read_rows(table_file("mla_attention", "h100", tmp_path))}


def test_what_wins_is_written_at_once_and_says_how_it_was_measured(tmp_path):
    tables(tmp_path).update(outcome(32))
    (row,) = rows(tmp_path).values()
    assert row.tile == {"keys": 32, "warps": 8, "stages": 2} and row.heuristic == {"keys": 64, "warps": 4, "stages": 3}
    assert (row.microseconds, row.heuristic_microseconds) == (500000.0, 1000000.0)
    assert (row.case, row.date) == ("mla_attention decode_32 bf16", "2026-01-02")
    assert (row.torch, row.triton) == ("2.11.0", "3.6.0")


def test_a_later_run_changes_only_what_it_measured(tmp_path):
    first = tables(tmp_path)
    for requests in (1, 8, 32, 64):
        first.update(outcome(requests))
    second = tables(tmp_path, "2026-03-04")
    second.update(outcome(8, 0.98))  # not enough any more
    second.update(outcome(32, 0.4, (16, 4, 4)))
    second.update(outcome(64, None, problem="the heuristic's tile: 3 of 4 elements differ"))
    assert rows(tmp_path).keys() == {1, 32, 64}
    assert {requests: row.date for requests, row in rows(tmp_path).items()} == {
        1: "2026-01-02", 32: "2026-03-04", 64: "2026-01-02"
    }  # fmt: skip
    second.update(outcome(32, 0.6, is_second_look=True))
    assert rows(tmp_path)[32].microseconds == 400000.0
    second.update(outcome(32, 1.2, problem="slower here, dropped", is_second_look=True))
    assert rows(tmp_path).keys() == {1, 64}


def test_without_a_row_there_is_no_file(tmp_path):
    made = tables(tmp_path)
    made.update(outcome(8, 0.99))
    assert not table_file("mla_attention", "h100", tmp_path).exists()
    made.update(outcome(32))
    made.update(outcome(32, 1.2, problem="slower here, dropped", is_second_look=True))
    assert not table_file("mla_attention", "h100", tmp_path).exists()


def test_rows_that_fit_no_more_are_dropped_aloud(tmp_path):
    tables(tmp_path).update(outcome(1))
    file = table_file("mla_attention", "h100", tmp_path)
    file.write_text(file.read_text().replace('"keys": 32', '"keys": 48'))
    made = tables(tmp_path)
    made.update(outcome(32))
    assert rows(tmp_path).keys() == {32}
    assert "48" not in file.read_text() and "none of its space's candidates" in made.dropped[0]


def test_a_malformed_table_is_refused_before_anything_is_searched(tmp_path):
    file = table_file("mla_attention", "h100", tmp_path)
    file.parent.mkdir(parents=True)
    file.write_text("[{}]")
    with pytest.raises(AskError, match="row 0 has not the fields of a row"):
        tables(tmp_path)


def test_the_report_tells_everything(capsys):
    report = Report()
    lost = Tally(5, {(16, 2, 1): "3 of 4 elements differ"}, num_left=7)
    lost.unfit["more shared memory than there is"] = 2
    report.add(dataclasses.replace(outcome(32), tally=lost))
    report.add(outcome(8, 0.99))
    report.add(outcome(32, 1.2, problem="slower here, dropped", is_second_look=True))
    assert report.close((), ["dropped a row"]) == 0
    out, err = capsys.readouterr()
    head, won, none, dropped, sums = out.splitlines()
    assert head == "mla_attention, decode: keys/warps/stages"
    assert won.split() == ["decode_32", "64/4/3", "1000000.0", "32/8/2", "500000.0", "100.0%", "a", "row"]
    assert none.endswith("1.0%") and dropped.endswith("slower here, dropped")
    assert sums == "5 tiles tried; 2 not: more shared memory than there is; 7 left out when time was up"
    assert err.splitlines() == ["mla_attention, decode_32, decode with 16/2/1: 3 of 4 elements differ", "dropped a row"]

    report.add(outcome(1, None, problem="the heuristic's tile: 3 of 4 elements differ"))
    assert report.close((), ()) == 1
    assert "mla_attention, decode_1, decode: the heuristic's tile: 3 of 4" in capsys.readouterr().err
    assert Report().close(["rms_norm: no launch asks for a tile"], ()) == 1


def test_without_a_gpu_there_is_nothing_to_measure(capsys, monkeypatch):
    monkeypatch.setattr("deepserve.tune.run.this_machine", this_cpu)
    with pytest.raises(AskError, match="needs a GPU") as refused:
        run(["mla_attention"])
    assert refused.value.field == "tune" and "deepserve ops --compile" in refused.value.hint
    assert main(["tune"]) == 2
    assert "hint: run it where the engine is to run" in capsys.readouterr().err


def test_what_is_tuned():
    live = {"mla_attention": ["a", "b"], "hadamard": ["c"], "rms_norm": ["d"]}
    assert cases_of([], live) == {"mla_attention": ["a", "b"], "rms_norm": ["d"]}
    assert cases_of(["mla_attention"], live) == {"mla_attention": ["a", "b"]}
    benched = cases_of([], None)
    assert benched.keys() == {"moe_experts", "mla_attention", "gqa_attention"}
    assert "decode_32_4096" in {case.name for case in benched["mla_attention"]}
    assert all(case.bench for cases in benched.values() for case in cases)
    assert list(cases_of(["moe_experts_add_rms_norm"], None)) == ["moe_experts_add_rms_norm"]
    for ops, recorded, hint in ((["mla"], None, "mla_attention"), (["rope"], live, "recorded: mla_attention")):
        with pytest.raises(AskError) as refused:
            cases_of(ops, recorded)
        assert refused.value.field == "ops" and hint in refused.value.hint
    assert "hadamard" in inventory()
    with pytest.raises(AskError, match="there is no op 'hadamard' in Triton"):
        cases_of(["hadamard"], None)


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(AskError, match="no recorded run"):
        recorded_cases(str(tmp_path))

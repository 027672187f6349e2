"""Tiles of launchers: the heuristic's, a table's, a forced one; and which tables are refused."""

import dataclasses
import json

import pytest

from deepserve.errors import AskError
from deepserve.hardware import TABLE, gpu_name
from deepserve.ops import tiles
from deepserve.ops.inventory import ROOMS, inventory
from deepserve.ops.launch import CHIPS, Chip
from deepserve.ops.mla_attention.tiles import DECODE
from deepserve.ops.tiles import Row, forced, noted, read_table, spaces_of, tuned, write_rows
from deepserve.tune.search import GAIN

H100 = dataclasses.replace(CHIPS["sm_90"], gpu="h100")
SHAPE = {"heads": 16, "entry": 576, "element_bytes": 2}
HEURISTIC, BETTER = (64, 4, 3), (32, 8, 2)
TABLES = sorted(ROOMS.glob("*/tuned/*.json"))


def named(tile):
    return dict(zip(DECODE.tile, tile))


ROW = Row(
    "decode", {**SHAPE, "requests": 32}, named(BETTER), 80.0, named(HEURISTIC), 100.0, "decode_32", "2026-01-02",
    torch="2.11.0", triton="3.6.0",
)  # fmt: skip


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Where the room's table is, in this test."""
    file = tmp_path / "mla_attention" / "tuned" / "h100.json"
    monkeypatch.setattr(tiles, "table_file", lambda op_name, gpu: file.with_stem(gpu))
    tuned.cache_clear()
    yield file
    tuned.cache_clear()


def choose(requests, chip=H100):
    return DECODE.choose(chip, HEURISTIC, **SHAPE, requests=requests)


def test_without_a_table_the_heuristic_decides(table):
    assert choose(32) == HEURISTIC


def test_a_row_is_found_by_its_key_alone(table):
    write_rows(table, [ROW])
    assert [choose(requests) for requests in (16, 17, 31, 32, 33)] == [HEURISTIC, BETTER, BETTER, BETTER, HEURISTIC]
    assert DECODE.choose(H100, HEURISTIC, **{**SHAPE, "heads": 8}, requests=32) == HEURISTIC
    assert choose(32, dataclasses.replace(H100, gpu="h200")) == HEURISTIC
    assert choose(32, CHIPS["sm_90"]) == HEURISTIC  # no GPU is here, and none is meant by name


def test_the_table_is_read_once(table):
    write_rows(table, [ROW])
    assert choose(32) == BETTER
    table.unlink()
    assert choose(32) == BETTER


def test_forced_rows_are_all_there_are(table):
    write_rows(table, [ROW])
    place = ("mla_attention", "decode", (16, 576, 2, 8))
    with forced({place: (16, 2, 1)}):
        assert (choose(8), choose(32)) == ((16, 2, 1), HEURISTIC)
        with forced({}):
            assert choose(8) == HEURISTIC
        assert choose(8) == (16, 2, 1)
    assert (choose(8), choose(32)) == (HEURISTIC, BETTER)


def test_questions_are_noted_with_their_answers(table):
    with noted() as outer:
        choose(3)
        with noted() as inner, forced({("mla_attention", "decode", (16, 576, 2, 4)): BETTER}):
            choose(3)
        choose(1)
    assert [(asked.key["requests"], asked.default, asked.tile) for asked in outer] == [
        (4, HEURISTIC, HEURISTIC), (4, HEURISTIC, BETTER), (1, HEURISTIC, HEURISTIC)
    ]  # fmt: skip
    assert inner == outer[1:2]
    assert outer[0].key == {**SHAPE, "requests": 4}
    choose(1)
    assert len(outer) == 3


def changed(**fields):
    return {**dataclasses.asdict(ROW), **fields}


@pytest.mark.parametrize(
    "text, message, hint",
    [
        ("{", "not valid JSON", "deepserve tune mla_attention"),
        ("{}", "holds a dict", "deepserve tune mla_attention"),
        ([[]], "row 0 has not the fields", "space, key, tile"),
        ([changed(), changed(speed=3)], "row 1 has not the fields", "space, key, tile"),
        ([changed(key={**ROW.key, "heads": 16.0})], "row 0 has in key what is no integer", "an object"),
        ([changed(tile=[64, 4, 3])], "row 0 has in tile what is no integer", "an object"),
        ([changed(tile={**ROW.tile, "warps": -1})], "row 0 has in tile what is no integer", "an object"),
        ([changed(microseconds="fast")], "row 0 has no positive number in microseconds", "deepserve tune"),
        ([changed(date=2026)], "row 0 has no text in date", "deepserve tune"),
        ([changed(space="decoding")], "row 0 names no space of mla_attention: 'decoding'", "did you mean decode"),
        ([changed(key=SHAPE)], "row 0 has a key of heads, entry, element_bytes", "element_bytes, requests"),
        ([changed(tile={"keys": 64})], "row 0 has a tile of keys", "a tile of keys, warps, stages"),
        ([changed(key={**ROW.key, "requests": 20})], "a key that no shape has: requests 20", "a power of two"),
        ([changed(tile={**ROW.tile, "keys": 48})], "row 0 has a tile that is none", "deepserve tune mla_attention"),
        ([changed(tile=named((128, 4, 4)))], "row 0 has a tile that is none", "deepserve tune mla_attention"),
        ([changed(), changed(microseconds=3.0)], "row 1 has the key of another row", "leave one"),
    ],
)
def test_what_is_no_table_is_refused_at_load(table, text, message, hint):
    table.parent.mkdir(parents=True)
    table.write_text(text if isinstance(text, str) else json.dumps(text))
    with pytest.raises(AskError) as refused:
        choose(1)
    assert message in refused.value.message
    assert refused.value.field == str(table)
    assert hint in refused.value.hint


def test_a_file_has_a_line_a_row_in_order(tmp_path):
    file = tmp_path / "h100.json"
    rows = [dataclasses.replace(ROW, key={**ROW.key, "requests": requests}) for requests in (32, 4, 16)]
    write_rows(file, rows)
    lines = file.read_text().splitlines()
    assert [json.loads(line.rstrip(","))["key"]["requests"] for line in lines[1:-1]] == [4, 16, 32]
    assert read_table("mla_attention", H100, file).keys() == {
        ("mla_attention", "decode", (16, 576, 2, requests)) for requests in (4, 16, 32)
    }
    write_rows(file, [])
    assert not file.exists()


def test_rooms_name_themselves_in_their_spaces():
    found = {name: spaces_of(name) for name in inventory()}
    assert found["moe_experts"].keys() == {"gate_up", "down"}
    assert found["mla_attention"].keys() == found["gqa_attention"].keys() == {"decode", "prefill"}
    assert found["rms_norm"] == {}
    assert all(space.op == name for name, spaces in found.items() for space in spaces.values())


@pytest.mark.parametrize("target", CHIPS)
def test_candidates_are_a_few_that_fit(target):
    keys = {
        ("moe_experts", "gate_up"): {"hidden": 2048, "width": 1408, "element_bytes": 2, "rows": 8, "experts": 64},
        ("mla_attention", "decode"): {**SHAPE, "requests": 32},
        ("gqa_attention", "prefill"): {"heads": 32, "kv_heads": 8, "dim": 128, "element_bytes": 2, "queries": 1024},
    }
    for (op_name, name), key in keys.items():
        space = spaces_of(op_name)[name]
        assert set(key) == set(space.key)
        found = list(space.candidates(CHIPS[target], key))
        assert 10 < len(found) == len(set(found)) < 500
        assert all(len(tile) == len(space.tile) for tile in found)
        smaller = Chip(CHIPS[target].is_amd, 1, CHIPS[target].shared_bytes // 4)
        assert set(space.candidates(smaller, key)) < set(found)


def test_a_gpu_is_called_by_its_key():
    names = {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200", "NVIDIA H20": "nvidia-h20"}
    assert {name: gpu_name(name, "sm_90") for name in names} == names
    assert gpu_name("AMD Instinct MI300X", "gfx942") == "mi300x"
    assert gpu_name("AMD Instinct MI355X OAM", "gfx950") == "mi355x"


@pytest.mark.parametrize("file", TABLES, ids=lambda file: f"{file.parent.parent.name}-{file.stem}")
def test_every_shipped_table_fits_its_room(file):
    op_name = file.parent.parent.name
    rows = tiles.read_rows(file)
    assert rows
    assert all(row.heuristic_microseconds > GAIN * row.microseconds for row in rows)
    assert file.stem in TABLE, "a device that hardware.py knows"
    chip = dataclasses.replace(CHIPS[TABLE[file.stem].arch], gpu=file.stem)
    assert len(read_table(op_name, chip, file)) == len(rows)

import csv
import gc
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastgpt.bench import measure, timing
from fastgpt.bench.environment import machine_name
from fastgpt.bench.kernels import KERNELS, Where
from fastgpt.bench.measure import OURS
from fastgpt.bench.table import BEGIN, END
from fastgpt.bench.timing import Call, interleave, peak_bytes

QUICK = ["bench", "kernels", "--quick", "--device", "cpu"]


@pytest.fixture(scope="module")
def results(measured_by):
    """A folder with layer_norm's results, and what the command printed."""
    return measured_by(*QUICK, "--op", "layer_norm")


def test_the_table_fits_a_terminal_of_100_columns(results):
    _, text = results
    lines = [line.rstrip() for line in text.splitlines()]
    start, end = (next(i for i, line in enumerate(lines) if word in line) for word in ("spread", "saved "))
    assert max(len(line) for line in lines[:end]) <= 100
    assert "…" not in text
    assert re.search(r"64 x 96 +forward +[\d.]+ us", text)
    assert lines[start].split()[:4] == ["shape", "pass", "time", "spread"]
    assert lines[start].split()[-3:] == ["rate", "roof", "MiB"]


def test_csv_and_json_hold_the_same_consistent_figures(results):
    out, _ = results
    assert {path.name for path in (out / "here").iterdir()} == {f"layer_norm.{kind}" for kind in ("csv", "json", "png")}
    assert (out / "here" / "layer_norm.png").read_bytes().startswith(b"\x89PNG")
    with open(out / "here" / "layer_norm.csv") as file:
        table = list(csv.DictReader(file))
    content = json.loads((out / "here" / "layer_norm.json").read_text())
    assert content["environment"]["torch"] == torch.__version__
    assert content["machine"] == "here"
    assert {row["direction"] for row in content["rows"]} == {"forward", "backward", "both"}
    assert {row["contender"] for row in content["rows"]} == {OURS, "reference", "F.layer_norm"}
    for row, line in zip(content["rows"], table, strict=True):
        assert float(line["median_ms"]) == row["median_ms"]
        assert 0 < row["min_ms"] <= row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] <= row["max_ms"]
        assert row["rounds"] >= 7
        assert row["roofline"] > 0
        ours = next(r for r in content["rows"] if r["contender"] == OURS and r["direction"] == row["direction"])
        # a median of the rounds' ratios: within what the extremes of both allow, and 1 for itself
        assert row["min_ms"] / ours["max_ms"] <= row["ratio"] <= row["max_ms"] / ours["min_ms"]
        assert row["contender"] != OURS or row["ratio"] == 1
        moved = {"forward": 2, "backward": 3, "both": 5}[row["direction"]] * 64 * 96 * 4
        assert row["gb_per_s"] == pytest.approx(moved / row["median_ms"] / 1e6, rel=0.1)


def test_what_cannot_be_measured_is_one_line(refused, monkeypatch, tmp_path):
    assert "--op fly is no op: take layer_norm, " in refused("bench", "kernels", "--op", "fly")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "sees no GPU" in refused("bench", "kernels", "--device", "cuda")
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(*QUICK, "--out", tmp_path / "file")


@pytest.mark.parametrize("op", KERNELS)
def test_contenders_compute_the_same(op):
    seen = 0
    for case in KERNELS[op](Where("cpu", torch.float32, "quick")):
        for contender in case.library:
            if contender.args is not None or not case.args:
                continue  # has weights of its own, or leaves the adapter out on purpose; or changes its arguments
            for want, got in zip(_tensors(case.reference(*case.args)), _tensors(contender.fn(*case.args)), strict=True):
                torch.testing.assert_close(got, want)
        for want, got in zip(_tensors(case.reference(*case.args)), _tensors(case.ours(*case.args)), strict=True):
            torch.testing.assert_close(got, want)
        seen += 1
        assert case.target
        assert all(work.bytes + work.flops > 0 for work in case.passes.values())
    assert seen


def _tensors(y):
    return [] if y is None else [y] if isinstance(y, Tensor) else list(y)


@pytest.mark.usefixtures("little_garbage")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("op", KERNELS)
def test_every_op_can_be_measured(op, device):
    result = measure.measure(op, device, quick=True, machine="here", say=lambda _: None)
    assert any(row.headline for row in result.rows)
    if device == "cpu":  # on a GPU SDPA's kernels may refuse a shape
        assert not any("left out at" in note for note in result.notes), result.notes


def test_only_the_call_is_timed_and_in_turn(monkeypatch):
    now, order = [0.0], []

    def spend(name, seconds):
        order.append(name)
        now[0] += seconds

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    calls = {
        "a": Call(lambda _: spend("a", 0.25), prepare=lambda: spend("prepare", 1.0)),
        "b": Call(lambda _: spend("b", 0.5)),
    }
    timed = interleave(calls, "cpu", seconds=5.0)
    assert set(timed["a"].seconds) == {0.25}
    assert set(timed["b"].seconds) == {0.5}
    assert len(timed["a"].seconds) == len(timed["b"].seconds) == 7
    called = [name for name in order if name != "prepare"][4:]  # two each at first
    rounds = {tuple(called[i : i + 2]) for i in range(0, len(called), 2)}
    assert rounds == {("a", "b"), ("b", "a")}


def test_a_short_call_is_timed_after_some_that_are_not(monkeypatch):
    now, calls = [0.0], []

    def spend(_):
        calls.append(1e-3 if len(calls) > 4 else 2e-3)
        now[0] += calls[-1]

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    clock = timing._CpuClock(Call(spend))
    assert clock.warming * 2e-3 >= timing.WARMING
    assert len(calls) == 2
    assert clock.sample() == pytest.approx(1e-3)
    assert len(calls) == 2 + clock.warming + 1
    assert gc.isenabled()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_sees_what_is_freed_within_the_call():
    def call(_):
        temporary = torch.ones(24 << 20, dtype=torch.uint8)
        return temporary[: 8 << 20].clone()

    assert peak_bytes(Call(call), "cpu") == pytest.approx(32 << 20, rel=0.05)


def test_machine_names(monkeypatch):
    from fastgpt.bench import environment

    names = {
        "Intel(R) Xeon(R) Processor": "intel-xeon-2-cores",
        "AMD EPYC 9B14 96-Core Processor": "amd-epyc-9b14-2-cores",
        "Intel(R) Core(TM) i7-8550U CPU @ 1.80GHz": "intel-core-i7-8550u-2-cores",
    }
    monkeypatch.setattr(environment, "cpus", lambda: 2)
    for name, folder in names.items():
        monkeypatch.setattr(environment, "device_name", lambda _, name=name: name)
        assert machine_name("cpu") == folder
    monkeypatch.setattr(environment, "device_name", lambda _: "NVIDIA H200")
    assert machine_name("cuda") == "nvidia-h200"


def test_the_readme_table_is_made_from_results(results, tmp_path, cli, refused):
    out, _ = results
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    code, text, err = cli("bench", "table", "--results", out, "--readme", readme)
    assert code == 0, err
    assert "from 1 results" in text
    lines = readme.read_text().splitlines()
    assert (lines[0], lines[1], lines[-2], lines[-1]) == ("before", BEGIN, END, "after")
    rows = [line.strip("|").split(" | ") for line in lines if line.startswith("| `layer_norm`")]
    row = next(r for r in json.loads((out / "here" / "layer_norm.json").read_text())["rows"] if r["contender"] == OURS)
    assert [cell.strip() for cell in rows[0][:4]] == ["`layer_norm`", "64 x 96, fp32", "here", "forward"]
    assert float(rows[0][4].split()[0]) == pytest.approx(row["median_ms"] * 1e3, rel=0.01)
    assert [r[3] for r in rows] == ["forward", "backward"]
    assert any(line.startswith("here: ") and f"torch {torch.__version__}" in line for line in lines)
    assert any(line.startswith("cuda: not measured yet") for line in lines)
    assert "old" not in lines
    assert cli("bench", "table", "--results", out, "--readme", readme)[0] == 0
    assert readme.read_text().splitlines() == lines

    ours = (Path(__file__).parents[2] / "README.md").read_text()
    assert ours.count(BEGIN) == ours.count(END) == 1

    readme.write_text("nothing to fill in\n")
    assert "must have the lines" in refused("bench", "table", "--results", out, "--readme", readme)
    assert "has no results" in refused("bench", "table", "--results", tmp_path, "--readme", readme)
    assert "is no file" in refused("bench", "table", "--results", out, "--readme", tmp_path / "NONE.md")
    (tmp_path / "other.json").write_text('{"checks": []}')
    assert "has no results" in refused("bench", "table", "--results", tmp_path, "--readme", readme)
    (tmp_path / "old.json").write_text('{"op": "layer_norm", "rows": []}')
    assert "measure it again" in refused("bench", "table", "--results", tmp_path, "--readme", readme)

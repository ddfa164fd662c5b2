"""The programs run, on the smallest settings, and write what they say they write."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from . import neighbours, report, scaling, threads, time_to_accuracy, turns
from .peers import PEERS, missing
from .workloads import WORKLOADS


@pytest.mark.parametrize("name", PEERS)
def test_parameters_are_those_that_were_given(name: str) -> None:
    if name != "fastmb" and (why := missing(PEERS[name])):
        pytest.skip(why)
    work = WORKLOADS["small"]
    expected = [array for pair in work.weights() for array in pair]
    for found, array in zip(PEERS[name](work).parameters(), expected, strict=True):
        np.testing.assert_allclose(found, array, rtol=1e-6)


def test_time_to_accuracy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("threadpoolctl")
    out, figures = tmp_path / "curves.png", tmp_path / "curves.json"
    options = ["--peers", "fastmb", "--budget", "2", "--seeds", "2", "--epochs", "3", "--threads", "1"]
    time_to_accuracy.main([*options, "--out", str(out), "--json", str(figures)])
    assert "### 97% of digits: 1438 images, network 64-128-10" in capsys.readouterr().out
    assert out.read_bytes().startswith(b"\x89PNG")
    curves: list[dict[str, Any]] = json.loads(figures.read_text())["results"]["digits"]["fastmb"]
    assert len(curves) == 2
    assert all(len(curve["seconds"]) == len(curve["accuracy"]) <= 3 for curve in curves)
    assert max(curves[0]["accuracy"]) > 0.5


def test_settings_to_try_begin_in_the_middle_and_are_all_there() -> None:
    tried = time_to_accuracy.settings((1, 2, 3), (0.1, 0.2, 0.3))
    assert tried[0] == (2, 0.2)
    assert sorted(tried) == [(batch, lr) for batch in (1, 2, 3) for lr in (0.1, 0.2, 0.3)]


def test_the_start_up_is_told_apart() -> None:
    curve = time_to_accuracy.Curve("jax", (32, 0.1), {}, [5.0, 1.0, 1.0], [0.1, 0.2, 0.3], True)
    assert (curve.start_up, curve.cost) == (4.0, 3.0)
    curve.reached = False
    assert curve.cost == float("inf")


def test_scaling(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    for axis, (values, make) in scaling.AXES.items():
        monkeypatch.setitem(scaling.AXES, axis, (values[:2], make))
    out, figures = tmp_path / "panels.png", tmp_path / "panels.json"
    options = ["--rounds", "1", "--seconds", "0.001", "--threads", "1"]
    scaling.main([*options, "--out", str(out), "--json", str(figures)])
    assert capsys.readouterr().out.count("###") == 4
    assert out.read_bytes().startswith(b"\x89PNG")
    results = json.loads(figures.read_text())["results"]
    assert [len(points) for points in results.values()] == [2, 2, 2, 2]


def test_the_model_says_that_it_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    scaling.main(["--model", "--workloads", "tiny", "--rounds", "1", "--seconds", "0.01"])
    assert "MODEL, not measured" in capsys.readouterr().out


def test_more_cores_are_never_modelled_slower() -> None:
    machine = scaling.Machine(0.3e-6, 1e10, 2, 1.5e10)
    for name in scaling.MODELLED:
        alone = WORKLOADS[name].flops / 8e10
        times = [scaling.modelled(WORKLOADS[name], alone, machine, cores)[0] for cores in (1, 2, 8, 32, 64)]
        assert times == sorted(times, reverse=True)
        assert times[-1] >= alone / 64


def test_threads(capsys: pytest.CaptureFixture[str]) -> None:
    threads.main(["4-8-2", "tiny", "--rounds", "1", "--seconds", "0.001", "--max-threads", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[-2:]] == ["| 4-8-2", "| tiny"]
    assert lines[-1].endswith("% |")


def result(case: str, seconds: dict[str, float], work: float | None = 1e6) -> dict[str, Any]:
    """What `turns.in_turn` notes."""
    return {
        "case": case,
        "shape": "8-8",
        "dtype": "float32",
        "threads": 2,
        "work": work,
        "unit": "GFLOP/s" if work else None,
        "peak": 200.0 if work else None,
        "contenders": {
            name: {
                "seconds": taken,
                "fastest": taken / 2,
                "slowest": taken * 2,
                "rate": 1e-9 * work / taken if work else None,
                "share": 1e-9 * work / taken / 200 if work else None,
                "error": 1e-7,
                "how": {},
            }
            for name, taken in seconds.items()
        },
        "left_out": ["torch left out: No module named 'torch'"],
        "isa": "v3",
        "processor": "a processor, 2 cores",
        "environment": {"OMP_NUM_THREADS": "1"},
        "versions": {"numpy": "2.0"},
    }


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    suites = {
        "steps": [result("one", {"fastmb": 1e-5, "jax": 2e-5}), result("two", {"fastmb": 4e-5, "numpy": 2e-5})],
        "import": [result("import", {"fastmb": 0.2, "numpy": 0.15, "jax": 0.35}, work=None)],
        "callbacks": [result("schedule", {"fastmb": 1.01e-4, "plain step": 1e-4})],
    }
    suites["import"][0]["baseline"] = {"name": "numpy", "ratio": 4 / 3, "asked": None}
    suites["callbacks"][0]["baseline"] = {"name": "plain step", "ratio": 1.01, "asked": 1.02}
    entries = [{"group": group, "extra_info": info} for group, infos in suites.items() for info in infos]
    size = {"wheel_bytes": 1e6, "installed_bytes": {"fastmb": 2e6}, "versions": {}, "environment": {}}
    entries += [{"group": "size", "extra_info": size}, {"group": "somebody else's", "extra_info": {}}]
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"benchmarks": entries}))
    report.main([str(file), "--out", str(tmp_path / "out")])
    text = capsys.readouterr().out
    assert (tmp_path / "out/report.md").read_text().strip() == text.strip()
    row = "| one | 8-8 | float32 | 2 | **10 us** (5 us to 20 us) | 20 us | - | 100 GFLOP/s | 50% |"
    assert row + " fastmb 1.0e-07, jax 1.0e-07 | 2.00 (jax) |" in text
    assert "A peer is faster in: two." in text
    assert text.count("No peer is faster.") == 1  # of the import; beside callbacks there is none
    assert "| numpy +33.3%: fastmb 50 ms, jax 200 ms | 1.75 (jax) |" in text
    assert "| plain step +1.0% (+2%) |" in text
    assert "Missing: torch left out: No module named 'torch'." in text
    assert "NOTE: OMP_NUM_THREADS=1 was set" in text
    assert "fastmb's wheel: 1.00 MB" in text
    for plot in ("share", "times"):
        drawn = (tmp_path / f"out/{plot}.svg").read_text()
        assert f"![{plot}]({plot}.svg)" in text
        assert "steps" in drawn
        assert len(drawn) < 60_000


class Benchmark:
    """pytest-benchmark's fixture, as far as it is used here."""

    disabled = False

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=[]))

    def pedantic(self, run: Any, args: Any, setup: Any, rounds: int) -> None:
        for _ in range(rounds):
            setup()
            self.stats.stats.data.append(turns.seconds_of(run, *args))


def test_a_turn_tells_the_ratio_to_the_baseline() -> None:
    benchmark = Benchmark()
    calls = {
        "fastmb": turns.Contender(turns.looped(partial(time.sleep, 0.004)), units=2),
        "plain": turns.Contender(turns.looped(partial(time.sleep, 0.001))),
    }
    turns.in_turn(
        benchmark,
        calls,
        case="a nap",
        shape="-",
        dtype="float32",
        threads=1,
        baseline="plain",
        asked=1.5,
        rounds=3,
        seconds=0.02,
        settle=False,
    )
    assert benchmark.extra_info["baseline"]["ratio"] == pytest.approx(2, rel=0.6)
    assert len(benchmark.stats.stats.data) == 3
    assert report.best_peer(benchmark.extra_info) is None


def test_fastest_picks_the_way_that_is_done_soonest() -> None:
    slow, fast = (turns.Contender(turns.looped(partial(time.sleep, s)), how={"s": s}) for s in (0.01, 0.0001))
    assert turns.fastest([slow, fast], 0.02).how == {"s": 0.0001}


def test_report_of_nothing_says_so(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_text('{"benchmarks": []}')
    with pytest.raises(SystemExit, match="no result that this program can read"):
        report.main([str(file), "--out", str(tmp_path)])


def test_neighbours(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("threadpoolctl")
    neighbours.main(["tiny", "--seconds", "0.02", "--rounds", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert "a busy process a core" in lines[-3]
    assert lines[-1].startswith("| tiny | ")

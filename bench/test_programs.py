"""The programs run, on the smallest settings, and write what they say they write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from . import scaling, threads, time_to_accuracy
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

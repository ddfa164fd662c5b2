"""`python -m fastmb`, and what it shows of the installation."""

from __future__ import annotations

import gzip
import struct
import subprocess
import sys

import numpy as np
import pytest

import fastmb
from fastmb import _config, _version
from fastmb.__main__ import main


def report(text: str) -> dict[str, str]:
    return {line.split("  ")[0]: line.split("  ", 1)[1].strip() for line in text.splitlines()}


def test_the_digits_are_learnt(executor, capsys):
    # The reference is slow: a smaller network, fewer epochs.
    options, least, network = [], 0.97, "64-256-256-10"
    if executor == "numpy":
        options, least, network = ["--epochs", "20", "--hidden", "128"], 0.95, "64-128-10"
    assert main(["--executor", executor, "--min-accuracy", str(least), *options]) == 0
    out, error = capsys.readouterr()
    found = report(out)
    assert float(found["test accuracy"]) >= least
    assert found["network"] == network + ", float32, batches of 32"
    assert found["seed"] == "0"
    assert int(found["examples a second"].replace(" ", "")) > 0
    assert float(found["GFLOP/s"].split()[0]) > 0
    if executor == "native":
        assert found["threads"].isdigit()
        assert found["instruction set"] in ("v2", "v3", "v4")
    epochs = options[1] if options else "60"
    assert f"{epochs}.0/{epochs} epochs" in error


def test_options_are_obeyed(executor, capsys):
    network = ["--hidden", "20", "30", "--seed", "7", "--dtype", "float64"]
    options = ["--epochs", "2", "--batch-size", "100", "--lr", "0.01", "--threads", "1", "--quiet", *network]
    assert main([*options, "--executor", executor]) == 0
    out, error = capsys.readouterr()
    found = report(out)
    assert found["network"] == "64-20-30-10, float64, batches of 100"
    assert found["training"].startswith("2 epochs, 30 steps, ")
    assert found["seed"] == "7"
    assert error == ""
    assert main([*options, "--executor", executor]) == 0
    assert report(capsys.readouterr().out)["test accuracy"] == found["test accuracy"]


def test_an_accuracy_below_the_demand_is_a_failure(executor, capsys):
    assert main(["--executor", executor, "--epochs", "1", "--quiet", "--min-accuracy", "1"]) == 1
    assert "is below --min-accuracy 1" in capsys.readouterr().err


def test_fashion_mnist_is_read_from_its_directory(executor, capsys, tmp_path):
    for part, n in ("train", 200), ("t10k", 50):
        labels = (np.arange(n) % 10).astype(np.uint8)
        images = np.repeat(labels * 25, 784).astype(np.uint8)
        image_file = bytes([0, 0, 8, 3]) + struct.pack(">3I", n, 28, 28) + images.tobytes()
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(image_file))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(
            bytes([0, 0, 8, 1]) + struct.pack(">I", n) + labels.tobytes()
        )
    assert main(["--executor", executor, "--fashion-mnist", str(tmp_path), "--epochs", "1", "--quiet"]) == 0
    found = report(capsys.readouterr().out)
    assert found["data"] == "Fashion-MNIST: 200 to train on, 50 to test"
    assert found["network"] == "784-128-10, float32, batches of 64"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "argument --epochs: must be an integer >= 1; got '0'"),
        (["--batch-size", "x"], "argument --batch-size: must be an integer >= 1; got 'x'"),
        (["--seed", "-1"], "seed must be an integer from 0 to"),
        (["--lr", "-1"], "lr must be a number in [0, inf); got -1.0"),
        (["--fashion-mnist", "/nonexistent"], "neither train-images-idx3-ubyte nor train-images-idx3-ubyte.gz is in"),
        (["--executor", "gpu"], "argument --executor: invalid choice: 'gpu'"),
    ],
)
def test_wrong_arguments_end_with_one_line_and_no_traceback(arguments, message, capsys, executors_here):
    with pytest.raises(SystemExit) as ended:
        main(["--executor", executors_here[0], *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_help_and_info_run_as_commands():
    run = subprocess.run([sys.executable, "-m", "fastmb", "--help"], capture_output=True, text=True, check=True)
    for option in "info", "--fashion-mnist", "--epochs", "--min-accuracy", "--executor", "--dtype", "--threads":
        assert option in run.stdout
    run = subprocess.run([sys.executable, "-m", "fastmb", "info"], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[0].split() == ["fastmb", fastmb.__version__]


def test_the_configuration_says_what_is_there(executors_here):
    config = fastmb.show_config()
    assert config["fastmb"] == fastmb.__version__ == _version.__version__
    assert config["NumPy"] == np.__version__
    assert config["executor"].split(",")[0] == executors_here[0]
    assert repr(config).count("\n") == len(config) - 1
    assert str(config) == repr(config)


def test_the_configuration_does_without_the_extension(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastmb.executors.native", None)
    monkeypatch.setattr(_config, "default_name", lambda: "numpy")
    config = _config.show_config()
    assert config["executor"].startswith("numpy, the slow reference")
    assert config["extension"].startswith("left out (FASTMB_PURE=1")
    monkeypatch.setattr(_config, "default_name", lambda: "numba")
    config = _config.show_config()
    assert config["executor"] == "numba"
    assert config["compiler"].startswith("Numba ")


def test_the_configuration_names_instruction_sets_and_threads(monkeypatch):
    from fastmb.executors import native

    config = _config.show_config()
    assert config["instruction set"].startswith(f"{native.isa()} of ")
    assert config["threads"].startswith("at most ")
    monkeypatch.setenv("FASTMB_ISA", "v2")
    assert "(FASTMB_ISA); no fused multiply-add: results differ" in _config.show_config()["instruction set"]


def test_what_goes_wrong_is_a_message(capsys):
    assert main(["--lr", "1e30", "--epochs", "1", "--quiet"]) == 1
    assert "loss became" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--min-accuracy", "nan"])
    assert "must be a number from 0 to 1; got 'nan'" in capsys.readouterr().err

"""Every benchmark runs: on a problem so small that its numbers mean nothing, but its table is whole."""

import os
import runpy
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "docs" / "benchmarks"
NAMES = runpy.run_path(str(FOLDER / "run.py"))["NAMES"]
SHARED = {"contest", "sizes", "run"}
PEERS_ENVIRONMENT = {"diffrax_peer"}  # JAX, which is not installed beside the package


@pytest.fixture(autouse=True)
def as_a_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(sys, "argv", ["benchmark", "--tiny"])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # of the other tests
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)


@pytest.mark.parametrize("name", NAMES)
def test_benchmark_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "|---|" in printed or "of bare" in printed or "No CUDA device here" in printed


def test_every_script_is_run_by_make_bench() -> None:
    scripts = {path.stem for path in FOLDER.glob("*.py")}
    assert scripts == {*NAMES} | SHARED | PEERS_ENVIRONMENT


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA device")
@pytest.mark.parametrize("name", ["cuda_graphs", "gpu_adaptive"])
def test_scripts_for_a_gpu_say_that_there_is_none(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert capsys.readouterr().out == "No CUDA device here: nothing was measured.\n"

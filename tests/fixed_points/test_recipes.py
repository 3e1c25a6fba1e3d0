"""The recipes of `notebooks/recipes` run on data of the right shape, for a few iterations of small networks."""

import pickle
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

RECIPES = Path(__file__).parents[2] / "notebooks" / "recipes"
CPU = torch.device("cpu")


def recipe(name: str) -> dict[str, Any]:
    return runpy.run_path(str(RECIPES / f"{name}.py"))


def test_wikitext103(tmp_path: Path) -> None:
    made = recipe("wikitext103")
    rng = np.random.default_rng(0)
    for name in ("train.bin", "val.bin"):
        rng.integers(0, 50, 400, dtype=np.uint16).tofile(tmp_path / name)
    settings = made["Settings"](vocabulary=64, width=16, heads=2, length=12, batch=2, iterations=4, window=2)
    losses = made["train"](tmp_path, settings, CPU)
    assert len(losses) == 4
    assert np.isfinite(losses).all()


def test_wikitext103_has_the_parameters_of_the_paper() -> None:
    made = recipe("wikitext103")
    with torch.device("meta"):
        model = made["LanguageModel"](made["Settings"]())
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(95.9, abs=2.5)


def test_cifar10(tmp_path: Path) -> None:
    made = recipe("cifar10")
    rng = np.random.default_rng(0)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        entry = {b"data": rng.integers(0, 256, (4, 3072), dtype=np.uint8), b"labels": rng.integers(0, 10, 4).tolist()}
        (tmp_path / name).write_bytes(pickle.dumps(entry))
    settings = made["Settings"](channels=(16, 32), widths=(1, 2), steps=(2, 3), batch=10, epochs=1)
    losses = made["train"](tmp_path, settings, CPU)
    assert len(losses) == 2
    assert np.isfinite(losses).all()

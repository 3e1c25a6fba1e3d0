"""The recipes of `notebooks/recipes` run on small real data, for a few iterations of small networks, stopped and resumed."""

import json
import pickle
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "notebooks" / "recipes"
CPU = torch.device("cpu")


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(RECIPES)
    return lambda name: runpy.run_path(str(RECIPES / f"{name}.py"))


def logged(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


WORDS = {"vocabulary": 256, "width": 32, "heads": 2, "length": 24, "batch": 8, "window": 10, "learning_rate": 1e-2}


@pytest.mark.parametrize("bfloat16", [True, False], ids=["bfloat16", "float32"])
def test_wikitext103_learns_a_licence_and_goes_on_where_it_was_stopped(
    recipe: Any, tmp_path: Path, bfloat16: bool
) -> None:
    made, text = recipe("wikitext103"), ROOT / "LICENSE"
    settings = lambda n: made["Settings"](iterations=n, bfloat16=bfloat16, **WORDS)  # noqa: E731
    whole = made["train"](text, tmp_path / "whole", settings(40), CPU)
    parts = [made["train"](text, tmp_path / "parts", settings(n), CPU) for n in (20, 40)]
    assert [len(part) for part in parts] == [20, 20]
    assert parts[0] + parts[1] == whole
    assert logged(tmp_path / "parts") == logged(tmp_path / "whole")
    assert logged(tmp_path / "whole")[-1]["perplexity"] < 32  # of 256 at first; that of its letters' frequencies is 22


def test_wikitext103_takes_tokens(recipe: Any, tmp_path: Path) -> None:
    made, rng = recipe("wikitext103"), np.random.default_rng(0)
    for name in ("train.bin", "val.bin"):
        rng.integers(0, 50, 400, dtype=np.uint16).tofile(tmp_path / name)
    settings = made["Settings"](vocabulary=64, width=16, heads=2, length=12, batch=2, iterations=4, window=2)
    losses = made["train"](tmp_path, tmp_path / "run", settings, CPU)
    assert len(losses) == 4
    assert np.isfinite(losses).all()


def test_wikitext103_has_the_parameters_of_the_paper(recipe: Any) -> None:
    made = recipe("wikitext103")
    with torch.device("meta"):
        model = made["LanguageModel"](made["Settings"]())
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(95.9, abs=2.5)


def write_digits(folder: Path) -> None:
    """The digits of scikit-learn in the files of CIFAR-10: 8x8 pixels of grey made 32x32 of three colours."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    grey = np.kron(digits.images[:, None] * 15.9, np.ones((1, 3, 4, 4))).astype(np.uint8).reshape(-1, 3072)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for name, chosen in zip(names, np.array_split(np.arange(240), 6), strict=True):
        entry = {b"data": grey[chosen], b"labels": digits.target[chosen].tolist()}
        (folder / name).write_bytes(pickle.dumps(entry))


def test_cifar10_learns_digits_and_goes_on_where_it_was_stopped(recipe: Any, tmp_path: Path) -> None:
    write_digits(tmp_path)
    made, small = recipe("cifar10"), {"channels": (16, 16), "widths": (1, 1), "steps": (2, 2), "batch": 20}
    settings = lambda n: made["Settings"](epochs=n, learning_rate=1e-2, **small)  # noqa: E731
    first = made["train"](tmp_path, tmp_path / "run", settings(3), CPU)
    after = made["train"](tmp_path, tmp_path / "run", settings(4), CPU)
    assert (len(first), len(after)) == (30, 10)
    assert [line["epoch"] for line in logged(tmp_path / "run")] == [1, 2, 3, 4]
    assert logged(tmp_path / "run")[-1]["loss"] < 0.97 * logged(tmp_path / "run")[0]["loss"]

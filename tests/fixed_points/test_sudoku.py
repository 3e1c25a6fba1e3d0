"""The puzzles of the notebook on recursive reasoning."""

import random
import runpy
from pathlib import Path
from typing import Any

import pytest

MADE: dict[str, Any] = runpy.run_path(str(Path(__file__).parents[2] / "notebooks" / "sudoku.py"))


def is_solved(grid: Any, size: int) -> bool:
    return all(grid[i] not in {0} | {grid[j] for j in peers} for i, peers in enumerate(MADE["peers"](size)))


@pytest.mark.parametrize(("size", "empty"), [(4, 8), (6, 20)])
def test_puzzles_have_one_solution_in_every_guise(size: int, empty: int) -> None:
    rng = random.Random(0)
    puzzle, solution = MADE["shuffled"](MADE["puzzle"](size, empty, rng), size, rng)
    assert is_solved(solution, size)
    assert 0 < puzzle.count(0) <= empty
    assert all(given in (0, digit) for given, digit in zip(puzzle, solution, strict=True))
    assert MADE["solutions"](list(puzzle), MADE["peers"](size), size, 2, rng) == [list(solution)]


def test_more_than_one_solution_is_found_out() -> None:
    assert len(MADE["solutions"]([0] * 16, MADE["peers"](4), 4, 2, random.Random(0))) == 2

"""Sudoku puzzles with one solution each, made at random: 4x4 with boxes of 2x2, 6x6 with boxes of 2x3, 9x9 with boxes of 3x3.

A grid is a tuple of size * size numbers, row by row, 0 for an empty cell.
"""

import random

BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}  # height and width


def peers(size: int) -> list[set[int]]:
    """For every cell those that share its row, column or box."""
    height, width = BOXES[size]
    rows = [divmod(cell, size) for cell in range(size * size)]
    units = [((0, r), (1, c), (2, r // height, c // width)) for r, c in rows]
    return [{j for j, other in enumerate(units) if j != i and set(unit) & set(other)} for i, unit in enumerate(units)]


def solutions(grid: list[int], neighbours: list[set[int]], size: int, most: int, rng: random.Random) -> list[list[int]]:
    """Up to `most` ways to fill the empty cells, by trying the cell with the fewest candidates first."""
    best: tuple[int, list[int]] | None = None
    for cell, value in enumerate(grid):
        if value == 0:
            taken = {grid[other] for other in neighbours[cell]}
            candidates = [v for v in range(1, size + 1) if v not in taken]
            if best is None or len(candidates) < len(best[1]):
                best = cell, candidates
            if len(candidates) <= 1:
                break
    if best is None:
        return [grid.copy()]
    found: list[list[int]] = []
    cell, candidates = best
    rng.shuffle(candidates)
    for value in candidates:
        grid[cell] = value
        found += solutions(grid, neighbours, size, most - len(found), rng)
        if len(found) >= most:
            break
    grid[cell] = 0
    return found


def puzzle(size: int, most_empty: int, rng: random.Random) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A puzzle and its only solution: cells are emptied in random order, unless that would allow a second solution."""
    neighbours = peers(size)
    (solution,) = solutions([0] * (size * size), neighbours, size, 1, rng)
    grid, empty = solution.copy(), 0
    for cell in rng.sample(range(size * size), size * size):
        if empty == most_empty:
            break
        grid[cell] = 0
        if len(solutions(grid, neighbours, size, 2, rng)) == 1:
            empty += 1
        else:
            grid[cell] = solution[cell]
    return tuple(grid), tuple(solution)


def shuffled(grids: tuple[tuple[int, ...], ...], size: int, rng: random.Random) -> list[tuple[int, ...]]:
    """The same puzzle and solution in another guise: digits renamed; rows within a band, columns within a stack, bands and
    stacks exchanged."""

    def order(group: int) -> list[int]:
        groups = [rng.sample(range(g, g + group), group) for g in range(0, size, group)]
        return [line for lines in rng.sample(groups, len(groups)) for line in lines]

    height, width = BOXES[size]
    rows, columns = order(height), order(width)
    names = [0, *rng.sample(range(1, size + 1), size)]
    return [tuple(names[grid[r * size + c]] for r in rows for c in columns) for grid in grids]

"""The default restarts on the classical problems of the tests: errors over those of the base method, gradients, states stored.

    python docs/benchmarks/restarts.py                    # solutions and states stored
    python docs/benchmarks/restarts.py --held-out         # the same on problems on which no constant was chosen
    python docs/benchmarks/restarts.py --gradients        # and gradients against those of gradient="direct"
    python docs/benchmarks/restarts.py --set LONGEST=64   # with another value of one of the constants of revsolve/restarts
    python docs/benchmarks/restarts.py --cost             # of deciding: a gradient over one with the same restarts, undecided

A failure is an error of more than three times that of the base method plus rounding, where the base method's own is below a
tenth, from the problem's start and from starts a rounding away (in float32, none is on a chaotic orbit after 20 units of time);
or a gradient further from that of direct than 1e-8 (float32: 1e-4) and than that one is from its own in float64.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from revsolve import Restarts, Solution, odeint
from revsolve.core.restart import FixedInterval
from revsolve.restarts import growth, spectrum

sys.path.append(str(Path(__file__).parents[2]))
from tests.held_out import HELD_OUT
from tests.problems import CLASSICAL, Classical

BASES = {"rev_rk4": "rk4", "rev_dopri5": "dopri5", "reversible_heun": "heun2", "alf": "midpoint", "alf4": "rk4"}
CLOSE = {torch.float64: 1e-8, torch.float32: 1e-4}
END = 20.0


def stretched(problem: Classical, num_steps: int) -> Classical:
    """The problem over END units of time, or over its own where no explicit method follows it so far."""
    end = problem.end if problem.name == "heat" or problem.name in HELD_OUT else END
    return dataclasses.replace(problem, end=end, num_steps=num_steps)


def solved(
    problem: Classical, method: str, dtype: torch.dtype, mode: str | None = None, nudged: float = 0.0
) -> tuple[Solution, Tensor | None]:
    y0 = (problem.start(dtype) * (1 + nudged * torch.finfo(dtype).eps)).requires_grad_()
    times, options = problem.times(), {"step_size": problem.step}
    solution = odeint(problem.field, y0, times, method=method, options=options, gradient=mode, full_output=True)
    grad = torch.autograd.grad(solution.ys[1:].square().mean(), y0)[0] if mode else None
    return solution, grad


def error(problem: Classical, method: str, dtype: torch.dtype, nudged: float = 0.0) -> tuple[float, int, int]:
    """The largest error relative to the largest entry of the reference, or of the same entry in problems held out (which may be
    of mixed scales), and the pairs and states stored."""
    try:
        solution, _ = solved(problem, method, dtype, nudged=nudged)
    except RuntimeError:
        return math.inf, 0, 0
    exact = problem.reference()
    size = exact.abs().amax(0) if problem.name in HELD_OUT else exact.abs().max()
    wrong = float(((solution.ys.detach().double() - exact).abs() / size).max())
    wrong = wrong if math.isfinite(wrong) else math.inf
    return wrong, solution.stats.num_restarts + 1, solution.stats.num_stored_states


def rounding(problem: Classical, dtype: torch.dtype) -> float:
    return 30 * torch.finfo(dtype).eps * math.sqrt(problem.num_steps)


def missed(problem: Classical, method: str, dtype: torch.dtype) -> float:
    """How far the gradient lies from that of direct, relative; zero where rounding moves direct's own further."""
    try:
        got, wanted = (solved(problem, method, dtype, mode)[1] for mode in ("reversible", "direct"))
        exact = solved(problem, method, torch.float64, "direct")[1] if dtype is torch.float32 else wanted
    except RuntimeError:
        return math.inf
    assert got is not None and wanted is not None and exact is not None
    if float(wanted.norm()) < torch.finfo(dtype).tiny ** 0.5:  # too small for its own digits
        return 0.0
    distance, own = (float((x.double() - wanted.double()).norm() / wanted.double().norm()) for x in (got, exact))
    return 0.0 if distance <= own else distance


def cases(args: argparse.Namespace) -> Iterator[tuple[str, torch.dtype, int]]:
    for method in args.methods:
        for dtype in (torch.float64, torch.float32):
            for num_steps in args.steps:
                yield method, dtype, num_steps


class After(FixedInterval):
    """Segments that end after given steps."""

    def __init__(self, steps: list[int]) -> None:
        super().__init__(None)
        self.steps = steps

    def foreseen(self, num_steps: int) -> int:
        return next((n for n in self.steps if n > num_steps), sys.maxsize)


@dataclass(frozen=True)
class Recorded(Restarts):
    """The default ones, noted by a first solve; then after the same steps."""

    steps: list[int] = field(default_factory=list)

    def policy(self, scheme: Any, memo: Any) -> Any:
        if self.steps:
            return After(self.steps)
        policy: Any = super().policy(scheme, memo)
        begin = policy.begin
        policy.begin = lambda stepper, y: self.steps.append(stepper.num_steps) or begin(stepper, y)
        return policy


def cost(method: str, num_steps: int, rounds: int, width: int = 64, batch: int = 128) -> float:
    """The share of a training gradient that decisions take: processor time of pairs of solves in turns, the median ratio."""
    torch.manual_seed(0)
    layers = [layer for a, b in itertools.pairwise([width] * 4) for layer in (torch.nn.Linear(a, b), torch.nn.Tanh())]
    net, y0, t = torch.nn.Sequential(*layers[:-1]), torch.randn(batch, width), torch.tensor([0.0, 1.0])
    inputs = (y0.requires_grad_(), *net.parameters())

    def taken(restarts: Any) -> float:
        begun = time.process_time()
        ys = odeint(lambda t, y: net(y), y0, t, method=method, options={"step_size": 1 / num_steps}, restarts=restarts)
        torch.autograd.grad(ys[-1].sum(), inputs)
        return time.process_time() - begun

    same = Recorded()
    taken(same)
    return statistics.median(taken("auto") / taken(same) for _ in range(rounds)) - 1


def costs(methods: list[str], tiny: bool) -> None:
    print("| method | steps | cost of deciding, % of a gradient (width 64, batch 128) |\n|---|---|---|")
    for method in methods:
        for num_steps in (10,) if tiny else (50, 100, 400):
            print(
                f"| {method} | {num_steps} | {100 * cost(method, num_steps, 2 if tiny else 6000 // num_steps):.1f} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=list(BASES))
    parser.add_argument("--steps", nargs="*", type=int, default=[400, 2000, 0], help="0: as the tests have them")
    parser.add_argument("--held-out", action="store_true")
    parser.add_argument("--gradients", action="store_true")
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--set", nargs="*", default=[], help="NAME=VALUE for constants of the policy")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="a few cases, to see that the script runs")
    args = parser.parse_args()
    problems = list((HELD_OUT if args.held_out else CLASSICAL).values())
    if args.tiny:
        args.methods, args.steps, problems = ["rev_rk4"], [100], problems[:3]
    for setting in args.set:
        name, value = setting.split("=")
        for module in (growth, spectrum):
            if hasattr(module, name):
                setattr(module, name, float(value) if "." in value or "e" in value else int(value))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if args.cost or args.tiny:
        costs(args.methods, args.tiny)
    if args.cost:
        return
    print(
        "| method | dtype | steps | cases | worst ratio | failures | median pairs | most | states over 4 sqrt(N) + 16 |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for method, dtype, num_steps in cases(args):
        ratios, pairs, over, failures = [], [], 0, []
        for problem in problems:
            problem = stretched(problem, num_steps) if num_steps else problem
            base = max(error(problem, BASES[method], dtype, nudged)[0] for nudged in (-1, 0, 1))
            if not base < 0.1:
                continue
            own, num_pairs, num_states = error(problem, method, dtype)
            ratio = own / max(base, rounding(problem, dtype))
            ratios.append(ratio)
            pairs.append(num_pairs)
            over += num_states > 4 * math.sqrt(problem.num_steps) + 16
            if args.verbose:
                print(f"{method} {problem.name} {num_steps} ratio {ratio:.2f} pairs {num_pairs}", file=sys.stderr)
            failures += [f"{problem.name} {ratio:.1f}x"] if not ratio <= 3 else []
            if args.gradients:
                distance = missed(problem, method, dtype)
                failures += [f"{problem.name} gradient {distance:.0e}"] if not distance <= CLOSE[dtype] else []
        kind = str(dtype).removeprefix("torch.")
        row = (method, kind, num_steps or "own", len(ratios), f"{max(ratios):.2f}", ", ".join(failures) or "none")
        row += (statistics.median(pairs), max(pairs), over)
        print("|", " | ".join(map(str, row)), "|", flush=True)


if __name__ == "__main__":
    main()

"""Fixed steps: a grid that is known before the first of them is taken."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor

from revsolve.core.coupling import State
from revsolve.core.stepper import Grid, Step

LONGEST_RUN = 64  # steps: what each of them keeps until the end of its run is bounded so


class FixedGrid:
    """Steps between given times; `outputs` are the step counts at which outputs are due, for `pinned` and `jumps` see `Grid`."""

    def __init__(
        self, times: list[float], outputs: list[int], pinned: Sequence[int] = (), jumps: Collection[int] = ()
    ) -> None:
        self.grid = Grid(times, outputs, pinned=list(pinned), jumps=set(jumps), longest_run=LONGEST_RUN)
        self.num_steps = self.num_rejected = 0
        self.num_total = len(times) - 1
        self.next_output = 0  # which of them; bisection would be a riddle to torch.compile

    @property
    def done(self) -> bool:
        return self.num_steps == self.num_total

    def advance(self, step: Step, pair: State, restart: bool, limit: int) -> State:
        n, outputs = self.num_steps, self.grid.outputs
        while outputs[self.next_output] <= n:
            self.next_output += 1
        stop = min(limit, n + LONGEST_RUN, outputs[self.next_output])
        if self.grid.jumps:
            stop = min([stop, *(jump for jump in self.grid.jumps if jump > n)])
        pair, _ = step(pair, self.grid.seen(n, stop, self.grid.times[n : stop + 1]), restart)
        self.num_steps = stop
        return pair

    def tolerance(self, size: Tensor) -> Tensor | None:
        return None

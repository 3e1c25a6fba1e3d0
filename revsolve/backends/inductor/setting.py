"""What recordings of segments share: the method, the grid, the field with what it uses from outside, and their programs."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from revsolve.backends.inductor.compiler import Compiler
from revsolve.backends.inductor.driven import Driven, Undriven
from revsolve.backends.inductor.programs import PROGRAMS, Program, Sweep, loop
from revsolve.backends.inductor.transcript import derivative_transcript, transcript
from revsolve.core.arithmetic import Time
from revsolve.core.coupling import CouplingUpdate, Pair, Scheme, advance, over, pull_back
from revsolve.core.problem import Problem
from revsolve.core.stepper import Grid
from revsolve.core.tape import Grads, Memo, Tape

# Arrays over steps have this length, or the next power of two: another number of steps finds the same program.
LEAST_TIMES = 64
Updates = tuple[CouplingUpdate, ...]


class Setting:
    """What both directions share: the method's updates, the grid as tensors, the field and what it uses from outside."""

    def __init__(self, problem: Problem, term: Driven | Undriven, grid: Grid, y: Tensor, way: Compiler) -> None:
        self.scheme, self.way, self.narrow, self.wide = problem.scheme, way, problem.state_dtype, problem.pair_dtype
        self.lead, self.rest = split(problem.scheme)
        self.term = term
        self.call = term, grid.times[0], y, grid.times[1], term.first
        text, self.outside = transcript(*self.call)
        self.given, self.apart = [x.detach() for x in self.outside], not problem.field.stand_ins_needed
        place = {id(x): i for i, x in enumerate(problem.field.tensors)}
        self.wanted = [(i, place[id(x)]) for i, x in enumerate(self.outside) if id(x) in place]
        self.times, self.due = _over_steps(tuple(grid.times), tuple(grid.outputs))
        states = (y.shape, y.stride(), y.dtype, self.wide, len(self.times), len(grid.outputs), term.most)
        self.programs = PROGRAMS.made((problem.scheme, way, text, *surroundings(), *states))

    @cached_property
    def differentiating(self) -> dict[Hashable, Program]:
        """Those that differentiate what the field does, which its operations alone do not tell."""
        self.term.rewind()
        return self.programs.setdefault(derivative_transcript(*self.call, self.outside, self.apart), {})

    def run(
        self,
        programs: dict[Hashable, Program],
        name: Hashable,
        sweep: Swept,
        span: tuple[int, int],
        given: Sequence[Tensor],
        constant: Sequence[Tensor],
        changed: range,
    ) -> list[Tensor]:
        """What the sweep from the first of these step counts to the last ends with, by the program of this name, made now unless
        there is one."""
        (start, stop), (first, last) = span, map(counted, span)
        if name not in programs:
            made = loop(sweep, start < stop, first, given, constant, changed, self.way)
            programs[name] = Program(made, sweep.counts["begin"] + sweep.counts["end"], sweep.counts["step"])
        program = programs[name]
        sweep.num_evaluations += program.in_steps * abs(stop - start) + program.besides
        return program.run(first, *given, last, *constant)

    def advanced(self, updates: Updates, pair: Pair, t0: Time, t1: Time, entries: Tensor, memo: Memo) -> Pair:
        """The pair after updates of the step t0 -> t1, driven by a row of the table."""
        for update in updates:
            self.term.turn(update, entries)
            pair = advance(over(update, t0, t1), pair, memo)
        return pair

    def pulled_back(
        self, updates: Updates, pair: Pair, t0: Time, t1: Time, entries: Tensor, grads: Grads, tape: Tape
    ) -> Pair:
        """The pair before them, with the cotangents in `grads` carried there."""
        for update in reversed(updates):
            self.term.turn(update, entries)
            pair = pull_back(over(update, t0, t1), pair, grads, tape, restored=pair[1])
        return pair

    def begun(self, restart: bool, pair: Pair, n: Tensor, times: Tensor, table: Tensor, memo: Memo) -> Pair:
        """The pair behind a restart, if any, and the lead of step n, the first that the table tells of."""
        updates = self.scheme.restart + self.lead if restart else self.lead
        return self.advanced(updates, pair, at(times, n), at(times, n + 1), table[0], memo)

    def pulled_before(
        self,
        restart: bool,
        pair: Pair,
        n: Tensor,
        times: Tensor,
        table: Tensor,
        stored: Tensor,
        grads: Grads,
        tape: Tape,
    ) -> Tensor:
        """Carry cotangents from there to the pair before, of which y is `stored`; y as undone."""
        step = at(times, n), at(times, n + 1), table[0], grads, tape
        undone, z = self.pulled_back(self.lead, pair, *step)
        if restart:
            self.pulled_back(self.scheme.restart, (stored, z), *step)
        tape.flush(grads)
        return undone

    def sums(self, tape: Tape) -> list[Tensor]:
        """Those on the tape of the tensors that the field uses, to which programs add."""
        return [tape.sums[place] for _, place in self.wanted]

    def cotangent(self, due: Tensor, grad_ys: Tensor, n: Tensor) -> Tensor:
        """That of the output after n steps, zero where none is due."""
        output = at(due, n)
        found = row(grad_ys, output.clamp(min=0))
        return torch.where(output >= 0, found, torch.zeros_like(found))

    def narrowed(self, y: Tensor) -> Tensor:
        return y if self.narrow is None else y.to(self.narrow)


class Swept(Sweep):
    """What sweeps have in common: their setting, and how often the field is evaluated, in each part and so far."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.num_evaluations = setting, 0
        self.counts: dict[str, int] = {}


def split(scheme: Scheme) -> tuple[Updates, Updates]:
    """The updates of a step, as those that belong to the end of the step before in a program, and the rest."""
    ahead = 1 if scheme.run is not None and scheme.updates[0].increment is not None else 0
    return scheme.updates[:ahead], scheme.updates[ahead:]


def surroundings() -> list[Hashable]:
    """What else decides what a recorded field does: autocast."""
    return [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")]


def apart(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    """What a loop hands on: tensors of their own, all laid out alike."""
    return tuple(x.detach().clone(memory_format=torch.contiguous_format) for x in tensors if x is not None)


@lru_cache(maxsize=16)
def _over_steps(times: tuple[float, ...], outputs: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The times, and for every number of steps the output due then, or -1."""
    length = max(LEAST_TIMES, 1 << (len(times) - 1).bit_length())
    padded = torch.tensor([*times, *[times[-1]] * (length - len(times))], dtype=torch.float64, device="cpu")
    due = torch.full((length,), -1, device="cpu")
    due[list(outputs)] = torch.arange(len(outputs), device="cpu")
    return padded, due


@lru_cache(maxsize=4096)
def counted(n: int) -> Tensor:
    """A number of steps as programs take it."""
    return torch.tensor(n, device="cpu")


def row(table: Tensor, n: Tensor) -> Tensor:
    """Row n, or the last one."""
    return table.index_select(0, n.clamp(max=len(table) - 1).reshape(1))[0]


def at(values: Tensor, n: Tensor) -> Tensor:
    """Entry n."""
    return values.index_select(0, n.reshape(1)).reshape(())

"""The context in which the segments of a solve are compiled: method, grid, and the field with what it uses from outside."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from revsolve.backends import CompilationError
from revsolve.backends.inductor.compiler import Compiler
from revsolve.backends.inductor.operation_trace import INSTEAD, Substituted, derivative_trace, operation_trace
from revsolve.backends.inductor.programs import PROGRAMS, Constants, Program, Sweep, Tensors, loop
from revsolve.backends.inductor.tables import Tabulated, Untabulated, at, counter, outputs_due, padded, row, times_seen
from revsolve.backends.inductor.torch_internals import is_fake
from revsolve.core.arithmetic import Time, scaled_add
from revsolve.core.coupling import CouplingUpdate, Scheme, State, advance, pull_back, scheduled, written
from revsolve.core.problem import Problem
from revsolve.core.stepper import Grid
from revsolve.core.tape import Grads, Memo, Tape
from revsolve.field.snapshot import Snapshot

Updates = tuple[CouplingUpdate, ...]


class CompileContext:
    """All that the sweeps of a solve share. Where a gradient will be taken, raises CompilationError if it would miss a tensor."""

    def __init__(
        self,
        problem: Problem,
        owners: Sequence[Any],
        term: Tabulated | Untabulated,
        grid: Grid,
        y: Tensor,
        compiler: Compiler,
        graded: bool,
    ) -> None:
        self.problem, self.scheme, self.compiler, self.term = problem, problem.scheme, compiler, term
        self.owners = owners
        self.lead, self.rest = lead_and_rest(problem.scheme)
        self.call = term, grid.times[0], y, grid.times[1], term.first
        trace, self.outside = operation_trace(*self.call)
        place = {id(x): i for i, x in enumerate(problem.field.tensors)}
        self.wanted = [(i, place[id(x)]) for i, x in enumerate(self.outside) if id(x) in place]
        if graded:
            check_found(self.outside, problem.field.tensors)
        self.times = [padded(times) for times in times_seen(grid, y.real.dtype)]
        self.due = outputs_due(tuple(grid.outputs), len(self.times[0]))
        layout = y.shape, y.stride(), y.dtype, problem.pair_dtype
        states = *layout, len(self.times), len(self.due), len(grid.outputs), term.most
        self.programs = PROGRAMS.made((problem.scheme, compiler, trace, *states))

    @cached_property
    def differentiating(self) -> dict[Hashable, Program]:
        """Programs that differentiate the operations of the field, by the trace of their derivative."""
        self.term.rewind()
        field = self.problem.field
        leaves = field.stand_ins(field.tensors, lambda x: x.detach().requires_grad_())
        wanted = [leaves[place] for _, place in self.wanted]
        return self.programs.setdefault(derivative_trace(*self.call, wanted, field.at(leaves)), {})

    def constants(self, begin: int, end: int, **more: Any) -> Constants:
        """The inputs that a sweep between two numbers of steps does not change."""
        outside, controls = [x.detach() for x in self.outside], self.term.table(min(begin, end), max(begin, end))
        own = {"times": self.times, "due": self.due, "outside": outside, "first": counter(begin), "controls": controls}
        return own | more

    def run(
        self,
        programs: dict[Hashable, Program],
        name: Hashable,
        sweep: SegmentSweep,
        span: tuple[int, int],
        given: Tensors,
        constant: Constants,
        changed: Tensors,
    ) -> list[Tensor]:
        """The results of the sweep from the first of these step counts to the last, by the program of this name, made now unless
        there is one."""
        start, stop = map(counter, span)
        if name not in programs:
            with without_fakes(self.owners):
                made = loop(sweep, start, stop, given, constant, changed, self.compiler)
            programs[name] = Program(made, sweep.counts["begin"] + sweep.counts["end"], sweep.counts["step"])
        program = programs[name]
        sweep.num_evaluations += program.in_steps * abs(span[1] - span[0]) + program.besides
        return program.run(start, stop, given, constant, changed)

    def advanced(self, updates: Updates, pair: State, t0: Time, t1: Time, controls: Tensor, memo: Memo) -> State:
        """The pair after updates of the step t0 -> t1, with the controls of a row of the table."""
        for update in updates:
            self.term.turn_to(update, controls)
            pair = advance(scheduled(update, t0, t1), pair, memo)
        return pair

    def pulled_back(
        self,
        updates: Updates,
        pair: State,
        t0: Time,
        t1: Time,
        controls: Tensor,
        grads: Grads,
        tape: Tape,
        exactly: Callable[[Tensor], Tensor] | None = None,
    ) -> State:
        """The pair before them, as undone, with the cotangents in `grads` carried there.

        At a kink of the field, an undone member could lie on the other side: the first update sees `exactly(undone)` instead.
        """
        for update in reversed(updates):
            self.term.turn_to(update, controls)
            source, seen = pair[update.source], pair
            if exactly is not None and update is updates[0]:
                seen = written(pair, update.source, exactly(source))
            before = pull_back(scheduled(update, t0, t1), seen, grads, tape, restored=pair)
            pair = written(before, update.source, source)
        return pair

    def narrowed(self, y: Tensor) -> Tensor:
        return y if self.problem.state_dtype is None else y.to(self.problem.state_dtype)


class SegmentSweep(Sweep):
    """A sweep over a segment, behind a `restart` or not; it counts evaluations of the field, in each part and so far."""

    restart = False

    def __init__(self, context: CompileContext) -> None:
        self.context, self.num_evaluations = context, 0
        self.counts = {"begin": 0, "step": 0, "end": 0}
        self.outside = list(context.outside)
        for i, _ in context.wanted:
            self.outside[i] = context.outside[i].requires_grad_()  # in a backward pass, what stands in its place there

    @contextmanager
    def evaluating(self, part: str, constant: Constants) -> Iterator[TracedMemo]:
        """A memo of the term, whose field uses what stands in the constants for the tensors from outside."""
        memo = TracedMemo(self.context.term)
        with torch.no_grad(), Substituted(self.outside, constant["outside"]):
            yield memo
        self.counts[part] = memo.num_evaluations

    def differentiate_by(self, tape: Tape) -> None:
        """Take the gradients for the tensors of a tape, where the field uses them, and add them to its sums."""
        used = [self.outside[i] for i, _ in self.context.wanted]
        sums = {id(x): total for x, total in zip(tape.tensors, tape.sums, strict=True)}
        self.sums = [sums[id(x)] if id(x) in sums else torch.zeros_like(x) for x in used]
        self.leaves, self.tape = used, tape

    @contextmanager
    def differentiating(self, part: str, constant: Constants, changed: Tensors) -> Iterator[TracedTape]:
        """A tape that adds the gradients that it finds to what is changed."""
        with torch.enable_grad(), Substituted(self.outside, constant["outside"]):
            tape = TracedTape(self.context, self.leaves, self.tape)
            yield tape
        self.counts[part] = tape.memo.num_evaluations
        for total, grad in zip(changed, tape.found, strict=True):
            if grad is not None:
                total.add_(grad.detach())

    def begun(self, n: Tensor, pair: State, constant: Constants) -> State:
        """The pair behind the restart, if any, and the lead of step n."""
        context, times = self.context, constant["times"]
        updates = context.scheme.restart + context.lead if self.restart else context.lead
        with self.evaluating("begin", constant) as memo:
            return context.advanced(updates, pair, at(times[0], n), at(times[-1], n + 1), constant["controls"][0], memo)

    def ended(self, n: Tensor, pair: State, constant: Constants, grads: Grads, tape: Tape) -> Tensor:
        """Carry cotangents back from there to the pair before, of which y is stored; y as undone."""
        context, times, stored = self.context, constant["times"], constant["stored"]
        step = at(times[0], n), at(times[-1], n + 1), constant["controls"][0], grads, tape
        known = constant.get("known")
        undone, z = context.pulled_back(context.lead, pair, *step, (lambda x: known[0]) if known else None)
        if self.restart:
            context.pulled_back(context.scheme.restart, (stored, z), *step)
        tape.flush(grads)
        return undone


class TracedMemo(Memo):
    """A memo that compares no numbers, for a recording has none."""

    def value(self, t: Time, x: Tensor) -> Any:
        if x is not self.latest[0] or t is not self.latest[1]:
            self.num_evaluations += 1
            self.latest = (x, t, self.term.value(t, x))
        return self.latest[2]


class TracedTape(Tape):
    """A tape whose gradients of tensors are results of the recording."""

    def __init__(self, context: CompileContext, leaves: Sequence[Tensor], tape: Tape) -> None:
        super().__init__(context.term, leaves, tape.audit, context.problem.state_dtype)
        self.memo = TracedMemo(context.term)
        self.found: list[Tensor | None] = [None for _ in leaves]

    def add_up(self, numbers: Sequence[int], grads: Sequence[Tensor | None], weight: float = 1.0) -> None:
        for i, grad in zip(numbers, grads, strict=True):
            if grad is not None:
                self.found[i] = scaled_add(self.found[i], grad, weight)


def check_found(outside: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    """Raise CompilationError if something computed from parameters was kept from a call before."""
    known = {id(x) for x in tensors}
    for x in outside:
        if x.requires_grad and not x.is_leaf and id(x) not in known:
            raise CompilationError(
                f"compile= would lose a gradient: the field keeps a tensor of shape {tuple(x.shape)} that it computed from "
                f"others in a call before. Compute it in every call, or outside and pass it through args=, or {INSTEAD}."
            )


@contextmanager
def without_fakes(owners: Sequence[Any]) -> Iterator[None]:
    """Put back what the owners of the field held before, where a recording leaves them a tensor without numbers."""
    snapshot = Snapshot(owners)
    try:
        yield
    finally:
        snapshot.forget(snapshot.changes(), is_fake)


def lead_and_rest(scheme: Scheme) -> tuple[Updates, Updates]:
    """The updates of a step, as those that belong to the end of the step before in a program, and the rest.

    Where a method evaluates the field at the end of a step and again at the start of the next, at the same state and time
    (reversible Heun), both are one evaluation so.
    """
    ahead = 1 if scheme.merged is not None and scheme.updates[-1].increment is not None else 0
    return scheme.updates[:ahead], scheme.updates[ahead:]


def cotangent(n: Tensor, constant: Constants) -> Tensor:
    """That of the output after n steps, zero where none is due."""
    output = at(constant["due"], n)
    found = row(constant["grad_ys"], output.clamp(min=0))
    return torch.where(output >= 0, found, torch.zeros_like(found))

"""Compiled solves are the eager ones: the same states, gradients, restarts and counts, whatever the field is made of.

Most tests run the recorded programs operation by operation (`"backend": "eager"`), as inductor compiles them; a few compile.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from revsolve import LinearPath, NaturalCubicPath, alf, cdeint, fixed_point, method_names, odeint, reversible, sdeint
from revsolve.backends import CompilationError
from revsolve.backends.inductor import programs
from revsolve.backends.inductor.compiler import Compiler, check
from revsolve.backends.inductor.programs import PROGRAMS, once
from revsolve.backends.inductor.torch_internals import supported
from revsolve.schemes.names import scheme
from revsolve.schemes.tableau import TABLEAUS
from tests.equations import BACKWARD, EQUATIONS, FORWARD, Network, loss_of, relative_difference, worst_difference

EXACT = 1e-12  # the order of summation differs, and what is undone carries roundings of 1e-16 a step
FIXED: dict[str, Any] = {"options": {"step_size": 0.11}}
RECORDED = {"backend": "eager"}
FEW = ["rev_rk4", "rev_bosh3", "reversible_heun", "reversible_heun4_s3", "alf", "alf4_s3", "leapfrog"]
REST = [name for name in method_names() if scheme(name).reversible and name not in FEW]
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="inductor needs a C++ compiler"
)
compiles = pytest.mark.skipif(not supported(), reason="compile= needs a newer release of torch")
quiet = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning:torch")


def solved(equation: Any, times: tuple[float, ...] = FORWARD, **solve: Any) -> dict[str, Tensor]:
    """The loss of all outputs, and its gradient with respect to every input."""
    t = torch.tensor(times, dtype=torch.float64)
    loss = loss_of(odeint(equation.func, equation.y0, t, args=equation.args, **solve))
    inputs = list(equation.inputs.values())
    found = torch.autograd.grad(loss, inputs, retain_graph=True, materialize_grads=True)
    return {"loss": loss.detach(), **dict(zip(equation.inputs, found, strict=True))}


def difference(equation: str, times: tuple[float, ...] = FORWARD, compile: Any = RECORDED, **solve: Any) -> float:  # noqa: A002
    """The worst relative difference between the compiled solve and plain differentiation of the eager one."""
    made = EQUATIONS[equation]()
    wanted = solved(made, times, gradient="direct", **solve)
    return worst_difference(solved(made, times, compile=compile, **solve), wanted)[0]


@pytest.mark.parametrize("times", [FORWARD, BACKWARD], ids=["forward", "backward"])
@pytest.mark.parametrize("method", FEW)
def test_recorded_is_direct(method: str, times: tuple[float, ...]) -> None:
    assert difference("module", times, method=method, **FIXED) < EXACT


@pytest.mark.slow
@pytest.mark.parametrize("method", REST)
def test_every_method(method: str) -> None:
    assert difference("module", method=method, **FIXED) < EXACT


@pytest.mark.parametrize("restarts", [None, 1, 3, 40])
@pytest.mark.parametrize("method", ["rev_bosh3", "reversible_heun", "alf"])
def test_with_and_without_restarts(method: str, restarts: int | None) -> None:
    assert difference("module", method=method, restarts=restarts, **FIXED) < EXACT


def backward_evaluations(method: str, compile: Any) -> int:  # noqa: A002
    y0, t = torch.ones(2, dtype=torch.float64, requires_grad=True), torch.tensor(FORWARD, dtype=torch.float64)
    solution = odeint(lambda t, y: torch.sin(y), y0, t, method=method, full_output=True, compile=compile, **FIXED)
    solution.ys.sum().backward()
    return solution.stats.num_backward_evaluations


@pytest.mark.parametrize("method", FEW)
def test_undoing_evaluates_as_often_as_without_programs(method: str) -> None:
    assert backward_evaluations(method, RECORDED) == backward_evaluations(method, False) > 0


@pytest.mark.parametrize("equation", EQUATIONS)
def test_every_kind_of_state(equation: str) -> None:
    assert difference(equation, method="rev_heun2", **FIXED) < EXACT


@pytest.mark.parametrize("method", [alf(0.8), reversible(TABLEAUS["bosh3"], coupling=0.9)], ids=["alf", "rev_bosh3"])
def test_damped_schemes(method: Any) -> None:
    assert difference("module", method=method, **FIXED) < EXACT


@needs_compiler
@quiet
@pytest.mark.parametrize(
    "method", ["alf", *(pytest.param(name, marks=pytest.mark.slow) for name in ("rev_rk4", "reversible_heun", "alf4"))]
)
def test_compiled_is_direct(method: str) -> None:
    assert difference("module", method=method, compile=True, **FIXED) < EXACT


@needs_compiler
@quiet
@pytest.mark.parametrize("method", ["rev_heun2", pytest.param("reversible_heun", marks=pytest.mark.slow)])
def test_states_too_large_for_the_stack(method: str) -> None:
    """Tensors that steps write into in turns, and that a library multiplies."""
    torch.manual_seed(0)
    field, y0 = Network(50, 70).double(), torch.randn(60, 50, dtype=torch.float64, requires_grad=True)
    inputs, t = [y0, field.net[0].weight, field.net[2].bias], torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)
    solves: list[dict[str, Any]] = [{"gradient": "direct"}, {"compile": True}]
    wanted, got = (odeint(field, y0, t, method=method, options={"step_size": 0.1}, **how) for how in solves)
    torch.testing.assert_close(got, wanted, rtol=EXACT, atol=EXACT)
    gradients = [torch.autograd.grad(ys.square().sum(), inputs) for ys in (wanted, got)]
    assert max(map(relative_difference, *gradients)) < 10 * EXACT


@needs_compiler
@quiet
def test_own_tanh() -> None:
    """Within five roundings of float32, at most 1, and NaN where it is asked for."""
    x = torch.cat(
        [torch.linspace(-12.0, 12.0, 100_001), torch.logspace(-20, 0, 1001), torch.tensor([torch.nan, torch.inf])]
    )
    (got,) = once(lambda x: (torch.tanh(x),), [x], Compiler())(x)
    wanted = torch.tanh(x.double())
    torch.testing.assert_close(got.double(), wanted, rtol=5 * 2.0**-24, atol=0.0, equal_nan=True)
    assert got.nan_to_num().abs().max() == 1.0


SOLVE = """
import sys, torch
from torch._dynamo.utils import counters
from revsolve import odeint
from revsolve.backends.inductor import programs

class Wrapped(torch.nn.Module):
    def __init__(self, field, scale):
        super().__init__()
        self.field, self.scale = field, scale

    def forward(self, t, y):
        return self.scale * self.field(t, y)

scale, last = map(float, sys.argv[1:])
programs.ABOVE = (*programs.ABOVE[:-1], last)
y0, settings = torch.linspace(-1, 1, 3), {"method": "rev_euler", "options": {"step_size": 0.125}}
with torch.no_grad():
    field = Wrapped(lambda t, y: torch.tanh(y), scale)
    got, wanted = (odeint(field, y0, [0.0, 1.0], compile=how, **settings)[-1] for how in (True, False))
print(counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"], float((got - wanted).abs().max()))
"""


@needs_compiler
@pytest.mark.slow
def test_the_cache_on_disk_knows_our_code(tmp_path: Path) -> None:
    """Each in a process of its own: the same program is found; that of another wrapper or another tanh is a new one."""

    def solved(scale: float, last: float) -> tuple[int, int, float]:
        given = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        command = [sys.executable, "-W", "ignore", "-c", SOLVE, str(scale), str(last)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=given)
        hits, misses, error = done.stdout.split()
        return int(hits), int(misses), float(error)

    ours = programs.ABOVE[-1]
    first, again, wrapped, later = solved(1.0, ours), solved(1.0, ours), solved(0.5, ours), solved(1.0, 1.0001)
    assert (first[:2], again[:2], wrapped[:2], later[:2]) == ((0, 1), (1, 0), (0, 1), (0, 1))
    assert max(first[2], again[2], wrapped[2]) < 1e-6  # roundings of float32
    assert 1e-5 < later[2] < 1e-4  # as a version might have it whose tanh is a little larger


def test_an_older_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(CompilationError, match=r"needs torch 2\.13 or newer, but this is torch 2\.9\.1"):
        through(lambda t, y: -y)


@pytest.mark.parametrize("version", ["2.13.0a0+git", "2.14.1", "3.0"])
def test_newer_versions_are_taken(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    assert supported()


@pytest.mark.parametrize("gradient", ["reversible", "checkpoint"])
def test_statistics_and_restarts_are_those_of_the_eager_solve(gradient: str) -> None:
    y0, t = torch.ones(3, dtype=torch.float64), torch.linspace(0.0, 20.0, 9, dtype=torch.float64)
    settings: dict[str, Any] = {"method": "rev_heun2", "options": {"step_size": 0.1}, "full_output": True}
    with torch.no_grad():
        got = odeint(lambda t, y: torch.cos(t) - 2 * y, y0, t, compile=RECORDED, **settings)
        wanted = odeint(lambda t, y: torch.cos(t) - 2 * y, y0, t, **settings)
    torch.testing.assert_close(got.ys, wanted.ys, rtol=EXACT, atol=EXACT)
    assert (got.stats.num_restarts, got.times) == (wanted.stats.num_restarts, wanted.times)
    assert got.stats.num_restarts > 3


def test_a_program_each_way(no_programs: None) -> None:
    """Whatever the lengths of the segments: restarts and looks are part of them."""
    field, y0 = Network().double(), torch.ones(2, 3, dtype=torch.float64)
    through(field, y0.requires_grad_(), steps=90)[-1].sum().backward()
    (forward,) = PROGRAMS.known.values()
    names = [name for known in (forward, *(x for x in forward.values() if isinstance(x, dict))) for name in known]
    assert sorted(name[0] for name in names if isinstance(name[0], str)) == ["backward", "forward"]


def test_a_decaying_solution_is_not_solved_much_more_often() -> None:
    """Its segments get shorter than foreseen, which their first steps tell."""
    y0, t = torch.ones(3, dtype=torch.float64), torch.linspace(0.0, 20.0, 9, dtype=torch.float64)
    settings: dict[str, Any] = {"method": "rev_heun2", "options": {"step_size": 0.1}, "full_output": True}
    got, wanted = (
        odeint(lambda t, y: torch.exp(-t) - 2 * y, y0, t, compile=how, **settings).stats for how in (RECORDED, False)
    )
    assert got.num_restarts == wanted.num_restarts > 10
    assert wanted.num_evaluations < got.num_evaluations < 1.6 * wanted.num_evaluations


def test_dense_output() -> None:
    y0, t = torch.ones(3, dtype=torch.float64), torch.linspace(0.0, 1.0, 7, dtype=torch.float64)
    settings: dict[str, Any] = {"method": "rev_rk4", "options": {"step_size": 0.1, "dense": True}}
    got = odeint(lambda t, y: torch.sin(y), y0, t, compile=RECORDED, **settings)
    torch.testing.assert_close(got, odeint(lambda t, y: torch.sin(y), y0, t, **settings), rtol=EXACT, atol=EXACT)


def through(field: Any, y0: Tensor | None = None, steps: int = 10) -> Tensor:
    y0 = torch.ones(2, 3, dtype=torch.float64) if y0 is None else y0
    t = torch.tensor([0.0, 0.1 * steps], dtype=torch.float64)
    return odeint(field, y0, t, method="rev_heun2", options={"step_size": 0.1}, compile=RECORDED)


def test_programs_are_found_again() -> None:
    """By new modules and closures that do the same, after updates, at other times and for other numbers of steps."""
    field = Network().double()
    through(field)
    made = len(PROGRAMS.known)
    with torch.no_grad():
        field.net[0].weight.mul_(2.0)
    code = torch.randn(3, dtype=torch.float64)
    through(field)
    through(Network().double(), steps=30)
    through(lambda t, y: field(t, y))
    assert len(PROGRAMS.known) == made
    through(lambda t, y: field(t, y) + code)
    assert len(PROGRAMS.known) == made + 1


def test_a_hook_that_comes_late_sees_the_gradient_alone() -> None:
    """Not what the transcript of a derivative takes, which without restarts is written in the backward pass."""
    weight, seen = torch.full((3,), 0.5, dtype=torch.float64, requires_grad=True), []  # type: Tensor, list[Tensor]
    y0, t = torch.ones(3, dtype=torch.float64), [0.0, 1.0]
    settings: dict[str, Any] = {"method": "rev_heun2", "options": {"step_size": 0.1}, "restarts": None}
    y = odeint(lambda t, y: torch.sin(y) * weight, y0, t, compile=RECORDED, **settings)[-1]
    weight.register_hook(lambda grad: seen.append(grad.clone()))
    (got,) = torch.autograd.grad(y.sum(), weight)
    assert len(seen) == 1 and torch.equal(seen[0], got)


def at_rest(cut: bool) -> Any:
    """y' = -8 y, of which a derivative sees nothing if it is cut."""

    def field(t: Tensor, y: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not cut):
            k = -8.0 * y
        return k + 0.0 * y

    return field


def test_restarts_know_the_modes_of_their_own_field() -> None:
    """Not those of another one with the same values, whose program was made before."""
    y0, t = torch.zeros(3, dtype=torch.float64), torch.tensor([0.0, 4.0], dtype=torch.float64)
    settings: dict[str, Any] = {"method": "rev_heun2", "options": {"step_size": 0.1}, "full_output": True}
    numbers = [
        [odeint(at_rest(cut), y0, t, compile=how, **settings).stats.num_restarts for cut in (False, True)]
        for how in (RECORDED, False)
    ]
    assert numbers[0] == numbers[1]
    assert numbers[0][0] > 2 * numbers[0][1]


def test_a_tensor_given_twice_is_two_inputs() -> None:
    """What is one tensor when a program is made may be two when it is called."""
    one, two = torch.ones(3), torch.full((3,), 2.0)
    (got,) = once(lambda a, b, c: (a + b * c,), [one, one, one], Compiler("eager"))(one, two, torch.ones(3))
    torch.testing.assert_close(got, torch.full((3,), 3.0))


@compiles
@pytest.mark.parametrize("place", [0, 1])
def test_a_program_that_does_something_else_is_refused(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled_wrongly(self: Compiler, loop: Any, example: Any) -> Any:
        def run(*inputs: Tensor) -> tuple[Tensor, ...]:
            return tuple(x + (0.1 if i == place else 0) for i, x in enumerate(loop(*inputs)))

        return run

    monkeypatch.setattr(Compiler, "__call__", compiled_wrongly)
    monkeypatch.setattr(PROGRAMS, "known", {})
    with pytest.raises(CompilationError, match=r"differs by 1\.0e-01 .* compile=False"):
        through(lambda t, y: torch.sin(y))


def test_what_memory_held_before_hides_no_difference() -> None:
    """Memory to be filled may hold numbers beside which 0.1 would be a rounding."""

    def fill(x: Tensor, out: Tensor) -> list[Tensor]:
        out[0] = x[0]
        return [x]

    one, memory = torch.ones(1), torch.full((2,), 1e30)
    with pytest.raises(CompilationError, match=r"differs by 1\.0e-01"):
        check(fill, lambda x, out: [y + 0.1 for y in fill(x, out)], [one, memory], torch.finfo().eps, changed=[1])


def test_a_program_that_rounds_otherwise_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of some sums only rounding is left: the gradient of a bias before a normalisation, say."""
    otherwise = lambda self, loop, example: lambda *inputs: [x + 1e-15 for x in loop(*inputs)]  # noqa: E731
    monkeypatch.setattr(Compiler, "__call__", otherwise)
    x = torch.linspace(0.0, 1.0, 7, dtype=torch.float64)
    run = once(lambda x: (x, (x - x.mean()).sum()), [x], Compiler())
    assert run(x)[1].abs() < EXACT


def test_a_field_that_no_state_changes() -> None:
    """There is no product with its Jacobian for restarts to learn from."""
    y = through(lambda t, y: torch.ones_like(y) * torch.cos(t), torch.zeros(2, dtype=torch.float64))[-1]
    torch.testing.assert_close(y, torch.sin(torch.ones_like(y)), rtol=1e-3, atol=0.0)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.doubled, self.shift = 1.0, False, torch.zeros(3, dtype=torch.float64)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        y = self.scale * torch.sin(y) + self.shift
        return 2 * y if self.doubled else y


@pytest.mark.parametrize(
    ("name", "value"), [("scale", 0.5), ("doubled", True), ("shift", torch.ones(3, dtype=torch.float64))]
)
def test_what_changes_in_the_field_is_seen(name: str, value: Any) -> None:
    field = Scaled()
    through(field)
    setattr(field, name, value)
    wanted = odeint(
        field,
        torch.ones(2, 3, dtype=torch.float64),
        torch.tensor([0.0, 1.0], dtype=torch.float64),
        method="rev_heun2",
        options={"step_size": 0.1},
    )
    torch.testing.assert_close(through(field), wanted, rtol=EXACT, atol=EXACT)


class Damped(torch.autograd.Function):
    """The identity; its gradient is not."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return y.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.factor * grad, None


def held(y: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.sin(y)


def hooked(y: Tensor) -> Tensor:
    k = torch.sin(y)
    if k.requires_grad:
        k.register_hook(lambda grad: 0.5 * grad)
    return k


SAME_VALUES: dict[str, tuple[Any, Any]] = {
    "no_grad": (held, torch.sin),
    "grad": (torch.sin, held),
    "hook": (torch.sin, hooked),
    "function": (lambda y: torch.sin(Damped.apply(y, 1.0)), lambda y: torch.sin(Damped.apply(y, 0.5))),
}


@pytest.fixture
def no_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PROGRAMS, "known", {})


@pytest.mark.usefixtures("no_programs")
@pytest.mark.parametrize(("before", "now"), SAME_VALUES.values(), ids=SAME_VALUES)
def test_a_field_with_the_same_values_and_another_derivative_finds_another_program(before: Any, now: Any) -> None:
    rate, y0 = torch.tensor([0.3, 0.5, -0.2], dtype=torch.float64, requires_grad=True), torch.ones(2, 3).double()

    def gradient(field: Any, **solve: Any) -> Tensor:
        t = torch.tensor([0.0, 1.0], dtype=torch.float64)
        way: dict[str, Any] = {"method": "rev_heun2", "options": {"step_size": 0.1}}
        y = odeint(lambda t, y: rate * field(y), y0, t, **way, **solve)[-1]
        return torch.autograd.grad(y.square().sum(), rate)[0]

    gradient(before, compile=RECORDED)
    torch.testing.assert_close(
        gradient(now, compile=RECORDED), gradient(now, gradient="direct"), rtol=EXACT, atol=EXACT
    )


CODE = torch.tensor([0.3, 0.5, -0.2], dtype=torch.float64)


@pytest.mark.usefixtures("no_programs")
@pytest.mark.parametrize(
    ("before", "now"),
    [
        (lambda t, y: (torch.sin(y), torch.cos(y))[0], lambda t, y: (torch.sin(y), torch.cos(y))[1]),
        (lambda t, y: y, lambda t, y: CODE),
    ],
    ids=["of two", "none made"],
)
def test_which_tensor_a_field_returns_is_seen(before: Any, now: Any) -> None:
    y0, t = torch.ones(3, dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
    wanted = odeint(now, y0, t, method="rev_heun2", options={"step_size": 0.1})
    through(before, y0)
    torch.testing.assert_close(through(now, y0), wanted, rtol=EXACT, atol=EXACT)


def test_a_state_that_is_a_view() -> None:
    y0, t = torch.randn(3, 2, dtype=torch.float64).T, torch.tensor([0.0, 1.0], dtype=torch.float64)
    wanted = odeint(lambda t, y: torch.sin(y), y0, t, method="rev_heun2", options={"step_size": 0.1})
    torch.testing.assert_close(through(lambda t, y: torch.sin(y), y0), wanted, rtol=EXACT, atol=EXACT)


def test_the_defaults_of_odeint_in_float32() -> None:
    """The ratio of an error that rounding alone makes is no number to compare in its digits."""
    torch.manual_seed(0)
    net, y0 = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2)), torch.randn(8, 2)

    def gradient(**solve: Any) -> Tensor:
        y = odeint(lambda t, y: net(y), y0, [0.0, 0.3], **solve)[-1]
        return torch.autograd.grad(y.square().sum(), net[0].weight)[0]

    got, wanted = gradient(compile=RECORDED), gradient()
    assert float((got - wanted).norm() / wanted.norm()) < 1e-5


def test_float32() -> None:
    """Roundings of 6e-8 over a hundred steps, in another order."""
    torch.manual_seed(1)
    net, y0, t = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(4, 3), torch.tensor([0.0, 5.0])

    def gradient(**solve: Any) -> Tensor:
        ys = odeint(lambda t, y: net(y), y0, t, method="rev_rk4", options={"step_size": 0.05}, **solve)
        return torch.cat([g.flatten() for g in torch.autograd.grad(ys[-1].square().sum(), net.parameters())])

    got, wanted = gradient(compile=RECORDED), gradient(gradient="direct")
    assert float((got - wanted).norm() / wanted.norm()) < 1e-5


def test_second_derivatives_are_made_without_programs() -> None:
    y0, t = torch.ones(3, dtype=torch.float64, requires_grad=True), torch.tensor([0.0, 1.0], dtype=torch.float64)

    def second(**solve: Any) -> Tensor:
        y = odeint(lambda t, y: torch.sin(y), y0, t, method="rev_rk4", options={"step_size": 0.1}, **solve)
        (first,) = torch.autograd.grad(y[-1].sum(), y0, create_graph=True)
        return torch.autograd.grad(first.square().sum(), y0)[0]

    torch.testing.assert_close(second(compile=RECORDED), second(), rtol=EXACT, atol=EXACT)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "callback": ({"callback": print}, "nobody watches"),
    "direct": ({"gradient": "direct"}, "keeps every operation"),
    "times": ({"t": torch.tensor([0.0, 1.0], requires_grad=True)}, "detach t"),
    "event": ({"event_fn": lambda t, y: y.sum()}, "leave it out with event_fn"),
    "option": ({"compile": {"bakend": "eager"}}, "unknown option 'bakend'"),
    "backend": ({"compile": {"backend": "nvcc"}}, "'inductor', 'eager'"),
    "random": ({"func": lambda t, y: nn.functional.dropout(y)}, "draws no random numbers"),
}


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_compiled_is_refused(settings: dict[str, Any], message: str) -> None:
    usual = {"func": lambda t, y: -y, "method": "rev_rk4", "options": {"step_size": 0.1}, "compile": RECORDED}
    call = {**usual, **settings}
    with pytest.raises(ValueError, match=message):
        odeint(call.pop("func"), torch.ones(3), call.pop("t", torch.tensor([0.0, 1.0])), **call)


def test_complex_states_are_refused() -> None:
    t = torch.tensor([0.0, 1.0])
    with pytest.raises(ValueError, match="no complex numbers"):
        odeint(lambda t, y: 1j * y, torch.ones(2) + 0j, t, method="alf", options={"step_size": 0.1}, compile=True)


def test_compile_must_say_how() -> None:
    with pytest.raises(TypeError, match="True, False or a dict"):
        odeint(
            lambda t, y: -y,
            torch.ones(3),
            torch.tensor([0.0, 1.0]),
            method="rev_rk4",
            options={"step_size": 0.1},
            compile="inductor",
        )


@compiles
def test_a_field_that_looks_at_numbers() -> None:
    with pytest.raises(CompilationError, match=r"may not look at numbers.*compile=False"):
        through(lambda t, y: -y if t < 0.5 else y)
    with pytest.raises(CompilationError, match=r"may not look at numbers.*compile=False"):
        through(lambda t, y: -y * torch.arange(int(y.abs().sum())).sum())


@compiles
def test_a_branch_is_refused_before_anything_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "record", None)
    with pytest.raises(CompilationError, match=r"records one branch.*torch\.where"):
        through(lambda t, y: -y if y.sum() > 0 else y)


class Noise(nn.Module):
    """A drift, a diffusion and the drift of a prior that share a network."""

    def __init__(self, noise_type: str, sde_type: str) -> None:
        super().__init__()
        self.noise_type, self.sde_type = noise_type, sde_type
        self.net, self.volatility = nn.Linear(3, 3).double(), nn.Linear(3, 6).double()

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(self.net(y)) * torch.cos(t)

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        several = torch.tanh(self.volatility(y)).view(*y.shape, 2)
        return several if self.noise_type == "general" else 0.5 + 0.2 * several[..., 0]

    def h(self, t: Tensor, y: Tensor) -> Tensor:
        return -y


@pytest.mark.parametrize("restarts", ["auto", 3, None])
@pytest.mark.parametrize("method", ["reversible_heun", "rev_midpoint"])
@pytest.mark.parametrize(
    ("noise", "kind", "logqp"),
    [("general", "stratonovich", False), ("diagonal", "stratonovich", True), ("diagonal", "ito", False)],
)
def test_sdeint(noise: str, kind: str, logqp: bool, method: str, restarts: Any) -> None:
    sde, y0, ts = Noise(noise, kind), torch.ones(2, 3, dtype=torch.float64, requires_grad=True), [0.0, 0.3, 1.7]

    def gradients(**solve: Any) -> dict[str, Tensor]:
        torch.manual_seed(3)
        way: dict[str, Any] = {"method": method, "dt": 0.1, "logqp": logqp, "restarts": restarts}
        out = sdeint(sde, y0, ts, **way, **solve)
        loss = loss_of(out)
        inputs = {"y0": y0, **dict(sde.named_parameters())}
        found = torch.autograd.grad(loss, list(inputs.values()), materialize_grads=True)
        return {"loss": loss.detach(), **dict(zip(inputs, found, strict=True))}

    got, wanted = gradients(compile=RECORDED), gradients(gradient="direct")
    apart = {name: relative_difference(got[name], wanted[name]) for name in wanted}
    assert max(apart.values()) < EXACT, apart


def test_noise_of_longer_segments_finds_another_program() -> None:
    for restarts in (3, None):
        test_sdeint("diagonal", "stratonovich", False, "rev_midpoint", restarts)


@pytest.mark.parametrize("path", [LinearPath, NaturalCubicPath])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("reversible_heun", {}),
        ("rev_bosh3", {"step_size": 0.07}),
        ("reversible_heun", {"form": "derivative", "step_size": 0.07}),
        ("alf4_s3", {"step_size": 0.1}),
    ],
    ids=str,
)
def test_cdeint(path: Any, method: str, options: dict[str, Any]) -> None:
    net, z0 = nn.Linear(3, 6).double(), torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    X = path(torch.randn(2, 12, 2, dtype=torch.float64).cumsum(1), torch.linspace(0, 1, 12, dtype=torch.float64))
    inputs = {"z0": z0, **dict(net.named_parameters())}

    def gradients(**solve: Any) -> dict[str, Tensor]:
        field = lambda t, z: torch.tanh(net(z)).view(2, 3, 2)  # noqa: E731
        zs = cdeint(X, field, z0, X.interval, method=method, options=options, **solve)
        return dict(zip(inputs, torch.autograd.grad(loss_of(zs), list(inputs.values())), strict=True))

    assert worst_difference(gradients(compile=RECORDED), gradients(gradient="direct"))[0] < EXACT


@pytest.mark.parametrize("settings", [{}, {"anchor_every": 3}, {"beta": 0.5}], ids=str)
def test_fixed_point(settings: dict[str, Any]) -> None:
    net, x = nn.Linear(3, 3).double(), torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    inputs = {"x": x, **dict(net.named_parameters())}

    def gradients(**solve: Any) -> dict[str, Tensor]:
        f = lambda z, x: 0.5 * torch.tanh(net(z)) + x  # noqa: E731
        z = fixed_point(f, torch.zeros_like(x), args=x, tol=0, max_steps=8, **settings, **solve)
        return dict(zip(inputs, torch.autograd.grad(z.square().sum(), list(inputs.values())), strict=True))

    assert worst_difference(gradients(compile=RECORDED), gradients(gradient="direct"))[0] < EXACT


A = torch.linspace(-1, 1, 41 * 40)[:1600].sin().reshape(40, 40) / 20  # large enough for products to stay products
PATH = torch.linspace(0, 9, 40 * 11 * 2).sin().reshape(40, 11, 2)
MATRICES: dict[str, Any] = {
    "odeint": lambda x, A, **k: odeint(lambda t, y: y @ A, x, [0.0, 1.0], options={"step_size": 0.1}, **k),
    "within the field": lambda x, A, **k: odeint(
        lambda t, y: torch.add(torch.sin(t) * y, y @ A, alpha=2.5), x, [0.0, 1.0], options={"step_size": 0.1}, **k
    ),
    "cdeint": lambda x, A, **k: cdeint(
        LinearPath(PATH), lambda t, z: (z @ A)[..., None] * torch.tensor([1.0, 2.0]), x, [0.0, 10.0], **k
    ),
    "sdeint": lambda x, A, **k: sdeint((lambda t, y: y @ A, lambda t, y: 0.1 * y @ A), x, [0.0, 1.0], dt=0.1, **k),
    "fixed_point": lambda x, A, beta=0.7, **k: fixed_point(lambda z: z @ A, x, beta=beta, tol=0, max_steps=6, **k),
}


CONSTANTS: dict[str, Any] = {
    "number": lambda t, y: -y * torch.tensor(2.0),
    "several": lambda t, y: torch.tensor([3.0, 4.0]) - y * torch.tensor([1.0, 2.0]).sin(),
}


@quiet
@needs_compiler
@pytest.mark.parametrize("field", CONSTANTS.values(), ids=CONSTANTS)
def test_tensors_made_in_the_field_from_numbers(field: Any) -> None:
    y0 = torch.randn(4, 2).requires_grad_()

    def found(**solve: Any) -> dict[str, Tensor]:
        y = odeint(field, y0, [0.0, 1.0], method="rev_bosh3", options={"step_size": 0.1}, **solve)[-1]
        return {"y": y.detach(), "y0": torch.autograd.grad(y.square().sum(), y0)[0]}

    assert worst_difference(found(compile=True), found(compile=False))[0] < 1e-5


@quiet
@needs_compiler
@pytest.mark.parametrize("door", MATRICES)
def test_weighted_products_of_matrices(door: str) -> None:
    """inductor of torch 2.13 leaves out alpha in torch.add(x, a @ b, alpha=alpha)."""
    x, matrix = torch.randn(40, 40).requires_grad_(), A.clone().requires_grad_()
    settings: dict[str, Any] = {} if door == "fixed_point" else {"method": "reversible_heun"}

    def found(**solve: Any) -> dict[str, Tensor]:
        torch.manual_seed(3)
        z = MATRICES[door](x, matrix, **settings, **solve)
        gx, gA = torch.autograd.grad(z.square().sum(), (x, matrix))
        return {"z": z.detach(), "x": gx, "A": gA}

    assert worst_difference(found(compile=True), found(compile=False))[0] < 1e-5


def test_what_other_front_doors_refuse() -> None:
    y0, noise = torch.ones(2, 3), (lambda t, y: -y, lambda t, y: 0.1 * torch.ones_like(y))
    with pytest.raises(ValueError, match="space-time area"):
        sdeint(noise, y0, [0.0, 1.0], dt=0.1, method="rev_slowrk", compile=RECORDED)
    X = LinearPath(torch.rand(2, 5, 2).requires_grad_())
    with pytest.raises(ValueError, match="a path without gradients"):
        cdeint(X, lambda t, z: z[..., None] * torch.ones(2), y0, X.interval, method="reversible_heun", compile=RECORDED)
    with pytest.raises(ValueError, match="beta that is a number"):
        fixed_point(torch.cos, y0, beta=torch.tensor(0.5), tol=0, compile=RECORDED)
    with pytest.raises(ValueError, match="no tol"):
        fixed_point(torch.cos, y0, compile=RECORDED)

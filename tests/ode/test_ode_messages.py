"""Messages: bad input raises a specific error with the values and a remedy, before any work where that is possible."""

import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from revsolve import Restarts, alf, odeint, reversible
from revsolve.schemes.tableau import RK4

T = torch.tensor([0.0, 1.0])
FINE: dict[str, Any] = {"method": "rk4", "options": {"step_size": 0.25}}


class Untouched:
    """A field that must not be called."""

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        raise AssertionError("the field was called although the input is bad")


def decay(t: Tensor, y: Tensor) -> Tensor:
    return -y


BAD_TIMES = {
    "repeated": ([0.0, 1.0, 1.0], r"t\[2\] = 1.0 follows t\[1\] = 1.0: drop the repeated time"),
    "zigzag": ([0.0, 1.0, 0.5], r"t\[2\] = 0.5 follows t\[1\] = 1.0: sort the times"),
    "first pair against the rest": ([1.0, 0.0, 2.0], r"t\[1\] = 0.0 follows t\[0\] = 1.0"),
    "back where it began": ([0.0, 1.0, 0.0], "strictly monotone"),
    "nan": ([0.0, math.nan], r"t\[1\] = nan"),
    "infinite": ([0.0, math.inf], r"t\[1\] = inf"),
    "empty": ([], "t is empty"),
}


@pytest.mark.parametrize(("times", "message"), BAD_TIMES.values(), ids=BAD_TIMES)
def test_times(times: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        odeint(Untouched(), torch.ones(2), torch.tensor(times), **FINE)


@pytest.mark.parametrize("t", [torch.tensor(1.0), torch.tensor([0, 1])], ids=["0-d", "integer"])
def test_times_of_another_kind(t: Tensor) -> None:
    with pytest.raises(ValueError, match="1-D floating point"):
        odeint(Untouched(), torch.ones(2), t, **FINE)


@pytest.mark.parametrize("t", [1.0, None, "ab", [0.0, None], [[0.0, 1.0]], [torch.tensor([0.0, 1.0])]], ids=repr)
def test_times_that_are_no_numbers(t: Any) -> None:
    with pytest.raises(
        TypeError, match=r"t must be a 1-D tensor or a list of numbers, .* as in \[0.0, 1.0\], but it is "
    ):
        odeint(Untouched(), torch.ones(2), t, **FINE)


BAD_STATES = {
    "integer": (torch.ones(2, dtype=torch.long), TypeError, r"torch.int64: cast it, say with .float\(\)"),
    "boolean": (torch.ones(2, dtype=torch.bool), TypeError, "torch.bool"),
    "number": (1.0, TypeError, "float 1.0"),
    "no numbers": (torch.ones(0, 3), ValueError, r"\(0, 3\), which holds no numbers"),
    "no tensor": ({}, ValueError, "holds no tensor"),
    "one integer among others": ((torch.ones(2), torch.ones(2, dtype=torch.int32)), TypeError, "torch.int32"),
    "mixed devices": ((torch.ones(2), torch.ones(2, device="meta")), ValueError, "'cpu', 'meta'.*move them to one"),
}


@pytest.mark.parametrize(("y0", "error", "message"), BAD_STATES.values(), ids=BAD_STATES)
def test_states(y0: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        odeint(Untouched(), y0, T, **FINE)


BAD_FIELDS = {
    "shape": (lambda t, y: y[:1], ValueError, r"shape of y0, \(2,\), but it returned \(1,\)"),
    "broadcast shape": (lambda t, y: y[None], ValueError, r"\(1, 2\)"),
    "dtype": (lambda t, y: y.double(), TypeError, "torch.float32, but it returned torch.float64"),
    "complex": (lambda t, y: y + 1j, TypeError, "torch.complex64"),
    "nothing": (lambda t, y: None, TypeError, "NoneType"),
    "number": (lambda t, y: 1.0, TypeError, "float 1.0"),
    "structure": (lambda t, y: (y, y), ValueError, "structure of y0"),
    "device": (lambda t, y: y.to("meta"), ValueError, "returned a tensor on meta, but y0 is on cpu"),
}


@pytest.mark.parametrize(("func", "error", "message"), BAD_FIELDS.values(), ids=BAD_FIELDS)
@pytest.mark.parametrize("solve", [FINE, {}], ids=["fixed", "adaptive"])
def test_values_of_the_field(func: Any, error: type[Exception], message: str, solve: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        odeint(func, torch.ones(2), T, **solve)


@pytest.mark.parametrize("func", [lambda t, y: {"a": y["a"]}, lambda t, y: y["a"]], ids=["missing leaf", "lone tensor"])
def test_structure_of_the_field(func: Any) -> None:
    with pytest.raises(ValueError, match="must return the structure of y0"):
        odeint(func, {"a": torch.ones(2), "b": torch.ones(3)}, T, **FINE)


WRONG_CALLS: dict[str, tuple[Any, Any, str]] = {
    "module of the state": (
        torch.nn.Linear(2, 2),
        (),
        r"The solver calls func\(t, y\), but .* takes \(input\): wrap it, as in",
    ),
    "with arguments": (lambda t, y: y, (1.0,), r"The solver calls func\(t, y, args\[0\]\), but"),
    "more arguments": (lambda t, y, a, b: y, 1.0, r"but the function takes \(t, y, a, b\): pass args= for b"),
}


@pytest.mark.parametrize(("func", "args", "message"), WRONG_CALLS.values(), ids=WRONG_CALLS)
def test_how_the_field_is_called(func: Any, args: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        odeint(func, torch.ones(3, 2), T, args=args)


def test_type_errors_of_the_field_are_its_own() -> None:
    with pytest.raises(TypeError) as raised:
        odeint(lambda t, y: math.sin(y, 2), torch.ones(3), T)  # type: ignore[call-arg]
    assert "The solver calls" not in str(raised.value)


def test_arguments_in_the_wrong_order() -> None:
    with pytest.raises(ValueError, match=r"it is called as func\(t, y\), with the time first"):
        odeint(lambda y, t: torch.tanh(y), torch.ones(2), T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_states_in_half_precision(dtype: torch.dtype) -> None:
    with pytest.warns(UserWarning, match=f"undoing steps in {dtype} keeps two or three digits"):
        odeint(lambda t, y: -y, torch.ones(2, dtype=dtype), T, method="rev_rk4", options={"step_size": 0.5})


def test_not_callable() -> None:
    with pytest.raises(
        TypeError, match=r"func must be callable as func\(t, y\), but it is a Tensor: call odeint\(func, y0, t\)"
    ):
        odeint(torch.ones(2), torch.ones(2), T)


BAD_ARGUMENTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "method": ({"method": "rk5"}, ValueError, "unknown method 'rk5': did you mean 'rk4'.*revsolve.method_names"),
    "method of another type": ({"method": 4}, TypeError, "name, a Tableau or a Scheme"),
    "option": (
        {"method": "rk4", "options": {"stepsize": 0.1}},
        ValueError,
        "unknown option 'stepsize' .*did you mean 'step_size'",
    ),
    "adaptive option": (
        {"method": "rk4", "options": {"step_size": 0.1, "first_step": 0.1}},
        ValueError,
        "'first_step'",
    ),
    "adaptive option of fixed steps": (
        {"method": "dopri5", "options": {"step_size": 0.1, "safety": 0.8}},
        ValueError,
        "'safety' is for adaptive steps",
    ),
    "a jump that is no time": ({"options": {"jump_t": "abc"}}, ValueError, "jump_t must be a time or several.*'abc'"),
    "a jump at no time": (
        {"options": {"jump_t": [math.nan]}},
        ValueError,
        "jump_t must be a time or several, finite numbers",
    ),
    "a jump that moves": (
        {"options": {"jump_t": torch.tensor([0.5], requires_grad=True)}},
        ValueError,
        r"jump_t requires a gradient, .* pass jump_t.detach\(\)",
    ),
    "options of another type": ({"options": ["step_size"]}, TypeError, "options must be a dict, such as"),
    "both grids": (
        {"method": "rk4", "options": {"step_size": 0.1, "grid_constructor": lambda f, y, t: t}},
        ValueError,
        "exclude each other",
    ),
    "negative step": ({"method": "rk4", "options": {"step_size": -0.1}}, ValueError, "-0.1; its sign follows from t"),
    "zero step": ({"method": "rk4", "options": {"step_size": 0.0}}, ValueError, "must be a positive number"),
    "nan step": ({"method": "rk4", "options": {"step_size": math.nan}}, ValueError, "nan"),
    "first step": ({"options": {"first_step": -1.0}}, ValueError, "first_step must be a positive number"),
    "maximal step": ({"options": {"max_step": -1.0}}, ValueError, "max_step must be positive, but it is -1.0"),
    "minimal step": ({"options": {"min_step": math.inf}}, ValueError, "min_step must be finite and not negative"),
    "limits that cross": (
        {"options": {"min_step": 0.2, "max_step": 0.1}},
        ValueError,
        "min_step = 0.2 is larger than max_step = 0.1",
    ),
    "safety": ({"options": {"safety": 0.0}}, ValueError, r"safety must lie in \(0, 1\], but it is 0.0"),
    "safety of none": ({"options": {"safety": math.nan}}, ValueError, "safety must lie in"),
    "growth that shrinks": ({"options": {"ifactor": 0.5}}, ValueError, "ifactor must be at least 1, but it is 0.5"),
    "shrinking that grows": ({"options": {"dfactor": 2.0}}, ValueError, r"dfactor must lie in \(0, 1\), but it is 2.0"),
    "half a step": (
        {"options": {"max_num_steps": 2.5}},
        ValueError,
        "max_num_steps must be a whole number of at least 1",
    ),
    "no step": ({"options": {"max_num_steps": 0}}, ValueError, "max_num_steps must be a whole number of at least 1"),
    "tolerance": ({"rtol": -1e-3}, ValueError, "rtol must not be negative, but it is -0.001"),
    "tolerance below rounding": ({"rtol": 1e-9}, ValueError, r"1.0e-09 is below the rounding of torch.float32"),
    "tolerance of one rounding": (
        {"rtol": 2e-7},
        ValueError,
        r"2.0e-07 is below .*, 2 eps = 2.4e-07: use rtol >= 1e-06",
    ),
    "gradient": ({"gradient": "adjoint"}, ValueError, "'reversible', 'checkpoint', 'direct', but it is 'adjoint'"),
    "undoing the irreversible": ({**FINE, "gradient": "reversible"}, ValueError, "use method='rev_rk4'"),
    "restarts": ({"restarts": "often"}, ValueError, "restarts must be 'auto'.*'often'"),
    "restarts never": ({"restarts": 0}, ValueError, r"interval=0\) must be a whole number of at least 1"),
    "coupling": (
        {"method": "rev_rk4", "options": {"coupling": 1.5}},
        ValueError,
        r"must lie in \(0, 1\], but it is 1.5",
    ),
    "coupling of another method": (
        {"method": "rk4", "options": {"coupling": 0.9}},
        ValueError,
        "coupling=0.9 is a param",
    ),
    "damping": ({"method": "alf", "options": {"eta": 0.5}}, ValueError, r"must lie in \(1/2, 1\], but it is 0.5"),
    "damping of another method": (
        {"method": "rk4", "options": {"eta": 0.9}},
        ValueError,
        "eta=0.9 is a parameter of alf",
    ),
}


@pytest.mark.parametrize(("solve", "error", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_arguments(solve: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        odeint(Untouched(), torch.ones(2), T, **solve)


GRIDS = {
    "outside": ([0.0, 0.5, 2.0], "must lie within t"),
    "backwards": ([1.0, 0.5, 0.0], "in the direction of t"),
    "repeated": ([0.0, 0.5, 0.5, 1.0], "strictly monotone"),
}


@pytest.mark.parametrize(("points", "message"), GRIDS.values(), ids=GRIDS)
def test_given_grids(points: list[float], message: str) -> None:
    options = {"grid_constructor": lambda func, y0, t: torch.tensor(points)}
    with pytest.raises(ValueError, match=message):
        odeint(Untouched(), torch.ones(2), T, method="rk4", options=options)


@pytest.mark.parametrize("name", ["interval", "longest", "budget"])
@pytest.mark.parametrize("number", [0, -1, 2.5, True])
def test_restart_numbers(name: str, number: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}={number!r}"):
        Restarts(**{name: number})


def test_restart_growth() -> None:
    with pytest.raises(ValueError, match=r"growth=-1.0\) must be positive"):
        Restarts(growth=-1.0)


@pytest.mark.parametrize("make", [lambda: reversible(RK4, 0.0), lambda: reversible(RK4, -0.5), lambda: alf(0.3)])
def test_scheme_parameters(make: Any) -> None:
    with pytest.raises(ValueError, match="must lie in"):
        make()


def poisoned(t: Tensor, y: Tensor) -> Tensor:
    """NaN from t = 0.6 on."""
    return torch.where(t > 0.6, torch.nan, -y)


@pytest.mark.parametrize(
    "solve",
    [
        FINE,
        {"method": "rev_rk4", "options": {"step_size": 0.05}},
        {"method": "alf4", "options": {"step_size": 0.05}},
        {},
    ],
    ids=["rk4", "rev_rk4", "alf4", "adaptive"],
)
def test_a_field_that_returns_nan_is_named_with_the_time(solve: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match=r"the field returned NaN at t = 0\.[56789]") as raised:
        odeint(poisoned, torch.ones(2), T, **solve)
    assert "underflow" not in str(raised.value)


def test_nan_at_the_first_call() -> None:
    with pytest.raises(RuntimeError, match=r"returned NaN at t = 0.0"):
        odeint(lambda t, y: y * torch.nan, torch.ones(2), T)


def test_a_fixed_step_too_long() -> None:
    with pytest.raises(RuntimeError, match=r"stopped being finite in the step from t = 0|infinite value at t = 0"):
        odeint(lambda t, y: y**3, 50 * torch.ones(2), T, **FINE)


def test_step_underflow_at_a_singularity() -> None:
    with pytest.raises(RuntimeError, match=r"fell below rounding at t = (0\.99|1\.0)"):
        odeint(lambda t, y: y * y, torch.ones(1, dtype=torch.float64), 2 * T, method="dopri5")


def test_too_many_steps() -> None:
    with pytest.raises(RuntimeError, match=r"max_num_steps = 10 was reached at t = .*raise max_num_steps"):
        odeint(lambda t, y: torch.cos(50 * t) * y, torch.ones(2), 100 * T, options={"max_num_steps": 10})


def test_a_shortest_step_that_is_too_long() -> None:
    """It was tried 100,000 times."""
    with pytest.raises(
        RuntimeError, match=r"a step of min_step = 0\.1 from t = 0\.\d+ has an error that is not finite"
    ):
        odeint(lambda t, y: -1e9 * y**3, torch.ones(2), T, options={"min_step": 0.1})


def test_tolerances_without_effect_warn() -> None:
    with pytest.warns(UserWarning, match="rtol and atol have no effect"):
        odeint(decay, torch.ones(2), T, rtol=1e-3, **FINE)


def test_one_single_step_warns() -> None:
    with pytest.warns(UserWarning, match="takes a single one from each time to the next: pass options"):
        odeint(decay, torch.ones(2), T, method="rk4")


NUMBERS = st.floats(allow_nan=True, allow_infinity=True, width=32) | st.integers(-3, 3)


def outcome(times: list[float], y0: Any, **solve: Any) -> Any:
    """What comes back from the door: a solution or one of its errors; any other error is a failure."""
    t = torch.tensor(times, dtype=torch.float64).clamp(-1e3, 1e3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            return odeint(decay, y0, t, **solve)
        except (ValueError, TypeError, RuntimeError) as error:
            return error


def is_explained(outcome: Any) -> bool:
    return len(str(outcome).split()) > 5 if isinstance(outcome, Exception) else bool(torch.isfinite(outcome).all())


@given(
    times=st.lists(NUMBERS, max_size=4),
    y0=st.sampled_from([torch.ones(2), torch.ones(()), torch.ones(2, dtype=torch.int32), torch.ones(0), None, (), "y"]),
    method=st.sampled_from(["rk4", "alf", "leapfrog", "nonsense", None]),
    options=st.dictionaries(
        st.sampled_from(["step_size", "first_step", "max_step", "safety", "coupling", "eta", "bogus"]),
        st.floats(0.5, 2.0) | st.sampled_from([0.0, -1.0, math.nan, math.inf]),
        max_size=2,
    ),
    rtol=st.none() | NUMBERS,
    gradient=st.sampled_from([None, "reversible", "checkpoint", "direct", "none"]),
    restarts=st.sampled_from(["auto", None, 3, 0, -1, "x"]),
)
def test_the_door_solves_or_says_why_not(times: list[float], y0: Any, **solve: Any) -> None:
    """Whatever comes in: a finite solution, or one of our errors with a sentence; no other error, and no hanging."""
    assert is_explained(outcome(times, y0, **solve))

"""Adaptive steps, and iterations until convergence, inside torch.vmap: samples share steps that meet the tolerance of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacrev, jvp, vmap

from revsolve import BrownianPath, HermitePath, LinearPath, cdeint, fixed_point, odeint, sdeint
from tests.front_doors import difference, make_y0

EXACT = 1e-12  # relative; the order of summation, and rounding of undone steps
TOLERANCE = 1e-6
MATRIX = torch.tensor([[0.3, -2.0, 0.1], [2.0, -0.1, 0.4], [0.5, 0.2, -0.7]], dtype=torch.float64)
TIMES = [0.0, 0.7, 2.0]
Tolerant = {"rtol": TOLERANCE, "atol": TOLERANCE}
WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "dopri5": {"method": "dopri5"},
    "reversible_heun": {"method": "reversible_heun", "rtol": 1e-3, "atol": 1e-3},
    "alf": {"method": "alf", "rtol": 1e-3, "atol": 1e-3},
    "direct": {"gradient": "direct", "restarts": 4},
}
every_way = pytest.mark.parametrize("way", WAYS)


def field(rate: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda t, y: torch.sin(rate * y) @ MATRIX + torch.cos(t)


def through_odeint(rate: Tensor, y0: Tensor, **settings: Any) -> Any:
    return odeint(field(rate), y0, TIMES, **{**Tolerant, **settings})


def through_cdeint(rate: Tensor, y0: Tensor, **settings: Any) -> Any:
    t = torch.linspace(0.0, 2.0, 9, dtype=torch.float64)
    path = HermitePath(torch.stack([t, torch.sin(2 * t)], -1).expand(*y0.shape[:-1], 9, 2), t)
    slopes = torch.tensor([1.0, -0.5], dtype=torch.float64)
    func = lambda t, z: (torch.sin(rate * z) @ MATRIX).unsqueeze(-1) * slopes  # noqa: E731
    settings = {"method": "rev_dopri5", **Tolerant, **settings}
    out = cdeint(path, func, y0, TIMES, **settings)
    return out.movedim(-2, 0) if isinstance(out, Tensor) else out


def through_sdeint(rate: Tensor, y0: Tensor, **settings: Any) -> Any:
    sde = (field(rate), lambda t, y: 0.2 * torch.sin(y) + 0.3)
    return sdeint(sde, y0, TIMES, **{"adaptive": True, "dt": 0.1, "rtol": 1e-2, "atol": 1e-2, **settings})


DOORS: dict[str, Callable[..., Any]] = {"odeint": through_odeint, "cdeint": through_cdeint, "sdeint": through_sdeint}
every_door = pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
LOOSE: dict[str, Any] = {"rtol": 1e3, "atol": 1e3, "options": {"max_step": 0.1}}
RATE = torch.tensor(0.8, dtype=torch.float64)


def seeded(call: Callable[[], Any]) -> Any:
    torch.manual_seed(1)
    return call()


def samples() -> Tensor:
    return make_y0().detach() * 3


def recorded(solve: Callable[..., Any], **settings: Any) -> list[float]:
    """The steps that samples take inside vmap."""
    found: list[Any] = []

    def of_one(y: Tensor) -> Tensor:
        found.append(solve(RATE, y, full_output=True, **settings))
        return found[0].ys

    vmap(of_one)(samples())
    return list(found[0].times)


@every_way
def test_every_sample_is_as_accurate_as_alone(way: str) -> None:
    y0, settings = samples(), {**Tolerant, **WAYS[way]}
    found = vmap(lambda y: through_odeint(RATE, y, **settings), out_dims=1)(y0)
    exact = through_odeint(RATE, y0, rtol=1e-11, atol=1e-11)
    alone = torch.stack([through_odeint(RATE, y, **settings) for y in y0], 1)
    error, error_alone = ((x - exact).abs().amax(dim=(0, 2)) for x in (found, alone))
    # Steps short enough for the worst sample do the others good, but for errors that cancel by chance.
    assert bool((error <= 5 * error_alone + settings["atol"]).all())


def test_the_largest_error_of_a_sample_counts() -> None:
    """One hard sample among many easy ones: a norm over all of them would let its error grow by the root of their number."""
    rates = torch.full((400,), 1e-3, dtype=torch.float64)
    rates[7] = 40.0
    solve = lambda r, **way: odeint(lambda t, y: torch.cos(r * t)[None] * r, torch.zeros(1).double(), [0.0, 3.0], **way)  # noqa: E731
    settings = {"method": "dopri5", "rtol": 1e-12, "atol": 1e-5}
    steps = []

    def of_one(r: Tensor) -> Tensor:
        solution = solve(r, full_output=True, **settings)
        steps.append(solution.stats.num_steps)
        return solution.ys[-1, 0]

    found = vmap(of_one)(rates)
    assert float((found - torch.sin(3 * rates)).abs().max()) < 1e-4
    assert steps[0] == pytest.approx(solve(rates[7], full_output=True, **settings).stats.num_steps, abs=2)


@pytest.mark.parametrize("door", [through_odeint, through_cdeint])
def test_vmap_is_the_solve_of_the_batch_on_the_same_steps(door: Callable[..., Any]) -> None:
    """Restarts at a fixed interval, for a batch solved as one state looks at another norm."""
    y0, times = samples(), recorded(door, restarts=4)
    found = vmap(lambda y: door(RATE, y, restarts=4), out_dims=1)(y0)
    assert len(times) > 4
    options = {"grid_constructor": lambda *_: times}
    wanted = door(RATE, y0, restarts=4, options=options, rtol=None, atol=None)
    assert difference([found], [wanted]) < EXACT


@pytest.mark.parametrize("door", [through_odeint, through_cdeint])
@pytest.mark.parametrize("gradient", [None, "checkpoint"])
def test_per_sample_gradients_are_exact_on_the_recorded_steps(door: Callable[..., Any], gradient: str | None) -> None:
    y0, times = samples(), recorded(door, restarts=4)
    loss = lambda r, y, **way: door(r, y, restarts=4, **way).square().sum()  # noqa: E731
    per_sample = vmap(grad(lambda r, y: loss(r, y, gradient=gradient), argnums=(0, 1)), in_dims=(None, 0))
    found = per_sample(RATE, y0)
    given = {"options": {"grid_constructor": lambda *_: times}, "rtol": None, "atol": None, "gradient": "direct"}
    leaves = [(RATE.clone().requires_grad_(), y.clone().requires_grad_()) for y in y0]
    rows = [torch.autograd.grad(loss(*pair, **given), pair) for pair in leaves]
    assert difference(list(found), [torch.stack(column) for column in zip(*rows, strict=True)]) < EXACT


@every_door
def test_per_sample_gradients_are_those_of_the_direct_mode(door: Callable[..., Any]) -> None:
    """Both choose the same steps, those of all samples; but those of a rough path change with the last digit, so it gets none."""
    y0 = samples()
    settings = {"restarts": 4, **(LOOSE if door is through_sdeint else {})}

    def found(gradient: str | None) -> list[Tensor]:
        loss = lambda r, y: door(r, y, gradient=gradient, **settings).square().sum()  # noqa: E731
        per_sample = vmap(grad(loss, argnums=(0, 1)), in_dims=(None, 0), randomness="different")
        return list(seeded(lambda: per_sample(RATE, y0)))

    assert difference(found(None), found("direct")) < EXACT


def test_noise_of_each_sample_is_that_of_its_batch() -> None:
    """With a tolerance that any step meets, vmap and the batch take the same steps."""
    solve = lambda y: through_sdeint(RATE, y, restarts=4, **LOOSE)  # noqa: E731
    found = seeded(lambda: vmap(solve, out_dims=1, randomness="different")(samples()))
    assert difference([found], [seeded(lambda: solve(samples()))]) < EXACT


@pytest.mark.parametrize("path", ["given", "shared"])
def test_one_brownian_path_for_all_samples(path: str) -> None:
    bm = BrownianPath(0.0, 2.0, (3,), seed=0, dtype=torch.float64) if path == "given" else None
    settings = {"bm": bm, "rtol": 1e-4, "atol": 1e-4, "restarts": 4}
    found = seeded(lambda: vmap(lambda y: through_sdeint(RATE, y, **settings), randomness="same")(samples()))
    alone = torch.stack([seeded(lambda y=y: through_sdeint(RATE, y, **settings)) for y in samples()])
    # The same path, so that samples differ by the errors of their steps only: a hundred tolerances, where noise is 0.3.
    assert float((found - alone).abs().max()) < 1e-2


def test_kinks_of_a_path_are_met() -> None:
    t = torch.linspace(0.0, 2.0, 5, dtype=torch.float64)
    data = torch.randn(4, 5, 1, dtype=torch.float64)
    solve = lambda x, z, **way: cdeint(LinearPath(x, t), lambda t, z: torch.sin(z).unsqueeze(-1), z, [0.0, 2.0], **way)  # noqa: E731
    settings = {"method": "dopri5", **Tolerant}
    found = vmap(lambda x, z: solve(x, z, **settings))(data, samples())
    assert difference([found], [solve(data, samples(), method="dopri5", rtol=1e-10, atol=1e-10)]) < 1e-5


def test_transforms_around_each_other() -> None:
    y0, loss = samples(), lambda y: through_odeint(RATE, y, restarts=4).square().sum()
    twice = vmap(vmap(grad(loss)))(torch.stack([y0, y0.flip(0)]))
    assert difference([twice[0]], [twice[1].flip(0)]) < EXACT
    rows = vmap(jacrev(lambda y: through_odeint(RATE, y, restarts=4)[-1]))(y0)
    pushed = vmap(lambda y: jvp(lambda y: through_odeint(RATE, y, restarts=4)[-1], (y,), (y,))[1])(y0)
    assert difference([torch.einsum("bij,bj->bi", rows, y0)], [pushed]) < EXACT
    assert difference([vmap(jacrev(jacrev(loss)))(y0)], [vmap(hessian(loss))(y0)]) < 1e-9  # another rounding twice over


def test_times_with_gradients_and_an_ensemble() -> None:
    rates, t, y0 = torch.tensor([0.5, 1.0, 1.5]).double(), torch.tensor(TIMES, dtype=torch.float64), samples()
    loss = lambda r, t, **way: odeint(field(r), y0, t, **Tolerant, restarts=4, **way).square().sum()  # noqa: E731
    found = vmap(grad(loss, argnums=(0, 1)), in_dims=(0, None))(rates, t)
    direct = vmap(grad(lambda r, t: loss(r, t, gradient="direct"), argnums=(0, 1)), in_dims=(0, None))(rates, t)
    assert difference(list(found), list(direct)) < EXACT


def test_a_norm_of_the_users_and_tolerances_of_each_part() -> None:
    """The norm sees one sample at a time, and its parts."""
    seen: list[Any] = []

    def norm(state: dict[str, Tensor]) -> Tensor:
        seen.append({name: x.shape for name, x in state.items()})
        return torch.maximum(state["a"].abs().max(), state["b"].abs().max())

    def solve(y: Tensor) -> Tensor:
        func = lambda t, s: {"a": torch.sin(s["b"]).sum(-1), "b": -s["b"]}  # noqa: E731
        tolerances = {"a": 1e-6, "b": 1e-8}
        state = {"a": y[..., 0], "b": y}
        options = {"norm": norm}
        return odeint(func, state, [0.0, 1.0], method="dopri5", rtol=tolerances, atol=tolerances, options=options)["b"]

    assert difference([vmap(solve)(samples())[:, -1]], [samples() * torch.exp(torch.tensor(-1.0)).double()]) < 1e-6
    assert seen[-1] == {"a": torch.Size([]), "b": torch.Size([3])}


def test_complex_states() -> None:
    solve = lambda y, **way: odeint(lambda t, y: 2j * y * (1 - 0.1 * y), y, [0.0, 1.0], **Tolerant, **way)[-1]  # noqa: E731
    y0 = torch.complex(samples(), samples().flip(0))
    loss = lambda y, **way: solve(y, restarts=4, **way).abs().square().sum()  # noqa: E731
    assert difference([vmap(solve)(y0)], [solve(y0)]) < 1e-5
    direct = vmap(grad(lambda y: loss(y, gradient="direct")))(y0)
    assert difference([vmap(grad(loss))(y0)], [direct]) < EXACT


@pytest.mark.parametrize("gradient", [None, "direct"])
def test_a_sample_that_is_lost_raises(gradient: str | None) -> None:
    solve = lambda y: odeint(lambda t, y: y**2, y, [0.0, 1.0], gradient=gradient, **Tolerant)  # noqa: E731
    with pytest.raises(RuntimeError, match=r"the step size fell below rounding at t = 0\.5"):
        vmap(solve)(torch.tensor([[0.1], [2.0]], dtype=torch.float64))


def test_dense_output_of_a_sample() -> None:
    def at(y: Tensor) -> Tensor:
        solution = odeint(lambda t, y: -y, y, TIMES, options={"dense": True}, full_output=True, **Tolerant)
        return solution.evaluate(1.3)

    assert difference([vmap(at)(samples())], [samples() * torch.exp(torch.tensor(-1.3)).double()]) < 1e-5


def test_a_callback_sees_all_samples() -> None:
    told: list[Any] = []
    vmap(lambda y: through_odeint(RATE, y, callback=told.append))(samples())
    assert told[-1].t == TIMES[-1]
    assert told[-1].y.shape == samples().shape


def test_steps_of_each_samples_own_are_refused() -> None:
    t, y0 = torch.tensor(TIMES, dtype=torch.float64)[:, None].expand(3, 4), samples()
    solve = lambda r: odeint(lambda t, y: -r * y, y0, t, options={"steps_of_each": True})  # noqa: E731
    with pytest.raises(ValueError, match=r"steps_of_each .* inside torch\.vmap"):
        vmap(solve)(torch.ones(2, dtype=torch.float64))


CELL = 0.4 * MATRIX / MATRIX.norm()


def equilibrium(rate: Tensor, y: Tensor, **settings: Any) -> Any:
    f = lambda z: torch.tanh(rate * z @ CELL + y)  # noqa: E731
    return fixed_point(f, torch.zeros_like(y), **{"tol": 1e-9, "beta": 0.5, "max_steps": 100, **settings})


ITERATIONS: dict[str, dict[str, Any]] = {
    "reversible": {},
    "checkpoint": {"gradient": "checkpoint"},
    "direct": {"gradient": "direct"},
    "absolute": {"residual": "absolute"},
    "simple": {"method": "simple", "gradient": "direct"},
    "relaxed": {"method": "relaxed", "gradient": "phantom"},
    "anderson": {"method": "anderson", "gradient": "direct"},
}


@pytest.mark.parametrize("way", ITERATIONS)
def test_fixed_points_are_those_of_a_loop_to_the_tolerance(way: str) -> None:
    settings, steps = ITERATIONS[way], []

    def of_one(y: Tensor) -> Tensor:
        solution = equilibrium(RATE, y, full_output=True, **settings)
        steps.append(solution.stats.num_steps)
        assert float(solution.residual) < 1e-9
        assert bool(solution.converged)
        return solution.z

    found = vmap(of_one)(samples())
    alone = [equilibrium(RATE, y, full_output=True, **settings) for y in samples()]
    assert difference([found], [torch.stack([solution.z for solution in alone])]) < 1e-8
    assert steps[0] == max(solution.stats.num_steps for solution in alone)


@pytest.mark.parametrize("way", ["reversible", "checkpoint"])
def test_gradients_of_fixed_points(way: str) -> None:
    loss = lambda r, y, **more: equilibrium(r, y, **more).square().sum()  # noqa: E731
    per_sample = lambda **more: vmap(grad(lambda r, y: loss(r, y, **more), argnums=(0, 1)), in_dims=(None, 0))  # noqa: E731
    found, wanted = (f(RATE, samples()) for f in (per_sample(**ITERATIONS[way]), per_sample(gradient="direct")))
    assert difference(list(found), list(wanted)) < EXACT


def test_an_iteration_that_does_not_converge_warns() -> None:
    with pytest.warns(UserWarning, match="has not converged: after 3 steps"):
        vmap(lambda y: equilibrium(RATE, y, max_steps=3))(samples())


def test_samples_that_stop_by_themselves_are_refused() -> None:
    with pytest.raises(ValueError, match=r"stop='sample' .* outside of torch\.vmap"):
        vmap(lambda y: equilibrium(RATE, y[None], stop="sample"))(samples())

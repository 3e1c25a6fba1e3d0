"""torch.func around a solve: the gradients of `direct`, the solves of a loop, at the memory of undone steps."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from revsolve import HermitePath, LinearPath, NaturalCubicPath, cdeint, fixed_point, odeint, odeint_event, sdeint
from tests.front_doors import DOORS, SIZE, difference, make_net, make_y0

EXACT = 1e-12  # relative; the order of summation, and rounding of undone steps

# Restarts that look at values look at those of a whole batch, so a loop would place them elsewhere.
FIXED: dict[str, dict[str, Any]] = {door: {} if door == "fixed_point" else {"restarts": 4} for door in DOORS}
every_door = pytest.mark.parametrize("door", DOORS)
Params = dict[str, Tensor]


def params_of(net: nn.Module) -> Params:
    return {name: p.detach() for name, p in net.named_parameters()}


class Solve:
    """A front door as a function of parameters and of one sample, (SIZE,), or of a batch of them, (BATCH, SIZE)."""

    def __init__(self, door: str, net: nn.Module, **settings: Any) -> None:
        self.door, self.net, self.settings = DOORS[door], net, {**FIXED[door], **settings}

    def batch(self, params: Params, y0: Tensor) -> Tensor:
        """All outputs of every sample, (BATCH, outputs)."""
        out = self.door(lambda y: functional_call(self.net, params, (y,)), y0, **self.settings)
        return out.reshape(-1, *y0.shape).movedim(0, -2).flatten(-2)

    def sample(self, params: Params, y0: Tensor) -> Tensor:
        return self.batch(params, y0[None])[0]

    def loss(self, params: Params, y0: Tensor) -> Tensor:
        return self.sample(params, y0).square().sum()

    def total(self, params: Params, y0: Tensor) -> Tensor:
        return self.batch(params, y0).square().sum()


def seeded(call: Callable[[], Any]) -> Any:
    torch.manual_seed(1)  # noise of the equation, and of the field
    return call()


def plain_gradients(solve: Callable[[Params, Tensor], Tensor], params: Params, y0: Tensor) -> list[Tensor]:
    """Of the function's value with respect to the state and the parameters, by plain autograd."""
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    y = y0.detach().requires_grad_()
    return list(torch.autograd.grad(seeded(lambda: solve(leaves, y)), [y, *leaves.values()]))


@pytest.fixture
def net(device: torch.device) -> nn.Module:
    return make_net(device=device)


@pytest.fixture
def y0(device: torch.device) -> Tensor:
    return make_y0(device=device).detach()


@every_door
def test_grad_of_state_and_parameters(door: str, net: nn.Module, y0: Tensor) -> None:
    params = params_of(net)
    by_params, by_y0 = seeded(lambda: grad(Solve(door, net).total, argnums=(0, 1))(params, y0))
    wanted = plain_gradients(Solve(door, net, gradient="direct").total, params, y0)
    assert difference([by_y0, *by_params.values()], wanted) < EXACT


@every_door
def test_vjp_and_jacrev(door: str, net: nn.Module, y0: Tensor) -> None:
    params = params_of(net)
    final = lambda y: Solve(door, net).batch(params, y)  # noqa: E731
    wanted = seeded(
        lambda: torch.autograd.functional.jacobian(
            lambda y: Solve(door, net, gradient="direct").batch(params, y), y0, vectorize=False
        )
    )
    assert difference([seeded(lambda: jacrev(final)(y0))], [wanted]) < EXACT
    out, pull = seeded(lambda: vjp(final, y0))
    weights = torch.randn_like(out)
    assert difference([pull(weights)[0]], [torch.einsum("ij,ijkl->kl", weights, wanted)]) < EXACT


@every_door
def test_forward_mode_agrees_with_reverse_mode(door: str, net: nn.Module, y0: Tensor) -> None:
    final = lambda y: Solve(door, net).sample(params_of(net), y)  # noqa: E731
    direction = torch.randn_like(y0[0])
    reverse = seeded(lambda: jacrev(final)(y0[0]))
    assert difference([seeded(lambda: jvp(final, (y0[0],), (direction,)))[1]], [reverse @ direction]) < EXACT
    assert difference([seeded(lambda: jacfwd(final, randomness="same")(y0[0]))], [reverse]) < EXACT


@pytest.mark.parametrize("dim", [0, 1])
@every_door
def test_vmap_is_the_solve_of_the_whole_batch(door: str, dim: int, net: nn.Module, y0: Tensor) -> None:
    params = params_of(net)
    over_samples = vmap(Solve(door, net).sample, in_dims=(None, dim), out_dims=dim, randomness="different")
    found = seeded(lambda: over_samples(params, y0.movedim(0, dim))).movedim(dim, 0)
    assert difference([found], [seeded(lambda: Solve(door, net).batch(params, y0))]) < EXACT


@every_door
def test_per_sample_gradients(door: str, net: nn.Module, y0: Tensor) -> None:
    params = params_of(net)
    per_sample = vmap(grad(Solve(door, net).loss), in_dims=(None, 0), randomness="different")
    found = seeded(lambda: per_sample(params, y0))
    direct = Solve(door, net, gradient="direct")
    rows = [
        plain_gradients(lambda p, y, i=i: direct.batch(p, y)[i].square().sum(), params, y0)[1:] for i in range(len(y0))
    ]
    wanted = [torch.stack(column) for column in zip(*rows, strict=True)]
    assert difference(list(found.values()), wanted) < EXACT


@every_door
def test_per_sample_jacobians(door: str, net: nn.Module, y0: Tensor) -> None:
    """A batch of cotangents within a batch of samples, whose noise they share."""
    params, final = params_of(net), Solve(door, net).sample
    found = seeded(lambda: vmap(jacrev(final, argnums=1), in_dims=(None, 0), randomness="different")(params, y0))
    weights = torch.randn_like(found[..., 0])
    wanted = plain_gradients(lambda p, y: (weights * Solve(door, net, gradient="direct").batch(p, y)).sum(), params, y0)
    assert difference([torch.einsum("bi,bij->bj", weights, found)], wanted[:1]) < EXACT


@every_door
def test_vmap_over_parameters_is_an_ensemble(door: str, net: nn.Module, y0: Tensor) -> None:
    params = params_of(net)
    members = [params, {name: 2 * p for name, p in params.items()}]
    stacked = {name: torch.stack([member[name] for member in members]) for name in params}
    ensemble = vmap(grad(Solve(door, net).total), in_dims=(0, None), randomness="same")
    found = seeded(lambda: ensemble(stacked, y0))
    rows = [plain_gradients(Solve(door, net, gradient="direct").total, member, y0)[1:] for member in members]
    assert difference(list(found.values()), [torch.stack(column) for column in zip(*rows, strict=True)]) < EXACT


@pytest.mark.parametrize("transform", [hessian, lambda f: jacrev(jacrev(f)), lambda f: jacrev(jacfwd(f))])
@every_door
def test_second_derivatives(door: str, transform: Callable[..., Any], net: nn.Module, y0: Tensor) -> None:
    params = params_of(net)
    loss = lambda y, **mode: Solve(door, net, **{**quiet(door, y0.device), **mode}).loss(params, y)  # noqa: E731
    wanted = torch.autograd.functional.hessian(lambda y: loss(y, gradient="direct"), y0[0])
    assert difference([transform(loss)(y0[0])], [wanted]) < EXACT


def quiet(door: str, device: torch.device) -> dict[str, Any]:
    """With a given path: forward mode would have to draw one inside of a torch.vmap of its own."""
    return {"bm": Still(device)} if door == "sdeint" else {}


class Still:
    """A Brownian motion for one sample that goes straight ahead."""

    shape, dtype, levy_area_approximation = (1, SIZE), torch.float64, "none"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, ta: float, tb: float) -> Tensor:
        return torch.full(self.shape, tb - ta, dtype=self.dtype, device=self.device)


@every_door
def test_transforms_within_plain_autograd(door: str, net: nn.Module, y0: Tensor) -> None:
    """A penalty on per-sample gradients, which the parameters of the module itself train on."""
    names = dict(net.named_parameters())

    def found() -> Tensor:
        slopes = vmap(grad(Solve(door, net).loss, argnums=1), in_dims=(None, 0), randomness="different")(names, y0)
        return slopes.square().sum()

    def wanted() -> Tensor:
        y = y0.clone().requires_grad_()
        total = Solve(door, net, gradient="direct").total(names, y)
        return torch.autograd.grad(total, y, create_graph=True)[0].square().sum()

    parameters = list(net.parameters())[:-1]
    a, b = (
        list(torch.autograd.grad(seeded(penalty), parameters, materialize_grads=True)) for penalty in (found, wanted)
    )
    assert difference(a, b) < EXACT


METHODS = ["rk4", "rev_rk4", "rev_dopri5", "reversible_heun", "alf4", "leapfrog"]
TIMES = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)


def restarted(method: str) -> dict[str, Any]:
    return {} if method == "rk4" else {"restarts": 4}  # plain methods have none


@pytest.mark.parametrize("method", METHODS)
def test_every_kind_of_method_and_the_times(method: str) -> None:
    net, y0 = make_net(), make_y0().detach()
    settings = {"method": method, "options": {"step_size": 0.1}, **restarted(method)}

    def loss(y: Tensor, t: Tensor, **mode: Any) -> Tensor:
        return odeint(lambda s, x: net(x) * torch.cos(s), y, t, **settings, **mode).square().sum()

    found = vmap(grad(loss, argnums=(0, 1)), in_dims=(0, None))(y0, TIMES)
    y, t = y0.clone().requires_grad_(), TIMES.clone().requires_grad_()
    rows = [torch.autograd.grad(loss(one, t, gradient="direct"), [y, t]) for one in y]
    wanted = [sum(row[0] for row in rows), torch.stack([row[1] for row in rows])]
    assert difference(list(found), wanted) < EXACT


@pytest.mark.parametrize("kind", [LinearPath, HermitePath, NaturalCubicPath])
@pytest.mark.parametrize("method", ["reversible_heun", "rev_rk4"])
def test_per_sample_gradients_of_the_data_of_a_path(kind: Any, method: str) -> None:
    """Gaps in some samples' data included."""
    net, y0 = make_net(), make_y0().detach()
    data = torch.randn(len(y0), 6, 2, dtype=torch.float64).cumsum(1)
    data[1, 2, 0] = torch.nan

    def loss(x: Tensor, y: Tensor, **mode: Any) -> Tensor:
        field = lambda t, z: torch.stack([net(z), z], -1)  # noqa: E731
        steps = {} if method == "reversible_heun" else {"options": {"step_size": 0.5}}
        return cdeint(kind(x), field, y, [0.0, 5.0], method=method, restarts=4, **steps, **mode).square().sum()

    found = vmap(vmap(grad(loss), in_dims=(0, 0)), in_dims=(None, 0))(data, torch.stack([y0, 2 * y0]))
    direct = lambda y: torch.autograd.functional.jacobian(lambda x: loss(x, y, gradient="direct"), data)  # noqa: E731
    assert difference([found], [torch.stack([direct(y0), direct(2 * y0)])]) < EXACT


def test_what_is_wrong_with_the_data_of_one_sample_is_told_inside_vmap() -> None:
    data = torch.ones(4, 6, 2)
    data[2, 3, 1] = torch.inf
    with pytest.raises(ValueError, match=r"x is infinite in channel 1 at row 3 of sample \[2\]"):
        vmap(lambda x: LinearPath(x).evaluate(1.5))(data)


def test_times_of_each_sample() -> None:
    net, y0 = make_net(), make_y0().detach()
    t = torch.stack([TIMES, 2 * TIMES, TIMES + 1, TIMES], dim=1)

    def final(t: Tensor, **mode: Any) -> Tensor:
        field = lambda s, y: net(y) * torch.cos(s)[:, None]  # noqa: E731
        return odeint(field, y0, t, method="rev_rk4", options={"step_size": 0.2}, restarts=4, **mode)[-1, :, 0]

    wanted = torch.autograd.functional.jacobian(lambda t: final(t, gradient="direct"), t)
    assert difference([jacrev(final)(t)], [wanted]) < EXACT


def test_second_derivatives_by_the_times() -> None:
    net, y0 = make_net(), make_y0().detach()

    def loss(t: Tensor, **mode: Any) -> Tensor:
        field = lambda s, x: net(x) * torch.cos(s)  # noqa: E731
        return odeint(field, y0, t, method="rev_rk4", options={"step_size": 0.1}, restarts=4, **mode).square().sum()

    wanted = torch.autograd.functional.hessian(lambda t: loss(t, gradient="direct"), TIMES)
    assert difference([jacrev(jacrev(loss))(TIMES)], [wanted]) < EXACT


def test_adaptive_steps_under_grad_are_those_of_plain_autograd() -> None:
    net, y0 = make_net(), make_y0().detach()
    loss = lambda y: odeint(lambda t, x: net(x), y, TIMES, rtol=1e-5, atol=1e-5).square().sum()  # noqa: E731
    assert difference([grad(loss)(y0)], [torch.autograd.functional.jacobian(loss, y0)]) < EXACT


@pytest.mark.parametrize("randomness", ["same", "different"])
@every_door
def test_dropout_draws_the_same_forward_and_backward(door: str, randomness: str) -> None:
    """Were the draws others when steps are undone, the certificate would warn, and warnings are errors."""
    net, y0 = make_net(lambda: nn.Dropout(0.5)), make_y0().detach()
    params, loss = params_of(net), Solve(door, net).loss
    by_grad = seeded(lambda: vmap(grad(loss), in_dims=(None, 0), randomness=randomness)(params, y0))
    by_jacrev = seeded(lambda: vmap(jacrev(loss), in_dims=(None, 0), randomness=randomness)(params, y0))
    assert difference(list(by_grad.values()), list(by_jacrev.values())) < EXACT


@every_door
def test_shared_dropout_is_that_of_a_loop(door: str) -> None:
    net, y0 = make_net(lambda: nn.Dropout(0.5)), make_y0().detach()
    params, solve = params_of(net), Solve(door, net)
    found = seeded(lambda: vmap(grad(solve.loss), in_dims=(None, 0), randomness="same")(params, y0))
    rows = [plain_gradients(Solve(door, net, gradient="direct").loss, params, y)[1:] for y in y0]
    assert difference(list(found.values()), [torch.stack(column) for column in zip(*rows, strict=True)]) < EXACT


@every_door
def test_autocast_of_the_forward_pass(door: str) -> None:
    net, y0 = make_net().float(), make_y0(torch.float32).detach()
    params, solve = params_of(net), Solve(door, net)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pull = seeded(lambda: vjp(lambda p: solve.total(p, y0), params))[1]
        wanted = plain_gradients(solve.total, params, y0)[1:]
    found = pull(torch.ones(()))[0]
    assert difference(list(found.values()), wanted) < 1e-2  # bfloat16 rounds; gradients are added up in another order


class Token:
    """Lives as long as the record of one evaluation."""


class Recorded(torch.autograd.Function):
    """The identity; tells how many evaluations are recorded at a time."""

    generate_vmap_rule = True
    tokens: ClassVar[weakref.WeakSet[Token]] = weakref.WeakSet()
    most = 0

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.token = Token()
        Recorded.tokens.add(ctx.token)
        Recorded.most = max(Recorded.most, len(Recorded.tokens))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


TRANSFORMS: dict[str, Callable[[Callable[..., Tensor]], Callable[..., Any]]] = {
    "grad": lambda loss: lambda params, y0: grad(loss)(params, y0[0]),
    "jacrev": lambda loss: lambda params, y0: jacrev(loss)(params, y0[0]),
    "per-sample gradients": lambda loss: vmap(grad(loss), in_dims=(None, 0)),
    "per-sample jacrev": lambda loss: vmap(jacrev(loss), in_dims=(None, 0)),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_no_more_evaluations_are_recorded_for_more_steps(transform: Callable[..., Any]) -> None:
    net, y0 = make_net(), make_y0().detach()

    def most_recorded(num_steps: int) -> int:
        def loss(params: Params, y: Tensor) -> Tensor:
            field = lambda t, x: Recorded.apply(functional_call(net, params, (x,)))  # noqa: E731
            options = {"step_size": 1.0 / num_steps}
            return odeint(field, y, [0.0, 1.0], method="rev_rk4", options=options, restarts=None).square().sum()

        Recorded.most = 0
        transform(loss)(params_of(net), y0)
        return Recorded.most

    few, many = most_recorded(2), most_recorded(16)
    assert few == many < 16


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_no_more_states_are_kept_for_more_steps(transform: Callable[..., Any]) -> None:
    net, y0 = make_net(), make_y0().detach()

    def kept(num_steps: int) -> set[int]:
        solutions = []

        def loss(params: Params, y: Tensor) -> Tensor:
            field = lambda t, x: functional_call(net, params, (x,))  # noqa: E731
            settings = {"method": "rev_rk4", "options": {"step_size": 1.0 / num_steps}, "restarts": None}
            solutions.append(odeint(field, y, [0.0, 1.0], full_output=True, **settings))
            return solutions[-1].ys.square().sum()

        transform(loss)(params_of(net), y0)
        return {solution.stats.num_stored_states for solution in solutions}

    assert kept(2) == kept(16) == {3}


def test_everything_is_freed() -> None:
    def traces() -> list[weakref.ref[Any]]:
        net, y0 = make_net(), make_y0().detach()
        params = params_of(net)
        found = vmap(grad(Solve("odeint", net).loss), in_dims=(None, 0))(params, y0)
        return [weakref.ref(x) for x in (net, y0, *params.values(), *found.values())]

    assert not [ref() for ref in traces() if ref() is not None]


def test_a_field_with_transforms_of_its_own() -> None:
    """The exact divergence of a continuous normalising flow, which a field computes by torch.func."""
    net, y0 = make_net(), make_y0().detach()
    params = params_of(net)

    def loss(params: Params, y: Tensor, **mode: Any) -> Tensor:
        def field(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            f = lambda x: functional_call(net, params, (x,))  # noqa: E731
            return f(state[0]), jacrev(f)(state[0]).trace()

        settings = {"method": "rev_rk4", "options": {"step_size": 0.25}, "restarts": 4, **mode}
        y1, divergence = odeint(field, (y, y.new_zeros(())), [0.0, 1.0], **settings)
        return y1[-1].square().sum() + divergence[-1]

    found = vmap(grad(loss), in_dims=(None, 0))(params, y0)
    rows = [plain_gradients(lambda p, y: loss(p, y, gradient="direct"), params, y)[1:] for y in y0]
    assert (
        difference(list(found.values())[:-1], [torch.stack(column) for column in zip(*rows, strict=True)][:-1]) < EXACT
    )


def test_tensors_that_a_transform_of_the_field_takes_from_outside() -> None:
    """No rule of ours can see them, so the transform differentiates the solve."""
    y0, rates = make_y0().detach()[:2]

    def loss(rates: Tensor) -> Tensor:
        field = lambda t, y: vmap(lambda a, b: torch.sin(a) * b)(y, rates)  # noqa: E731
        return odeint(field, y0, TIMES, method="rev_rk4", options={"step_size": 0.1}, restarts=4).sum()

    def plain(rates: Tensor) -> Tensor:
        field = lambda t, y: torch.sin(y) * rates  # noqa: E731
        return odeint(field, y0, TIMES, method="rev_rk4", options={"step_size": 0.1}, restarts=4).sum()

    assert difference([grad(loss)(rates)], [torch.autograd.functional.jacobian(plain, rates)]) < EXACT


def torch_sin(t: Tensor, y: Tensor) -> Tensor:
    return torch.sin(y)


def own_times(y: Tensor) -> Tensor:
    return odeint(lambda t, x: torch.sin(x), torch.ones(3), y.exp().cumsum(0), method="rk4")


def event(y: Tensor) -> Tensor:
    return odeint_event(lambda t, x: -x, y, torch.tensor(0.0), event_fn=lambda t, x: x - 0.5)[0]


REFUSED = [
    (own_times, "t must be the same for all samples inside torch.vmap"),
    (event, "an event is found by looking at numbers"),
]


@pytest.mark.parametrize(("solve", "message"), REFUSED, ids=lambda x: getattr(x, "__name__", ""))
def test_what_vmap_hides_is_refused_with_a_remedy(solve: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=message):
        vmap(solve, randomness="same")(make_y0().detach().abs())


def test_noise_that_vmap_was_not_told_of_is_refused() -> None:
    with pytest.raises(ValueError, match=r"noise would be drawn inside torch\.vmap.*pass bm="):
        vmap(lambda y: sdeint((torch_sin, torch_sin), y[None], [0.0, 1.0], dt=0.1))(make_y0().detach())


@pytest.mark.parametrize("gradient", ["reversible", "checkpoint"])
def test_undone_steps_are_refused_in_forward_mode(gradient: str) -> None:
    y0 = make_y0().detach()
    solve = lambda y: odeint(torch_sin, y, [0.0, 1.0], options={"step_size": 0.1}, gradient=gradient)  # noqa: E731
    with pytest.raises(ValueError, match=f"gradient='{gradient}' is not possible here"):
        jvp(solve, (y0,), (y0,))


def test_implicit_gradients_are_refused() -> None:
    with pytest.raises(ValueError, match=r"gradient='implicit' is not possible inside torch\.func"):
        grad(lambda y: fixed_point(torch.cos, y, method="simple").sum())(torch.ones(2))


@pytest.mark.parametrize("over", [lambda f: f, vmap], ids=["grad", "per-sample gradients"])
def test_what_the_field_did_not_use_at_first_is_not_lost(over: Callable[..., Any]) -> None:
    def loss(rate: Tensor) -> Tensor:
        hidden = iter([rate]).__reduce__  # a bound method of a builtin iterator: no search goes there
        field = lambda t, y: hidden()[1][0][0] * y if t > 0.5 else y  # noqa: E731
        return odeint(field, torch.ones(2), [0.0, 1.0], method="rev_rk4", options={"step_size": 0.1}).sum()

    with pytest.raises(RuntimeError, match="did not use when it was first called"):
        over(grad(loss))(torch.ones(3) if over is vmap else torch.ones(()))


@pytest.mark.parametrize(
    ("over", "message"),
    [(lambda f: f, "the field returned"), (vmap, "a sample is not finite")],
    ids=["grad", "per-sample gradients"],
)
def test_a_state_that_is_not_finite_raises(over: Callable[..., Any], message: str) -> None:
    loss = lambda y: odeint(lambda t, x: 1e9 * x**9, y, [0.0, 1.0], options={"step_size": 0.1}).sum()  # noqa: E731
    with pytest.raises(RuntimeError, match=message):
        over(grad(loss))(make_y0().detach())

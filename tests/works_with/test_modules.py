"""Modules as fields: hooks, frozen and shared parameters, torch.compile, copies, export; tensors changed too early raise."""

import copy
import io
import multiprocessing
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from revsolve import Restarts, RevDEQ, Tableau, alf, odeint, reversible, reversible_heun
from tests.front_doors import DOORS, SIZE, difference, gradients, make_net, make_y0
from tests.solving_modules import MODULES, Flow, Injected, final_state

EXACT = 1e-12  # relative; the order of summation, and rounding of undone steps

every_door = pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
# torch.export looks at the .grad of tensors that are no leaves; that of torch 2.6 warns of nodes of its own.
exporting = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore:The .grad attribute:UserWarning",
    r"ignore:[\s\S]*get_attr:UserWarning",
)
replayed = pytest.mark.parametrize("gradient", ["reversible", "checkpoint"])


@replayed
@every_door
def test_hooks_see_the_gradient_of_a_parameter_once(door: Any, gradient: str, device: torch.device) -> None:
    net, y0, seen = make_net(device=device), make_y0(device=device), []
    weight = net.first.weight
    weight.register_hook(lambda grad: seen.append("hook") or 2 * grad)
    weight.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))
    wanted = gradients(door, net, y0, gradient="direct")
    seen.clear()
    torch.manual_seed(1)
    door(net, y0, gradient=gradient).square().sum().backward()
    assert seen == ["hook", "accumulated"]
    assert difference([y0.grad, *(p.grad for p in net.parameters())], wanted) < EXACT


@replayed
def test_hooks_and_kept_gradients_of_results_from_outside(gradient: str) -> None:
    def derivatives(gradient: str) -> list[Tensor]:
        net, code = make_net(), make_y0()
        first = torch.sin(code)
        second = 2 * first
        second.register_hook(lambda grad: 3 * grad)
        out = DOORS["odeint"](lambda y: net(y) * first + second, make_y0(), gradient=gradient)
        first.retain_grad()
        out.square().sum().backward()
        return [code.grad, first.grad]

    assert difference(derivatives(gradient), derivatives("direct")) < EXACT


@replayed
@every_door
def test_forward_hooks_run_in_every_evaluation(door: Any, gradient: str, device: torch.device) -> None:
    net, y0 = make_net(device=device), make_y0(device=device)
    net.first.register_forward_hook(lambda module, args, out: torch.sin(out))
    net.last.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    wanted = gradients(door, net, y0, gradient="direct")
    assert difference(gradients(door, net, y0, gradient=gradient), wanted) < EXACT


@every_door
def test_frozen_parameters_get_no_gradient(door: Any, device: torch.device) -> None:
    net, y0 = make_net(device=device), make_y0(device=device)
    net.first.requires_grad_(False)
    wanted = gradients(door, net, y0, gradient="direct")
    assert difference(gradients(door, net, y0), wanted) < EXACT
    door(net, y0).sum().backward()
    assert net.first.weight.grad is None
    assert net.last.weight.grad is not None


def test_a_frozen_field_gives_the_gradient_of_the_state() -> None:
    net, y0 = make_net().requires_grad_(False), make_y0()
    wanted = gradients(DOORS["odeint"], net, y0, gradient="direct")
    assert difference(gradients(DOORS["odeint"], net, y0), wanted) < EXACT


@every_door
def test_shared_parameters_get_the_sum(door: Any, device: torch.device) -> None:
    def tied() -> nn.Module:
        return nn.Linear(8, 8)

    net, y0 = make_net(tied, nn.Tanh, tied, device=device), make_y0(device=device)
    net.middle[2].weight = net.middle[0].weight
    net.middle[2].bias = nn.Parameter(net.middle[0].bias.detach())  # shares memory, but is a parameter of its own
    wanted = gradients(door, net, y0, gradient="direct")
    assert difference(gradients(door, net, y0), wanted) < EXACT


def change_parameter(net: nn.Module, constant: Tensor) -> None:
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    with torch.no_grad():
        net.first.weight.mul_(2.0)


def change_frozen(net: nn.Module, constant: Tensor) -> None:
    net.last.weight.mul_(2.0)


def change_buffer(net: nn.Module, constant: Tensor) -> None:
    net.middle[0].running_mean.add_(1.0)


def change_constant(net: nn.Module, constant: Tensor) -> None:
    constant.add_(1.0)


CHANGES = [change_parameter, change_frozen, change_buffer, change_constant]


@pytest.mark.parametrize("gradient", ["reversible", "checkpoint", "direct"])
@pytest.mark.parametrize("change", CHANGES)
@every_door
def test_what_is_changed_before_the_backward_pass_raises(
    door: Any, change: Callable[..., None], gradient: str, device: torch.device
) -> None:
    net, constant = (
        make_net(lambda: nn.BatchNorm1d(8), device=device).eval(),
        torch.ones(SIZE).to(make_y0(device=device)),
    )
    net.last.requires_grad_(False)
    out = door(lambda y: net(y) * constant, make_y0(device=device), gradient=gradient).sum()
    change(net, constant)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@replayed
def test_what_the_field_does_not_use_may_be_changed(gradient: str) -> None:
    net, y0 = make_net(), make_y0()
    net.average = copy.deepcopy(net.first).requires_grad_(False)
    out = DOORS["odeint"](net, y0, gradient=gradient).sum()
    net.average.weight.mul_(0.9)
    out.backward()
    assert net.first.weight.grad is not None


# torch's own first compilation warns of what torch deprecates; so does its look at the .grad of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize("gradient", ["reversible", "checkpoint", "direct"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["module", "called in a function"])
@every_door
def test_compiled_fields(door: Any, wrapped: bool, gradient: str, device: torch.device) -> None:
    torch.compiler.reset()
    net, y0 = make_net(device=device), make_y0(device=device)
    compiled = torch.compile(net, backend="aot_eager")
    wanted = gradients(door, net, y0, gradient="direct")
    field = nn.Sequential(compiled) if wrapped else compiled
    assert difference(gradients(door, field, y0, gradient=gradient), wanted) < EXACT


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("gradient", ["reversible", "checkpoint", "direct"])
def test_fields_compiled_to_machine_code(gradient: str, device: torch.device) -> None:
    torch.compiler.reset()
    net, y0 = make_net(device=device), make_y0(device=device)
    wanted = gradients(DOORS["odeint"], net, y0, gradient="direct")
    assert difference(gradients(DOORS["odeint"], torch.compile(net), y0, gradient=gradient), wanted) < EXACT


class FreedAtOnce(torch.autograd.Function):
    """The sine, differentiated as code that inductor made is: whoever asks for its gradient must give up the graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        assert not torch._C._autograd._get_current_graph_task_keep_graph()
        return grad * ctx.saved_tensors[0].cos()


class Sine(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize("gradient", ["reversible", "checkpoint", "direct"])
@every_door
def test_functions_whose_graph_is_used_once(door: Any, gradient: str, device: torch.device) -> None:
    """Looks at the modes, which direct gradients take too, must not ask for more."""
    net, twin = (make_net(lambda f=f: Sine(f), device=device) for f in (FreedAtOnce.apply, torch.sin))
    y0 = make_y0(device=device)
    wanted = gradients(door, twin, y0, gradient="direct")
    assert difference(gradients(door, net, y0, gradient=gradient), wanted) < EXACT


def saved_and_loaded(module: Any) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "save": saved_and_loaded, "pickle": lambda x: pickle.loads(pickle.dumps(x))}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("kind", MODULES.values(), ids=MODULES)
def test_copies_of_modules_that_solve(
    kind: type[nn.Module], copied: Callable[[Any], Any], device: torch.device
) -> None:
    module, y0 = kind(device=device), make_y0(device=device)
    module(y0).sum().backward()  # what a solve leaves behind must not be in the way
    assert torch.equal(copied(module)(y0), module(y0))


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("method", [reversible_heun(), alf(0.8)], ids=["reversible_heun", "alf"])
def test_copies_of_modules_that_hold_a_method(method: Any, copied: Callable[[Any], Any]) -> None:
    flow, y0 = Flow(method), make_y0()
    assert torch.equal(copied(flow)(y0), flow(y0))


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_of_equilibrium_layers(copied: Callable[[Any], Any]) -> None:
    layer, x = RevDEQ(Injected(), tol=1e-6), torch.ones(2, SIZE)
    layer(x).sum().backward()
    assert torch.equal(copied(layer)(x), layer(x))


MINE = Tableau(a=[[], [0.5]], b=[0, 1], c=[0, 0.5], order=2, name="mine")


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("thing", [MINE, reversible(MINE), alf(), Restarts(interval=4)], ids=lambda x: type(x).__name__)
def test_copies_of_methods_and_settings(thing: Any, copied: Callable[[Any], Any]) -> None:
    assert copied(thing) == thing


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_of_solutions(copied: Callable[[Any], Any]) -> None:
    with torch.no_grad():
        solution = DOORS["odeint"](make_net(), make_y0(), full_output=True)
    twin = copied(solution)
    assert torch.equal(twin.ys, solution.ys)
    assert twin.stats == solution.stats
    assert twin.times == solution.times


def test_modules_that_solve_in_spawned_processes() -> None:
    modules = [kind() for kind in MODULES.values()]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.map(final_state, modules)
    assert found == [final_state(module) for module in modules]


@exporting
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", ["rk4", "rev_rk4", reversible_heun()], ids=["rk4", "rev_rk4", "reversible_heun"])
def test_export_of_a_fixed_grid(method: Any, strict: bool) -> None:
    """The exported program is the forward solve, with times that are numbers; restarts at a fixed interval read no values."""
    flow, y0 = Flow(method, restarts=4 if method != "rk4" else None), make_y0().detach()
    program = torch.export.export(flow, (y0,), strict=strict)
    other = torch.randn_like(y0)
    torch.testing.assert_close(program.module()(other), flow(other), rtol=EXACT, atol=EXACT)


@exporting
@pytest.mark.parametrize("door", ["odeint", "sdeint", "cdeint", "fixed_point"])
def test_export_of_the_front_doors(door: str, device: torch.device) -> None:
    """The Brownian path, and the path that drives, are part of the program."""
    module, y0 = MODULES[door](device=device), make_y0(device=device).detach()
    program = torch.export.export(module, (y0,), strict=False)  # the default since torch 2.8
    other = torch.sin(y0)
    torch.testing.assert_close(program.module()(other), module(other), rtol=EXACT, atol=EXACT)


def test_times_that_are_tensors_are_not_exported() -> None:
    class Timed(nn.Module):
        def forward(self, y0: Tensor, t: Tensor) -> Tensor:
            return odeint(lambda t, y: -y, y0, t, method="rk4")

    with pytest.raises(Exception, match="data-dependent"):
        torch.export.export(Timed(), (torch.ones(3), torch.tensor([0.0, 1.0, 2.0])), strict=False)

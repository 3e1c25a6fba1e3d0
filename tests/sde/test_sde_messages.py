"""What is wrong is said at the door, with the values and what to do."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchsde

from revsolve import SDE, BrownianPath, Tableau, sde_method_names, sdeint
from tests.sde_problems import NeuralSDE

Y0 = torch.zeros(4, 3)


def decay(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return -y


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[..., torch.Tensor]:
    return lambda t, y: torch.ones(shape, dtype=dtype)


def path(*size: int, end: float = 1.0, **settings: Any) -> BrownianPath:
    return BrownianPath(0.0, end, size, seed=0, **settings)


DIAGONAL = SDE(decay, ones(4, 3))
ADDITIVE = SDE(decay, ones(4, 3, 2), "additive")
GENERAL = SDE(decay, ones(4, 3, 2), "general")
HALF = Tableau(a=((),), b=(1.0,), c=(0.0,), order=1, name="half")

WRONG_VALUES: list[tuple[str, dict[str, Any], str]] = [
    ("zero dt", {"dt": 0.0}, r"dt must be positive and finite, but it is 0.0"),
    ("negative dt", {"dt": -0.1}, r"dt must be positive and finite, but it is -0.1"),
    ("zero dt_min", {"dt_min": 0.0}, "dt_min must be positive"),
    ("dt_min above dt", {"dt": 1e-3, "dt_min": 1e-2, "adaptive": True}, "dt_min = 0.01 is larger than the first step"),
    ("decreasing ts", {"ts": [1.0, 0.0]}, r"ts must increase, but it runs from 1.0 to 0.0"),
    ("repeated ts", {"ts": [0.0, 0.5, 0.5]}, r"ts\[2\] = 0.5 follows ts\[1\] = 0.5: drop"),
    ("ts with gradient", {"ts": torch.tensor([0.0, 1.0], requires_grad=True)}, "no derivative in time: pass ts.detach"),
    ("scalar state", {"y0": torch.zeros(())}, r"y0 has shape \(\), but a state of shape"),
    ("shape of the drift", {"sde": SDE(ones(4, 2), ones(4, 3))}, r"drift must have shape \(4, 3\).*not \(4, 2\)"),
    (
        "shape of diagonal noise",
        {"sde": SDE(decay, ones(4, 3, 2))},
        r"diffusion \(diagonal noise\) must have shape \(4, 3\)",
    ),
    (
        "shape of general noise",
        {"sde": SDE(decay, ones(4, 3), "general")},
        r"must have shape \(4, 3, 3\).*not \(4, 3\)",
    ),
    (
        "shape of scalar noise",
        {"sde": SDE(decay, ones(4, 3, 2), "scalar")},
        "scalar noise has one channel, but g returned",
    ),
    ("size of bm", {"bm": path(4, 2)}, r"bm has shape \(4, 2\), but this SDE needs \(4, 3\)"),
    ("dtype of bm", {"bm": path(4, 3, dtype=torch.float64)}, "bm is of torch.float64 .* but y0 of torch.float32"),
    ("interval of bm", {"bm": path(4, 3, end=0.5)}, r"at t = 1.0, outside the path's interval \[0.0, 0.5\]"),
    ("torchsde's interval", {"bm": torchsde.BrownianInterval(0.0, 0.5, (4, 3))}, r"interval \[0.0, 0.5\]"),
    ("bm without area", {"bm": path(4, 3), "method": "rev_slowrk"}, 'levy_area="space-time"'),
    ("rev_euler", {"method": "rev_euler"}, "inconsistent for diagonal noise.*Use 'rev_heun2'"),
    ("euler for Stratonovich", {"method": "euler"}, "converges to the Ito solution, but sde_type is 'stratonovich'"),
    ("a tableau of order 1", {"method": HALF}, "converges to the Ito solution"),
    ("a velocity", {"method": "alf"}, "keeps a velocity, and Brownian motion has none"),
    ("leapfrog", {"method": "leapfrog"}, "keeps a velocity"),
    ("a composition", {"method": "reversible_heun4"}, "composes substeps to raise the order for smooth drivers"),
    (
        "additive noise that is not",
        {"sde": SDE(decay, lambda t, y: torch.cos(y).unsqueeze(-1), "additive")},
        "noise_type is 'additive', but g changes with y: set it to 'general'",
    ),
    ("shark for diagonal noise", {"method": "rev_shark"}, "is for additive noise, but noise_type is 'diagonal'"),
    ("a method of torchsde", {"method": "srk"}, "method 'srk' does not exist here: 'rev_shark'"),
    ("an unknown method", {"method": "reversible_hein"}, "did you mean 'reversible_heun'"),
    ("an unknown option", {"options": {"saftey": 0.5}, "adaptive": True}, "did you mean 'safety'"),
    ("an adaptive option", {"options": {"safety": 0.5}}, "pass adaptive=True"),
    ("first_step", {"options": {"first_step": 0.5}, "adaptive": True}, "is the argument dt of sdeint"),
    ("no error estimate", {"method": "rev_midpoint", "adaptive": True}, "'rev_midpoint' has no error estimate"),
    ("no prior", {"logqp": True}, r"logqp needs the drift of a prior"),
    ("unknown key of names", {"names": {"drfit": "f"}}, "unknown key 'drfit'"),
    ("unknown name", {"names": {"drift": "pull"}}, "the drift is called 'pull', but the SDE has none such"),
    ("gradient", {"gradient": "adjoint"}, "gradient must be one of"),
]


@pytest.mark.parametrize(
    ("changes", "message"), [case[1:] for case in WRONG_VALUES], ids=[case[0] for case in WRONG_VALUES]
)
def test_wrong_values(changes: dict[str, Any], message: str) -> None:
    arguments = {"sde": DIAGONAL, "y0": Y0, "ts": [0.0, 1.0], "dt": 0.25, **changes}
    with pytest.raises(ValueError, match=message):
        sdeint(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y0": [0.0]}, "y0 must be a tensor, but it is a list"),
        ({"y0": torch.zeros(4, 3, dtype=torch.int64)}, "real and floating point, but it has dtype torch.int64"),
        ({"y0": torch.zeros(4, 3, dtype=torch.complex64)}, "real and floating point"),
        ({"sde": SDE(decay, ones(4, 3, dtype=torch.float64))}, "must have the dtype of y0, torch.float32"),
        ({"sde": (decay, 1.0)}, "a tuple must hold two functions"),
        (
            {"sde": (decay, lambda t, y: None)},
            r"the diffusion \(general noise\) must be a tensor, but it is a NoneType",
        ),
        ({"ts": 1.0}, "ts must be a 1-D tensor or a list of numbers, .* but it is 1.0"),
        ({"dt": "0.25"}, "dt must be a number, but it is '0.25'"),
        ({"bm": 3}, "bm is a int without"),
    ],
)
def test_wrong_types(changes: dict[str, Any], message: str) -> None:
    arguments = {"sde": DIAGONAL, "y0": Y0, "ts": [0.0, 1.0], "dt": 0.25, **changes}
    with pytest.raises(TypeError, match=message):
        sdeint(**arguments)


class Bare:
    """An object with some attributes of an SDE."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


@pytest.mark.parametrize(
    ("sde", "message"),
    [
        (Bare(f=decay, g=decay), "needs a noise_type of 'diagonal'.*it has no noise_type"),
        (Bare(f=decay, g=decay, noise_type="diagonal"), "needs a sde_type of 'ito'"),
        (Bare(f=decay, g=decay, noise_type="diag", sde_type="ito"), "noise_type is 'diag'"),
        (Bare(f=decay, noise_type="diagonal", sde_type="ito"), "needs a drift and a diffusion"),
        (
            Bare(f=decay, g_prod=lambda t, y, v: y, noise_type="general", sde_type="ito"),
            "number of noise channels is not known from g_prod alone: pass bm",
        ),
    ],
)
def test_objects_that_are_no_sde(sde: Bare, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sdeint(sde, Y0, [0.0, 1.0], dt=0.25)


@pytest.mark.parametrize("method", sde_method_names())
def test_every_name_solves_an_additive_sde(method: str) -> None:
    assert sdeint(ADDITIVE, Y0, [0.0, 0.5], dt=0.25, method=method).shape == (2, 4, 3)


def test_products_of_additive_noise_must_not_change_with_the_state_either() -> None:
    sde = Bare(f=decay, g_prod=lambda t, y, v: y * v, noise_type="additive", sde_type="ito")
    with pytest.raises(ValueError, match="noise_type is 'additive', but g changes with y"):
        sdeint(sde, Y0, [0.0, 1.0], bm=path(4, 3), dt=0.25)


def test_a_field_that_is_not_finite_is_named() -> None:
    sde = SDE(lambda t, y: torch.where(y < 0.5, 1.0, torch.nan), lambda t, y: torch.zeros_like(y), sde_type="ito")
    with pytest.raises(RuntimeError, match=r"the field returned NaN at t = 0\.5"):
        sdeint(sde, Y0, [0.0, 1.0], dt=0.25, method="euler")


def test_a_state_that_explodes_is_named() -> None:
    sde = SDE(lambda t, y: torch.full_like(y, 3e38), lambda t, y: torch.ones_like(y))
    with pytest.raises(RuntimeError, match=r"in the step from t = 0\.0.*lower dt"):
        sdeint(sde, Y0, [0.0, 4.0], dt=4.0, method="heun2")


def test_neural_sde_without_area_is_fine_where_none_is_needed() -> None:
    assert sdeint(NeuralSDE("general"), Y0, [0.0, 1.0], bm=path(4, 2), dt=0.25).shape == (2, 4, 3)


LATER: dict[str, Callable[[torch.Tensor], Any]] = {
    "shape": lambda x: x[:1],
    "dimensions": lambda x: x.unsqueeze(0),
    "dtype": lambda x: x.double(),
    "no tensor": lambda x: None,
}


@pytest.mark.parametrize("settings", [{}, {"method": "rev_slowrk"}, {"gradient": "direct"}], ids=str)
@pytest.mark.parametrize("sde_type", ["ito", "stratonovich"])
@pytest.mark.parametrize("noise_type", ["diagonal", "additive", "general", "scalar"])
@pytest.mark.parametrize("which", ["drift", "diffusion"])
@pytest.mark.parametrize("name", LATER)
def test_a_form_that_changes_later_is_refused(name, which, noise_type, sde_type, settings) -> None:
    channels = {"diagonal": (), "scalar": (1,)}.get(noise_type, (2,))
    values = {"drift": torch.ones(4, 3), "diffusion": torch.ones(4, 3, *channels)}

    def field(what: str) -> Callable[[torch.Tensor, torch.Tensor], Any]:
        return lambda t, y: LATER[name](values[what]) if what == which and t >= 0.5 else values[what]

    sde = SDE(field("drift"), field("diffusion"), noise_type, sde_type)
    with pytest.raises((ValueError, TypeError), match=f"the {which}.* must (have|be|keep)"):
        sdeint(sde, Y0, [0.0, 1.0], dt=0.25, **settings)


def test_a_solve_at_a_single_time_gives_a_tensor_of_its_own() -> None:
    y0 = torch.ones(4, 3)
    sdeint(DIAGONAL, y0, [0.0]).mul_(5.0)
    assert torch.equal(y0, torch.ones(4, 3))


@pytest.mark.parametrize(
    ("num_times", "length", "dt", "num_steps"),
    [
        (2, 1.0, 0.05, 20),
        (100, 2.0, 1e-2, 198),
        (20, 1.0, 0.05, 19),
        (11, 1.0, 0.1, 10),
        (2, 1.5, 1.0, 2),
        (2, 1.0, 0.099, 10),
    ],
)
def test_an_interval_a_little_longer_than_its_steps_takes_no_other(num_times, length, dt, num_steps) -> None:
    ts = torch.linspace(0.0, length, num_times)
    assert sdeint(DIAGONAL, Y0, ts, dt=dt, full_output=True).stats.num_steps == num_steps


def test_the_path_may_be_the_fourth_argument() -> None:
    bm = path(4, 3)
    assert torch.equal(sdeint(DIAGONAL, Y0, [0.0, 1.0], bm, dt=0.25), sdeint(DIAGONAL, Y0, [0.0, 1.0], bm=bm, dt=0.25))


def test_one_time_alone_is_a_solution_as_well() -> None:
    solution = sdeint(DIAGONAL, Y0, [0.5], full_output=True)
    assert torch.equal(solution.ys, Y0[None]) and solution.times == [0.5]


def test_steps_that_the_field_cannot_tell_apart() -> None:
    with pytest.warns(UserWarning, match="float32, which cannot tell these steps apart: count times from zero"):
        sdeint(DIAGONAL, Y0, [1e6, 1e6 + 0.5], dt=0.01)


@pytest.mark.parametrize("spelling", ["g_prod", "f_and_g_prod"])
@pytest.mark.parametrize("sde_type", ["ito", "stratonovich"])
@pytest.mark.parametrize("noise_type", ["diagonal", "scalar", "additive", "general"])
def test_a_product_may_change_its_vector_in_place(noise_type: str, sde_type: str, spelling: str) -> None:
    """v.mul_(0.5) and v * 0.5 are the same; scalar and diagonal noise need no path."""

    class Products:
        def __init__(self, half: Callable[[torch.Tensor], torch.Tensor]) -> None:
            self.half, self.noise_type, self.sde_type = half, noise_type, sde_type
            given = self.product if spelling == "g_prod" else lambda t, y, v: (-y, self.product(t, y, v))
            setattr(self, spelling, given)

        def f(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return -y

        def product(self, t: torch.Tensor, y: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            v = self.half(v)
            return y * v.sum(-1, keepdim=True) if noise_type in ("scalar", "general") else torch.cos(t) * v

    size = {"scalar": 1, "general": 2}.get(noise_type, 3)
    bm = path(4, size, dt=0.25) if noise_type in ("additive", "general") else None

    def solve(half: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        torch.manual_seed(0)
        return sdeint(Products(half), torch.ones(4, 3), [0.0, 1.0], bm, dt=0.25)

    assert torch.equal(solve(lambda v: v.mul_(0.5)), solve(lambda v: v * 0.5))

"""The price in real projects: `python docs/benchmarks/projects.py`.

Loops as projects have them, with their sizes: one Euler step; the ODE-RNN encoder of latent ODEs (Rubanova and others 2019), one
solve of one step before each of 50 observations; the sampler of flow matching (Lipman and others 2024), differentiated through
100 midpoint steps; the convolutional block (on 8 x 8 digits) and the continuous normalizing flow of torchdiffeq's examples; and
the latent SDE of torchsde's Lorenz example, with 57 steps, against its own direct gradient. The first row of each is what the
others are divided by. Medians of processor time of rounds in which all take turns, one thread, float32. "calls" are evaluations
of the field, forward + backward. "kept" is what autograd holds when the loss is known, without parameters. "peak" is the most
that torch allocates at once. At the end, the steps that the Lorenz example takes, 100 times in 2 units and dt = 0.01, beside
torchsde's.
"""

import itertools
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchdiffeq
import torchsde
from contest import milliseconds, most_held, start, tiny
from torch import Tensor, nn

import revsolve

sys.path.append(str(Path(__file__).parents[1] / "figures"))
from meter import Meter

Settings = Mapping[str, Any]


class Counting(nn.Module):
    """A field that counts its calls."""

    num_calls = 0

    def forward(self, t: Tensor, y: Any) -> Any:
        self.num_calls += 1
        return self.rate(t, y)


class Network(Counting):
    def __init__(self, *sizes: int, activation: type[nn.Module] = nn.Tanh) -> None:
        super().__init__()
        layers = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), activation())]
        self.net = nn.Sequential(*layers[:-1])

    def rate(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y)


class Velocity(Network):
    """The velocity of a flow, whose network reads the time as one more column."""

    def rate(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(torch.cat([y, t.expand(len(y), 1)], -1))


class ConvolutionalBlock(Counting):
    """Two convolutions that read the time as one more channel, between group norms (torchdiffeq, odenet_mnist.py)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(min(32, channels), channels) for _ in range(3))
        self.layers = nn.ModuleList(nn.Conv2d(channels + 1, channels, 3, padding=1) for _ in range(2))

    def rate(self, t: Tensor, y: Tensor) -> Tensor:
        for norm, layer in zip(self.norms, self.layers, strict=False):
            y = torch.relu(norm(y))
            y = layer(torch.cat([torch.ones_like(y[:, :1]) * t, y], 1))
        return self.norms[-1](y)


class Flow(Counting):
    """A planar flow of 64 units whose weights a network makes of the time, and its trace by autograd (torchdiffeq, cnf.py)."""

    def __init__(self, hidden: int = 32, width: int = 64, dimension: int = 2) -> None:
        super().__init__()
        self.width, self.dimension, self.block = width, dimension, width * dimension
        self.hyper = nn.Sequential(
            *(nn.Linear(1, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh()),
            nn.Linear(hidden, 3 * self.block + width),
        )

    def rate(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        z = state[0]
        with torch.set_grad_enabled(True):
            z.requires_grad_(True)
            W, B, U = self.weights(t)
            dz = torch.matmul(torch.tanh(torch.matmul(z.unsqueeze(0).repeat(self.width, 1, 1), W) + B), U).mean(0)
            trace = sum(torch.autograd.grad(dz[:, i].sum(), z, create_graph=True)[0][:, i] for i in range(z.shape[1]))
        return dz, -trace.view(-1, 1)

    def weights(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        W, U, G, B = self.hyper(t.reshape(1, 1)).reshape(-1).split([self.block, self.block, self.block, self.width])
        W, U, G = (x.view(self.width, -1, 1) for x in (W, U, G))
        U = (U * torch.sigmoid(G)).view(self.width, 1, self.dimension)
        return W, B.view(self.width, 1, 1), U


class LatentSDE(Counting):
    """Drifts of posterior and prior, a diffusion for each dimension (torchsde, latent_sde_lorenz.py), and a fixed context."""

    sde_type, noise_type = "stratonovich", "diagonal"

    def __init__(self, latent: int = 4, context: int = 64, hidden: int = 128) -> None:
        super().__init__()
        mlp = lambda n, out: nn.Sequential(  # noqa: E731
            nn.Linear(n, hidden), nn.Softplus(), nn.Linear(hidden, hidden), nn.Softplus(), nn.Linear(hidden, out)
        )
        self.f_net, self.h_net = mlp(latent + context, latent), mlp(latent, latent)
        each = lambda: nn.Sequential(nn.Linear(1, hidden), nn.Softplus(), nn.Linear(hidden, 1), nn.Sigmoid())  # noqa: E731
        self.g_nets, self.context = nn.ModuleList(each() for _ in range(latent)), torch.randn(64, context)

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        self.num_calls += 1
        return self.f_net(torch.cat([y, self.context[: len(y)]], -1))

    def h(self, t: Tensor, y: Tensor) -> Tensor:
        return self.h_net(y)

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.cat([net(part) for net, part in zip(self.g_nets, y.split(1, -1), strict=True)], -1)


class Project(NamedTuple):
    """A loss by several solvers; the first is the peer."""

    field: Counting
    loss: Callable[..., Tensor]  # of the solver, and its settings
    contenders: Mapping[str, Settings]
    others: tuple[Tensor, ...] = ()  # to differentiate by, besides the parameters of the field
    repeats: int = 1  # calls that are timed together, for those too short for the clock


def euler_step(contenders: Mapping[str, Settings]) -> Project:
    field, y0, t = Network(2, 16, 2), torch.randn(64, 2), torch.tensor([0.0, 1.0])

    def loss(solve: Callable[..., Tensor] = revsolve.odeint, method: str = "euler", **by: Any) -> Tensor:
        return solve(field, y0, t, method=method, options={"step_size": 1.0}, **by)[-1].square().mean()

    return Project(field, loss, contenders, repeats=1 if tiny() else 20)


BACKPROPAGATION = "torchdiffeq `euler`, backpropagation"
NO_GRADIENT: Mapping[str, Settings] = {
    "torchdiffeq `euler`": {"solve": torchdiffeq.odeint, "differentiated": False},
    "`euler`": {"differentiated": False},
    "`reversible_heun`": {"method": "reversible_heun", "differentiated": False},
}
GRADIENT: Mapping[str, Settings] = {
    BACKPROPAGATION: {"solve": torchdiffeq.odeint},
    "`euler`": {},
    "`euler`, direct": {"gradient": "direct"},
    "`euler`, checkpoint": {"gradient": "checkpoint"},
    "`reversible_heun`": {"method": "reversible_heun"},
}


def ode_rnn() -> Project:
    """The loop runs backwards over the observations; each solve is one Euler step over the gap before the next."""
    batch, latent = (2, 4) if tiny() else (50, 20)
    field, cell = Network(latent, 100, latent), nn.GRUCell(2, latent)
    times, series = torch.linspace(1.0, 0.0, 3 if tiny() else 50), torch.randn(50, batch, 2)

    def loss(solve: Callable[..., Tensor] = revsolve.odeint, method: str = "euler", **by: Any) -> Tensor:
        y = torch.zeros(batch, latent)
        for x, span in zip(series, times.unfold(0, 2, 1), strict=False):
            y = cell(x, solve(field, y, span, method=method, options={"step_size": 1.0}, **by)[-1])
        return y.square().mean()

    return Project(field, loss, GRADIENT, tuple(cell.parameters()))


def flow_matching() -> Project:
    field, y0 = Velocity(3, 64, 64, 64, 2, activation=nn.SiLU), torch.randn(4 if tiny() else 256, 2)
    t, options = torch.tensor([0.0, 1.0]), {"step_size": 0.5 if tiny() else 0.01}
    return Project(
        field,
        lambda solve=revsolve.odeint, **by: solve(field, y0, t, options=options, **by)[-1].square().mean(),
        {
            "torchdiffeq `midpoint`, backpropagation": {"solve": torchdiffeq.odeint, "method": "midpoint"},
            "`midpoint`, direct": {"method": "midpoint", "gradient": "direct"},
            "`midpoint`": {"method": "midpoint"},
            "`rev_midpoint`": {"method": "rev_midpoint"},
        },
    )


def digits() -> Project:
    channels, side, batch = (4, 3, 2) if tiny() else (64, 6, 32)
    stem, field = nn.Conv2d(1, channels, 3), ConvolutionalBlock(channels)
    images, t = torch.rand(batch, 1, side + 2, side + 2), torch.tensor([0.0, 0.1 if tiny() else 1.0])
    return Project(
        field,
        lambda solve=revsolve.odeint, **by: (
            solve(field, stem(images), t, rtol=1e-3, atol=1e-3, **by)[-1].square().mean()
        ),
        {
            "torchdiffeq `dopri5`, adjoint": {"solve": torchdiffeq.odeint_adjoint, "method": "dopri5"},
            "torchdiffeq `dopri5`, backpropagation": {"solve": torchdiffeq.odeint, "method": "dopri5"},
            "`rev_dopri5`": {"method": "rev_dopri5"},
            "`dopri5`": {"method": "dopri5"},
            "`dopri5`, direct": {"method": "dopri5", "gradient": "direct"},
            "`reversible_heun4`": {"method": "reversible_heun4"},
        },
        tuple(stem.parameters()),
    )


def normalizing_flow() -> Project:
    field, batch = Flow(), 4 if tiny() else 512
    x, change, t = torch.randn(batch, 2), torch.zeros(batch, 1), torch.tensor([10.0, 9.0 if tiny() else 0.0])

    def loss(solve: Callable[..., Any] = revsolve.odeint, **by: Any) -> Tensor:
        z, logp = solve(field, (x, change), t, atol=1e-5, rtol=1e-5, **by)
        return (z[-1].square().sum(-1, keepdim=True) / 2 + logp[-1]).mean()

    ways = {
        "torchdiffeq `dopri5`, adjoint": {"solve": torchdiffeq.odeint_adjoint, "method": "dopri5"},
        "`rev_dopri5`": {"method": "rev_dopri5"},
        "`dopri5`": {"method": "dopri5"},
        "`reversible_heun4`": {"method": "reversible_heun4"},
    }
    return Project(field, loss, ways)


def latent_sde() -> Project:
    sde, y0, num_steps = LatentSDE(), torch.randn(2 if tiny() else 64, 4), 3 if tiny() else 57
    ts = torch.linspace(0.0, num_steps / 50, num_steps + 1)

    def loss(solve: Callable[..., Any] = revsolve.sdeint, **by: Any) -> Tensor:
        ys, log_ratio = solve(sde, y0, ts, dt=1 / 50, logqp=True, **by)
        return ys.square().mean() + log_ratio.sum(0).mean()

    adjoint = {"method": "reversible_heun", "adjoint_method": "adjoint_reversible_heun"}
    ways = {
        "`reversible_heun`, direct": {"gradient": "direct"},
        "`reversible_heun`": {},
        "`reversible_heun`, restarts=32": {"restarts": 32},
        "torchsde `reversible_heun`, its adjoint": {"solve": torchsde.sdeint_adjoint, **adjoint},
    }
    return Project(sde, loss, ways)


PROJECTS: Mapping[str, Callable[[], Project]] = {
    "one Euler step, no gradient": partial(euler_step, NO_GRADIENT),
    "one Euler step": partial(euler_step, GRADIENT),
    "ODE-RNN, 50 observations": ode_rnn,
    "flow matching, 100 midpoint steps": flow_matching,
    "ODE net on digits, tolerance 1e-3": digits,
    "normalizing flow, tolerance 1e-5": normalizing_flow,
    "latent SDE, 57 steps": latent_sde,
}
ROUNDS = {
    "one Euler step, no gradient": 60,
    "one Euler step": 60,
    "ODE-RNN, 50 observations": 25,
    "ODE net on digits, tolerance 1e-3": 9,
}


def run(project: Project, calls: list[int] | None = None, differentiated: bool = True, **by: Any) -> None:
    """One gradient, or the loss alone."""
    leaves = (*project.field.parameters(), *project.others)
    with torch.set_grad_enabled(differentiated):
        project.field.num_calls = 0
        loss, forward = project.loss(**by), project.field.num_calls
        if differentiated:
            torch.autograd.grad(loss, leaves, allow_unused=True)
    if calls is not None:
        calls[:] = forward, project.field.num_calls - forward


def kept(project: Project, differentiated: bool = True, **by: Any) -> int:
    """Bytes that autograd holds when the loss is known."""
    meter = Meter([*project.field.parameters(), *project.others])
    hooks = torch.autograd.graph.saved_tensors_hooks(meter.pack, lambda packed: packed[0])
    with torch.set_grad_enabled(differentiated), hooks:
        loss = project.loss(**by)
    return 4 * meter.held if loss.requires_grad else 0


def repeated(times: int, call: Callable[[], None]) -> None:
    for _ in range(times):
        call()


def rows(name: str, project: Project) -> None:
    turns = {
        way: partial(repeated, project.repeats, partial(run, project, **by)) for way, by in project.contenders.items()
    }
    taken, peer = milliseconds(turns, ROUNDS.get(name, 7)), 0.0
    for way, by in project.contenders.items():
        ms, calls = taken[way] / project.repeats, []
        run(project, calls, **by)
        peer = peer or ms
        memory = f"{kept(project, **by) / 1e3:,.0f} | {most_held(partial(run, project, **by)) / 1e3:,.0f}"
        print(f"| {name} | {way} | {ms:.3g} | {ms / peer:.2f} | {calls[0]} + {calls[1]} | {memory} |", flush=True)


def lorenz_steps() -> None:
    sde, y0 = LatentSDE(), torch.randn(2, 4)
    ts = torch.linspace(0.0, 0.2 if tiny() else 2.0, 11 if tiny() else 100)
    solution = revsolve.sdeint(sde, y0, ts, dt=1e-2, full_output=True)
    sde.num_calls = 0
    with torch.no_grad():
        torchsde.sdeint(sde, y0, ts, dt=1e-2, method="midpoint")
    print("\n| steps of the Lorenz example | |\n|---|---|")
    print(f"| revsolve | {solution.stats.num_steps} |\n| torchsde | {sde.num_calls // 2} |")


def main() -> None:
    start()
    print("| project | gradient | ms | / first | calls | kept, kB | peak, kB |\n|---|---|---|---|---|---|---|")
    for name, project in PROJECTS.items():
        rows(name, project())
    lorenz_steps()


if __name__ == "__main__":
    main()

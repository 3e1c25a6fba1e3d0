"""A core for torchdeq: after `import revsolve.torchdeq`, its `get_deq(core="reversible", ...)` makes reversible equilibria.

What becomes of torchdeq's configuration keys:

    f_max_iter, eval_f_max_iter, eval_factor    most evaluations of func (a reversible step makes two)
    f_tol, f_stop_mode       stop when the "abs" or "rel" residuals of all samples are at most f_tol
    n_states, indexing       where the iteration is sliced; every slice ends in an output, as in torchdeq's core "sliced"
    beta, stop, pair_dtype, anchor_every, on_failure    new; as in `revsolve.fixed_point`, but stop="all" is the default
    ift, hook_ift, grad, tau, sup_gap, sup_loc, f_solver, no_stat, b_*    without effect, that existing configurations run: the
                             backward pass undoes the steps of the forward pass, and has no solver of its own
"""

from __future__ import annotations

import argparse
import inspect
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from revsolve.core.problem import Stats
from revsolve.fixed_points import FixedPoint, fixed_point
from revsolve.fixed_points.convergence import STOPS
from revsolve.schemes.names import did_you_mean

try:
    import torchdeq
    from torchdeq.core import DEQBase
    from torchdeq.solver import get_solver
    from torchdeq.solver.stat import SolverStat
    from torchdeq.utils.config import DEQConfig
    from torchdeq.utils.layer_utils import deq_decorator
except ImportError as error:
    raise ImportError("revsolve.torchdeq needs torchdeq: pip install 'revsolve[torchdeq]'.") from error

RESIDUALS = {"abs": "absolute", "rel": "relative"}
NEVER = 5e-324  # a tolerance that no residual but zero meets


def add_deq_args(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `torchdeq.add_deq_args`, and `--beta`, `--stop` and `--on_failure` of the core "reversible"."""
    torchdeq.add_deq_args(parser)
    parser.add_argument(
        "--beta", type=float, default=0.8, help="step length of the core 'reversible', in (0, 2) but not 1"
    )
    parser.add_argument("--stop", default="all", choices=STOPS, help="whose residual f_tol is for")
    parser.add_argument("--on_failure", default="warn", choices=["warn", "raise", "ignore"], help="if f_tol is not met")


_parser = argparse.ArgumentParser(add_help=False)
torchdeq.add_deq_args(_parser)
ARGPARSE_KEYS = {action.dest for action in _parser._actions}
# Options of torchdeq's own solvers, such as the memory of Anderson's, without what its cores pass themselves.
SOLVERS = map(get_solver, ("anderson", "broyden", "fixed_point_iter", "simple_fixed_point_iter"))
PASSED = {"func", "x0", "max_iter", "tol", "stop_mode", "indexing", "kwargs"}
SOLVER_KEYS = {name for solver in SOLVERS for name in inspect.signature(solver).parameters} - PASSED
OWN = {"beta": 0.8, "stop": "all", "pair_dtype": None, "anchor_every": None, "on_failure": "warn"}
KNOWN_KEYS = ARGPARSE_KEYS | {"no_stat"} | OWN.keys()
CALL_KEYS = ("f_max_iter", "f_tol", "f_stop_mode", "beta", "stop")
ANDERSON_KEYS = {"m", "lam"}  # beside which a beta is Anderson's


class DEQReversible(DEQBase):
    """The reversible fixed-point iteration of McCallum, Arora & Foster (2025, arXiv 2509.12917) as a core of torchdeq.

    Args:
        args: configuration of torchdeq: a dict, a namespace or a DEQConfig; keys as listed in `revsolve.torchdeq`. Next to all
            those that `add_deq_args` makes, keys of the program itself may stand; otherwise unknown ones are refused.
        kwargs: further keys; beta (0.8), stop ("all"), pair_dtype, anchor_every and on_failure as in `revsolve.fixed_point`.

    Raises:
        ValueError: for an unknown key.

    Example:
        >>> import torch
        >>> from torchdeq import get_deq
        >>> import revsolve.torchdeq
        >>> deq = get_deq(core="reversible", beta=0.8, f_max_iter=60, f_tol=1e-5)
        >>> x = torch.full((2, 3), 0.5, requires_grad=True)
        >>> states, stat = deq(lambda z: 0.5 * torch.tanh(z) + x, torch.zeros(2, 3))
        >>> states[-1].sum().backward()
        >>> x.grad[0]
        tensor([1.3576, 1.3576, 1.3576])
        >>> bool((stat["abs_lowest"] < 1e-5).all())
        True
    """

    def __init__(self, args: Any = None, **kwargs: Any) -> None:
        config = {**OWN, **DEQConfig(args).config, **kwargs}
        _refuse_unknown(config)
        super().__init__(config)
        for name in OWN:
            setattr(self, name, config[name])
        self.n_states, self.indexing = config.get("n_states", 1), list(config.get("indexing") or [])

    def forward(
        self,
        func: Callable[..., Any],
        z_init: Any,
        solver_kwargs: Mapping[str, Any] | None = None,
        sradius_mode: bool = False,
        backward_writer: Callable[..., Any] | None = None,
        writer: Any = None,
    ) -> tuple[list[Any], SolverStat]:
        """The states at the ends of the slices (in eval mode the last one only), each like z_init, and statistics.

        Args:
            func, z_init, sradius_mode: as for torchdeq's cores.
            solver_kwargs: keys of the configuration for this call; options of torchdeq's own solvers are without effect.
            backward_writer: called after the backward pass with statistics whose residuals say how far undoing the steps missed
                the start.
            writer: without effect, as for torchdeq's cores.

        Raises:
            ValueError: for unknown solver_kwargs.
        """
        given = _for_this_call(solver_kwargs)
        f, z = deq_decorator(func, z_init, no_stat=False)
        most = int(given.get("f_max_iter", self.f_max_iter if self.training else self.eval_f_max_iter))  # type: ignore[arg-type]
        # as torchdeq's core "sliced" has them
        slices = [b - a for a, b in itertools.pairwise([0, *self.indexing, most])]
        slices = [most // self.n_states] * self.n_states if self.n_states > 1 else slices
        outputs, solutions = [], []
        for evaluations in slices if self.training else [most]:
            solutions.append(self._solve(f, z, evaluations, given, backward_writer))
            z = solutions[-1].z
            outputs.append(f.vec2list(z))
        stat = _statistics(solutions, len(z) if z.ndim else 1)
        if not self.training:
            stat["sradius"] = self._sradius(f, z.detach()) if sradius_mode else torch.zeros(1, device=z.device)
        return outputs, stat

    def _solve(
        self,
        f: Callable[[Tensor], Tensor],
        z: Tensor,
        evaluations: int,
        given: Mapping[str, Any],
        backward_writer: Callable[..., Any] | None,
    ) -> FixedPoint:
        mode = given.get("f_stop_mode", self.f_stop_mode)
        if mode not in RESIDUALS:
            raise ValueError(f"f_stop_mode must be 'abs' or 'rel', but it is {mode!r}.")
        tol, steps = given.get("f_tol", self.f_tol), max(1, evaluations // 2)
        if backward_writer is not None and torch.is_grad_enabled():
            z = z.view_as(z) if z.requires_grad else z.detach().requires_grad_()
        solution = fixed_point(
            f,
            z,
            beta=given.get("beta", self.beta),
            tol=tol or NEVER,
            max_steps=steps,
            min_steps=1 if tol else steps,
            residual=RESIDUALS[mode],
            stop=given.get("stop", self.stop) if z.ndim else "batch",
            pair_dtype=self.pair_dtype,
            anchor_every=self.anchor_every,
            on_failure=self.on_failure if evaluations > 0 else "ignore",
            full_output=True,
        )
        if backward_writer is not None and z.requires_grad:
            stats = solution.stats  # alone: the solution would hold its own graph
            z.register_hook(lambda grad: backward_writer(_backward_statistics(stats)))
        return solution


def _refuse_unknown(config: Mapping[str, Any]) -> None:
    if set(config) >= ARGPARSE_KEYS:
        return  # a program's own settings stand beside those of torchdeq
    for name in config:
        if name not in KNOWN_KEYS:
            hint = did_you_mean(name, sorted(KNOWN_KEYS), cutoff=0.0)
            raise ValueError(f"unknown key {name!r} for the reversible core{hint}")


def _for_this_call(solver_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Of the options for one call those that mean something here."""
    given = dict(solver_kwargs or {})
    for name in given:
        if name not in CALL_KEYS and name not in SOLVER_KEYS:
            raise ValueError(
                f"unknown key {name!r} in solver_kwargs: the reversible core knows {', '.join(CALL_KEYS)}."
            )
    if ANDERSON_KEYS & set(given):
        given.pop("beta", None)
    return given


def _statistics(solutions: list[FixedPoint], samples: int) -> SolverStat:
    """torchdeq's statistics of all slices: residuals by sample and step, and evaluations made."""
    each = [s.trace for s in solutions if s.trace is not None]  # (steps, 2), of samples (steps, 2, samples)
    traces = torch.cat([trace.reshape(len(trace), 2, -1) for trace in each])
    absolute, relative = traces.expand(-1, 2, samples).permute(1, 2, 0)  # (samples, steps) each
    return SolverStat(
        abs_lowest=absolute.amin(1),
        rel_lowest=relative.amin(1),
        abs_trace=absolute,
        rel_trace=relative,
        nstep=sum(2.0 * torch.as_tensor(s.num_steps, device=traces.device).expand(samples) for s in solutions),
    )


def _backward_statistics(stats: Stats) -> SolverStat:
    error = torch.tensor([stats.reconstruction_error])
    return SolverStat(abs_lowest=error, rel_lowest=error, nstep=torch.tensor([float(stats.num_backward_evaluations)]))


torchdeq.register_deq("reversible", DEQReversible)

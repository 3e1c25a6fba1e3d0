"""A core for torchdeq: after `import revsolve.torchdeq`, its `get_deq(core="reversible", ...)` makes reversible equilibria.

What becomes of torchdeq's configuration keys:

    f_max_iter, eval_f_max_iter, eval_factor    most evaluations of func (a reversible step makes two)
    f_tol, f_stop_mode       each sample stops when its "abs" or "rel" residual is at most f_tol
    n_states, indexing       where the iteration is sliced; every slice ends in an output, as in torchdeq's core "sliced"
    beta, pair_dtype, on_failure    new; as in `revsolve.fixed_point`
    ift, hook_ift, grad, tau, sup_gap, sup_loc, f_solver, no_stat, b_*    without effect: there is one solver, and the
                             gradient is that of its steps, not an approximation with parameters of its own

This is the answer to what was asked of torchdeq in 2025: forward and backward are not decoupled, for the backward pass undoes the
very steps of the forward pass, and a backward solver or tolerance would only blur it; so keys are reused where they mean the
same, and `b_*` are accepted, that existing configurations run, but do nothing.
"""

from __future__ import annotations

import argparse
import difflib
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from revsolve.fixed_point import FixedPoint, fixed_point

try:
    from torchdeq import add_deq_args, register_deq
    from torchdeq.core import DEQBase
    from torchdeq.solver.stat import SolverStat
    from torchdeq.utils.config import DEQConfig
    from torchdeq.utils.layer_utils import deq_decorator
except ImportError as error:
    raise ImportError("revsolve.torchdeq needs torchdeq: pip install 'revsolve[torchdeq]'.") from error

RESIDUALS = {"abs": "absolute", "rel": "relative"}
NEVER = 5e-324  # a tolerance that no residual but zero meets


def _torchdeq_keys() -> set[str]:
    parser = argparse.ArgumentParser(add_help=False)
    add_deq_args(parser)
    return {action.dest for action in parser._actions}


ARGPARSE_KEYS = _torchdeq_keys()
OWN_KEYS = {"beta", "pair_dtype", "on_failure"}
KNOWN_KEYS = ARGPARSE_KEYS | {"no_stat"} | OWN_KEYS
CALL_KEYS = ("f_max_iter", "f_tol", "f_stop_mode", "beta")


class DEQReversible(DEQBase):
    """The reversible fixed-point iteration of McCallum, Arora & Foster (2025, arXiv 2509.12917) as a core of torchdeq.

    Args:
        args: configuration of torchdeq: a dict, a namespace or a DEQConfig; keys as listed in `revsolve.torchdeq`. Next to all
            those that `add_deq_args` makes, keys of the program itself may stand; otherwise unknown ones are refused.
        beta: step length, as in `revsolve.fixed_point`; a tensor that requires a gradient gets one.
        pair_dtype: what the pair is kept in.
        on_failure: "warn", "raise" or "ignore" where f_max_iter does not suffice.

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

    def __init__(
        self,
        args: Any = None,
        beta: Any = 0.8,
        pair_dtype: torch.dtype | None = None,
        on_failure: str = "warn",
        **kwargs: Any,
    ) -> None:
        config = {**DEQConfig(args).config, **kwargs}
        _refuse_unknown(config)
        super().__init__(dict(config))
        self.beta = config.get("beta", beta)
        self.pair_dtype = config.get("pair_dtype", pair_dtype)
        self.on_failure = config.get("on_failure", on_failure)
        self.n_states = config.get("n_states", 1)
        self.indexing = list(config.get("indexing") or [])

    def forward(
        self,
        func: Callable[..., Any],
        z_init: Any,
        solver_kwargs: Mapping[str, Any] | None = None,
        sradius_mode: bool = False,
        backward_writer: Callable[..., Any] | None = None,
    ) -> tuple[list[Any], SolverStat]:
        """The states at the ends of the slices (in eval mode the last one only), each like z_init, and statistics.

        Raises:
            ValueError: for unknown solver_kwargs, or a backward_writer: there is no backward solver that it could watch.
        """
        given = dict(solver_kwargs or {})
        for name in given:
            if name not in CALL_KEYS:
                raise ValueError(
                    f"unknown key {name!r} in solver_kwargs: the reversible core knows {', '.join(CALL_KEYS)}."
                )
        if backward_writer is not None:
            raise ValueError(
                "backward_writer watches a backward solver, and the reversible core has none: leave it out."
            )
        f, z = deq_decorator(func, z_init, no_stat=False)
        most = int(given.get("f_max_iter", self.f_max_iter if self.training else self.eval_f_max_iter))  # type: ignore[arg-type]
        outputs, solutions = [], []
        for evaluations in self._slices(most) if self.training else [most]:
            solutions.append(self._solve(f, z, evaluations, given))
            z = solutions[-1].z
            outputs.append(f.vec2list(z))
        stat = _statistics(solutions)
        if not self.training:
            stat["sradius"] = self._sradius(f, z.detach()) if sradius_mode else torch.zeros(1, device=z.device)
        return outputs, stat

    def _solve(
        self, f: Callable[[Tensor], Tensor], z: Tensor, evaluations: int, given: Mapping[str, Any]
    ) -> FixedPoint:
        mode = given.get("f_stop_mode", self.f_stop_mode)
        if mode not in RESIDUALS:
            raise ValueError(f"f_stop_mode must be 'abs' or 'rel', but it is {mode!r}.")
        tol, steps = given.get("f_tol", self.f_tol), max(1, evaluations // 2)
        return fixed_point(
            f,
            z,
            beta=given.get("beta", self.beta),
            tol=tol or NEVER,
            max_steps=steps,
            min_steps=1 if tol else steps,
            residual=RESIDUALS[mode],
            stop="sample",
            pair_dtype=self.pair_dtype,
            on_failure=self.on_failure,
            full_output=True,
        )

    def _slices(self, most: int) -> list[int]:
        """How many evaluations each slice may make, by the same arithmetic as torchdeq's core "sliced"."""
        if self.n_states > 1:
            return [most // self.n_states] * self.n_states
        ends = [0, *self.indexing, most]
        return [b - a for a, b in itertools.pairwise(ends)]


def _refuse_unknown(config: Mapping[str, Any]) -> None:
    if set(config) >= ARGPARSE_KEYS:
        return  # a program's own settings stand beside those of torchdeq
    for name in config:
        if name not in KNOWN_KEYS:
            close = difflib.get_close_matches(name, sorted(KNOWN_KEYS), n=1, cutoff=0.0)
            raise ValueError(f"unknown key {name!r} for the reversible core: did you mean {close[0]!r}?")


def _statistics(solutions: list[FixedPoint]) -> SolverStat:
    """torchdeq's statistics of all slices: residuals by sample and step, and evaluations made."""
    absolute, relative = torch.cat([s.trace for s in solutions if s.trace is not None]).permute(
        1, 2, 0
    )  # (samples, steps) each
    return SolverStat(
        abs_lowest=absolute.amin(1),
        rel_lowest=relative.amin(1),
        abs_trace=absolute,
        rel_trace=relative,
        nstep=sum(2.0 * s.num_steps for s in solutions),
    )


register_deq("reversible", DEQReversible)

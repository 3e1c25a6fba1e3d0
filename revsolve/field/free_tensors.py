"""A problem inside torch.func transforms, where nothing tells where tensors come from, and what its field takes from outside.

No graph can be walked there. Instead the field is called twice: what enters its operations, was not made by one of them, and was
there before the second call, comes from outside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from revsolve.core.coupling import Scheme
from revsolve.core.integrate import Problem, Stats
from revsolve.core.replay import Noisy, random_state_changed_by
from revsolve.core.restarts import Restarts
from revsolve.core.stepper import Stepper
from revsolve.core.tape import Term
from revsolve.field.discover import Audit, held_tensors
from revsolve.field.functorch import core, have_rules, outside, transforms, wrapped
from revsolve.field.rules import solve

PLAIN = (Tensor, float, int, type(None))


def by_rule(
    term: Term,
    x0: Tensor,
    span: tuple[float, float],
    owners: Sequence[Any],
    scheme: Scheme,
    make_stepper: Callable[[], Stepper],
    gradient: str,
    restarts: Restarts | None,
) -> Problem | None:
    """The problem, solved by a rule of our own; None where there is none for all transforms that are active, or for its field."""

    def call(x: Tensor) -> Any:
        value = term.value(span[0], x)
        return value, term.product(value, term.control(span[0], *span))

    if gradient == "direct" or torch.compiler.is_compiling() or not have_rules() or _has_tensors(scheme):
        return None
    held = list(held_tensors(list(owners), depth=4))
    free, noisy = random_state_changed_by(lambda: free_tensors(call, x0, held), x0.device)
    if free is None:
        return None
    tensors, constants = map(tuple, free)
    if noisy:
        with outside():
            seed = int(torch.randint(2**62, (), device="cpu"))
        term = Noisy(term, seed, [x0.device] if x0.device.type == "cuda" else [])
    problem = Problem(scheme, term, make_stepper, gradient, restarts, Stats(), tensors, Audit([]), constants)
    problem.rule = solve
    return problem


def _has_tensors(scheme: Scheme) -> bool:
    return any(isinstance(c, Tensor) for update in scheme.updates for c in (update.keep, update.mix, update.gain))


def free_tensors(
    call: Callable[[Tensor], Any], x: Tensor, held: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]] | None:
    """All that `call(x)` takes from outside and that some derivative or batch may concern (those `held` first), and the
    constants that it uses besides. None if that cannot be said: its value is no pytree of tensors and numbers, or it hands
    tensors from outside to transforms of its own.
    """
    watches = [_Watch(), _Watch()]
    with torch.no_grad():
        for watch in watches:
            own = x.detach()
            watch.made[id(own)] = own
            with watch:
                out = call(own)
    if not all(isinstance(leaf, PLAIN) for leaf in tree_leaves(out)):
        return None
    first, second = watches
    level = len(transforms())
    used = dict(second.taken)
    for key, inner in second.taken.items():
        outer = core(inner, level)
        if outer is not inner:
            del used[key]
            if id(outer) not in second.made and _concerns(outer):
                return None
    before = first.taken | first.made
    used = {key: x for key, x in used.items() if key in before}
    found = {id(x): x for x in held} | used
    constants = [x for x in used.values() if not (_concerns(x) or x.is_inference())]
    return [x for x in found.values() if _concerns(x)], constants


def _concerns(x: Tensor) -> bool:
    return wrapped(x) or x.requires_grad


class _Watch(TorchFunctionMode):
    """Remembers, by identity, the tensors that operations make, and those they take that none had made."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: dict[int, Tensor] = {}
        self.made: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for x in _tensors((args, kwargs)):
            if id(x) not in self.made:
                self.taken[id(x)] = x
        out = func(*args, **kwargs)
        for x in _tensors(out):
            self.made.setdefault(id(x), x)
        return out


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (x for x in tree_leaves(tree) if isinstance(x, Tensor))

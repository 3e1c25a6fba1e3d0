"""What is built of private names of PyTorch, and what it falls back to where a release has none of them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

from revsolve.field import functorch


def leaf(*shape: int) -> Tensor:
    return torch.ones(*shape, requires_grad=True)


def test_operations_are_watched_before_they_run() -> None:
    seen = []
    x = torch.ones(3)
    with functorch.watching(lambda func, args, kwargs: seen.append((func.overloadpacket.__name__, args[0] is x))):
        (x + 1).mul_(2)
    assert seen == [("add", True), ("mul_", False)]


def test_nodes_are_older_or_younger_than_a_number() -> None:
    x = leaf(2)
    old = x * 2
    number = functorch.num_nodes()
    new = old + 1
    assert functorch.made_before(old.grad_fn, number)
    assert not functorch.made_before(new.grad_fn, number)


def test_versions_change_with_what_is_changed_in_place() -> None:
    x = torch.ones(2)
    before = functorch.version(x)
    x.add_(1)
    assert functorch.version(x) > before
    with torch.inference_mode():
        assert functorch.version(torch.ones(2)) == -1


def test_hooks_are_seen() -> None:
    x = leaf(2)
    y = x * 2
    assert not functorch.has_hooks(x) and not functorch.has_hooks(y)
    x.register_hook(lambda g: g)
    y.retain_grad()
    assert functorch.has_hooks(x) and functorch.has_hooks(y)


def test_batches_of_cotangents_are_told_from_one() -> None:
    seen = []

    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            seen.append(functorch.batched_gradient(g))
            return g

    x = leaf(3)
    torch.autograd.grad(Identity.apply(x), x, torch.eye(3), is_grads_batched=True)
    torch.autograd.grad(Identity.apply(x), x, torch.ones(3))
    assert seen == [True, False]


@pytest.mark.parametrize("transform", [grad, lambda f: lambda x: jvp(f, (x,), (x,))[1]])
def test_numbers_are_read_within_a_transform(transform: Callable[..., Any]) -> None:
    read = []

    def f(x: Tensor) -> Tensor:
        read.append(functorch.numbers(x.detach()))
        read.append(functorch.numbers(torch.arange(3.0)))
        return x.sum()

    transform(f)(torch.ones(3))
    assert read == [[1.0, 1.0, 1.0], [0.0, 1.0, 2.0]]


def test_numbers_of_one_sample_are_refused() -> None:
    with pytest.raises(ValueError, match="the same for all samples"):
        vmap(lambda x: torch.tensor(functorch.numbers(x)))(torch.ones(3))
    assert vmap(lambda x: x + functorch.numbers(torch.ones(1))[0])(torch.ones(3)).tolist() == [2.0, 2.0, 2.0]


# Where they stand, and names that a release may take away.
REMOVABLE = [
    (torch._C, "_are_functorch_transforms_active"),
    (torch._C, "_autograd"),
    (torch._C, "_len_torch_dispatch_stack"),
    (torch._C._functorch, "CVmapInterpreterPtr"),
    (torch._C._functorch, "get_interpreter_stack"),
    (torch._C._functorch, "is_legacy_batchedtensor"),
    (torch._functorch.pyfunctorch, "temporarily_clear_interpreter_stack"),
    (torch._functorch.vmap, "vmap_increment_nesting"),
    (torch.utils._python_dispatch, "TorchDispatchMode"),
    (torch.utils._python_dispatch, "_disable_current_modes"),
    (torch.compiler, "is_exporting"),
]


@pytest.fixture(params=[*REMOVABLE, None], ids=lambda removed: removed[1] if removed else "all")
def older(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module as it is where PyTorch has not one of the names, or none."""
    for owner, name in [request.param] if request.param else REMOVABLE:
        monkeypatch.delattr(owner, name, raising=False)
    spec = importlib.util.spec_from_file_location("older_functorch", functorch.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.undo()
    return module


def test_fallbacks(older: ModuleType) -> None:
    x = leaf(2)
    y = x * 2
    assert not (older.transformed() or older.transforms() or older.batched(x) or older.wrapped(x) or older.exported())
    assert not (older.made_before(y.grad_fn, older.num_nodes() - 1) or older.batched_gradient(y) or older.has_hooks(x))
    assert older.of_every_sample(y) is not y and older.numbers(y) == [2.0, 2.0]
    with older.outside(), older.watching(lambda *_: None):
        (got,) = torch.autograd.grad(y.sum(), x)
    assert got.tolist() == [2.0, 2.0]

"""What every test shares: one thread, fixed seeds, reproducible hypothesis runs, a device to run on."""

import re
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

import revsolve

# More threads would change the order of summation, and with it the last digits, from machine to machine.
torch.set_num_threads(1)

# Solves of hundreds of steps take longer than hypothesis' default deadline of 200 ms on a busy machine.
settings.register_profile("fixed", max_examples=50, deadline=None, derandomize=True, print_blob=True)
settings.register_profile(
    "explore",
    max_examples=2000,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
# `pytest --hypothesis-profile=explore` searches at random; everything else repeats the same examples.
settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def float64() -> Iterator[None]:
    """Tensors and modules made in the test are double precision, unless it says otherwise."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.cuda,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device of this machine in turn."""
    return torch.device(request.param)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick", action="store_true", help="of each test the cases that show it every kind of scheme and door"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--quick"):
        seen: set[tuple[str, ...]] = set()
        kept = [item for item in items if not kinds(item) <= seen and not seen.update(kinds(item))]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call() -> Iterator[None]:
    """Skip what this release of torch cannot do, where the refusal names one that can."""
    try:
        return (yield)
    except revsolve.CompilationError as error:
        if "needs torch" not in str(error):
            raise
        pytest.skip(str(error))


def kinds(item: pytest.Item) -> set[tuple[str, ...]]:
    """A test and, of each parameter that is a name, what stands before its first digit or underscore: `rev` for rev_rk4."""
    test, case = item.nodeid.partition("[")[0], getattr(item, "callspec", None)
    names = [(name, value) for name, value in case.params.items() if isinstance(value, str)] if case else []
    return {(test,), *((test, name, re.match(r"[a-zA-Z]*", value)[0]) for name, value in names)}

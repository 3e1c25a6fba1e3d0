"""A solve on a fixed grid reads no number while it is captured as a CUDA graph, forward and backward."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from revsolve import odeint

READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default}


class NoReads(TorchDispatchMode):
    """Fails where a number is read from a tensor, as the capture of a CUDA graph does."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch would import its compiler, which takes a second

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in READS, f"{func} reads from the device"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that the current stream is being captured."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


@pytest.fixture
def field() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def gradients(net: nn.Module, method: str, gradient: str | None, device: str = "cpu", **settings: Any) -> list[Tensor]:
    y0 = torch.ones(2, 3, dtype=torch.float64, device=device, requires_grad=True)
    options = {"step_size": 0.05}
    y = odeint(lambda t, y: net(y), y0, [0.0, 0.5, 1.0], method=method, gradient=gradient, options=options, **settings)
    return list(torch.autograd.grad(y.square().sum(), [y0, *net.parameters()]))


WAYS = [
    *((method, "reversible") for method in ("rev_rk4", "alf4", "reversible_heun", "leapfrog")),
    ("rk4", "checkpoint"),
    ("rk4", "direct"),
]


@pytest.mark.parametrize(("method", "gradient"), WAYS)
@pytest.mark.usefixtures("capture")
def test_nothing_is_read_under_capture(method: str, gradient: str, field: nn.Module) -> None:
    with NoReads():
        found = gradients(field, method, gradient)
    expected = gradients(field, method, "direct")
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)  # rounding of 20 steps undone


def test_without_a_capture_the_certificate_is_read(field: nn.Module) -> None:
    with NoReads(), pytest.raises(AssertionError, match="reads from the device"):
        gradients(field, "rev_rk4", "reversible")


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.BatchNorm1d(3)], ids=["random numbers", "buffers"])
@pytest.mark.usefixtures("capture")
def test_what_cannot_be_captured_says_so(layer: nn.Module) -> None:
    net = nn.Sequential(nn.Linear(3, 3), layer).double()
    with NoReads(), pytest.raises(ValueError, match="cannot capture this solve, because its field"):
        gradients(net, "rev_rk4", "reversible")


@pytest.mark.usefixtures("capture")
def test_adaptive_steps_cannot_be_captured() -> None:
    with NoReads(), pytest.raises(ValueError, match="cannot capture adaptive steps"):
        odeint(lambda t, y: -y, torch.ones(2), [0.0, 1.0], method="rev_dopri5")


@pytest.fixture
def replayed() -> Callable[[Callable[[], list[Tensor]]], list[Tensor]]:
    """Captures a computation on the GPU, runs it from the graph, and gives its results."""

    def captured(compute: Callable[[], list[Tensor]]) -> list[Tensor]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            compute()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = compute()
        graph.replay()
        torch.cuda.synchronize()
        return results

    return captured


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("method", "gradient"), WAYS)
def test_a_replayed_graph_gives_the_same_gradient(
    method: str, gradient: str, field: nn.Module, replayed: Callable[[Callable[[], list[Tensor]]], list[Tensor]]
) -> None:
    net, settings = field.cuda(), {"restarts": 8} if gradient == "reversible" else {}
    found = replayed(lambda: gradients(net, method, gradient, "cuda", **settings))
    expected = gradients(net, method, gradient, "cuda", **settings)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)  # the same kernels on the same numbers

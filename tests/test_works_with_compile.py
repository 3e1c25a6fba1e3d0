"""torch.compile around a solve."""

import pytest
import torch
from torch import Tensor

from revsolve import odeint
from tests.front_doors import difference, make_net, make_y0


# torch scripts parts of inductor on first use, and says that it should not.
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
@pytest.mark.slow
def test_a_training_step_around_a_solve_compiles_into_one_graph(device: torch.device) -> None:
    net, y0 = make_net(device=device).float(), make_y0(torch.float32, device)

    def loss(y0: Tensor) -> Tensor:
        settings = {"method": "rev_rk4", "options": {"step_size": 0.5}, "restarts": 4}
        return odeint(lambda t, y: net(y), y0, [0.0, 1.0], **settings).square().sum()

    wanted = torch.autograd.grad(loss(y0), list(net.parameters()))
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True)(y0), list(net.parameters()))
    assert difference(list(found), list(wanted)) < 1e-5  # float32, other kernels

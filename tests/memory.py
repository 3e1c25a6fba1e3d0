"""How much memory a run takes, as torch's allocator sees it: independent of the machine."""

import itertools
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def most_held(run: Callable[[], object]) -> int:
    """The most bytes that torch holds at once during the run."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    changes = sorted((e.start_ns(), e.nbytes()) for e in profiler.profiler.kineto_results.events() if e.nbytes())
    return max(itertools.accumulate(size for _, size in changes))

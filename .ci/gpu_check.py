"""What needs a GPU, in at most eight minutes: tests on CUDA, CUDA graphs, adaptive steps beside torchdiffeq (`make gpu-check`).

`python .ci/gpu_check.py` does without make, where PyTorch and the packages of the tests are there already.
"""

import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
PARTS = (  # and their share of the time, in seconds
    (("-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", "-n", "4"), 300),
    (("docs/benchmarks/cuda_graphs.py",), 120),
    (("docs/benchmarks/gpu_adaptive.py",), 60),
)


def passes(part: tuple[str, ...], limit: int) -> bool:
    """Whether a part ends well and in time."""
    start = time.monotonic()
    print(f"== python {' '.join(part)}", flush=True)
    try:
        code = subprocess.run([sys.executable, *part], cwd=ROOT, timeout=limit, check=False).returncode
    except subprocess.TimeoutExpired:
        code = f"no end after {limit} s"
    print(f"== {time.monotonic() - start:.0f} s, {'passed' if code == 0 else f'FAILED: {code}'}", flush=True)
    return code == 0


def main() -> None:
    if not torch.cuda.is_available():
        print(f"No CUDA device for torch {torch.__version__} here: nothing was checked.")
        return
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    failed = [part for part, limit in PARTS if not passes(part, limit)]
    if failed:
        sys.exit("gpu-check failed")


if __name__ == "__main__":
    main()

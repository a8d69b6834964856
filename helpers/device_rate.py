"""How fast a device multiplies matrices: what training could reach if nothing else took time."""

from __future__ import annotations

import torch

PUBLISHED_TFLOPS = {
    "RTX 3090": 71,
    "RTX 4090": 165,
    "L4": 121,
    "A100": 312,
    "H100 SXM": 989,
}
"""Dense bfloat16 products accumulated in float32, in 10^12 operations per second, by NVIDIA's papers.

RTX 3090: GA102 architecture whitepaper. RTX 4090: Ada architecture whitepaper. L4, A100, H100: their
data sheets, those of L4 and H100 halved because they are printed with sparsity.
"""
_SIDES = {"cpu": 1024}
_SIDE_OF_ACCELERATORS = 8192


def matmul_rate(device, dtype, min_seconds=1.0):
    """Measure the rate of square matrix products.

    Parameters
    ----------
    device : torch.device or str
    dtype : torch.dtype
        Of the factors and the product.
    min_seconds : float
        The product is repeated for at least this long.

    Returns
    -------
    float
        Floating-point operations per second, 2 n^3 for a product of n x n matrices, of the median
        repetition; n is 1024 on a CPU and 8192 elsewhere.
    """
    from torch.utils.benchmark import Timer  # looks for a compiler and warns: not on every import

    side = _SIDES.get(torch.device(device).type, _SIDE_OF_ACCELERATORS)
    factor = torch.randn(side, side, device=device).to(dtype)
    variables = {"a": factor, "out": torch.empty_like(factor), "torch": torch}
    statement = "torch.mm(a, a, out=out)"
    timer = Timer(statement, globals=variables, num_threads=torch.get_num_threads())
    timer.timeit(1)  # the first call loads the library
    return 2 * side**3 / timer.blocked_autorange(min_run_time=min_seconds).median

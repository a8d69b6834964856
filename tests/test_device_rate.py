"""The rate of matrix products is work over time."""

import time

import pytest
import torch

from helpers.device_rate import PUBLISHED_TFLOPS, matmul_rate


def test_rate_is_work_over_time():
    rate = matmul_rate("cpu", torch.float32, min_seconds=0.2)
    factor = torch.randn(1024, 1024)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(factor, factor)
        times.append(time.perf_counter() - start)
    assert rate == pytest.approx(2 * 1024**3 / min(times), rel=0.8)


def test_published_rates_are_plausible():
    assert all(10 < rate < 3000 for rate in PUBLISHED_TFLOPS.values())

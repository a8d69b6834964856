"""What all tests share: no window for figures, and notebooks after everything quick."""

import matplotlib
import pytest

matplotlib.use("agg")  # not by MPLBACKEND, which the kernels of the notebook tests would inherit


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("notebook") is not None)

"""Makes every run alike: one thread a process, no network, seeds from the test's name, fixed hypothesis examples."""

import hashlib
import os
import random
import sys

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # the house tests need no hypothesis
    pass
else:
    settings.register_profile(
        "house", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], print_blob=True
    )
    settings.load_profile("house")


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    """Each test has its own stream of random numbers, the same one in every run and in any order."""
    seed = int.from_bytes(hashlib.sha256(request.node.nodeid.encode()).digest()[:4], "little")
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a GPU; torch sees none here")

"""Every test process computes on one thread: tiny tensors gain nothing from a second one, and
threads that wait for each other on a busy machine cost a factor of ten. Variables that configure
arctrm on the machine that runs the tests are forgotten.
"""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported
for name in [name for name in os.environ if name.startswith("ARCTRM_")]:
    del os.environ[name]


@pytest.fixture(scope="session")
def hub_model(tmp_path_factory):
    """The folder of a small language model, as the hub has it."""
    from hub_models import save_model

    return save_model(tmp_path_factory.mktemp("model"))


def pytest_runtest_setup(item):
    import torch

    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")

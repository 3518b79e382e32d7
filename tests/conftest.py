import pytest
import torch
from hypothesis import HealthCheck, settings

from models.quant import set_engine

# Derandomized: a run fails or passes for the code's sake alone, so that a red run can be repeated.
settings.register_profile("repository", derandomize=True, deadline=None, max_examples=100, database=None,
                          suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
settings.load_profile("repository")


@pytest.fixture(scope="module")
def one_thread():
    """PyTorch's threads cost more than they save on layers this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def engine_stays_auto():
    """No test leaves its engine to the next."""
    with set_engine("auto"):
        yield

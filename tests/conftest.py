import functools
import gc

import pytest
import torch
from hypothesis import HealthCheck, settings

from experiment.inputs import data
from models import vgg
from models.building import on_crossbars
from models.quant import set_engine

# Derandomized: a run fails or passes for the code's sake alone, so that a red run can be repeated.
settings.register_profile("repository", derandomize=True, deadline=None, max_examples=100, database=None,
                          suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
settings.load_profile("repository")
gc.freeze()  # what was imported is not looked through for garbage between tests

data._digits = functools.cache(data._digits)  # scikit-learn reads them from text


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


TINY = ([16, 24, "M", 40, "M", 24, "M"], 48)  # as VGG7, but small: a first convolution, three more, two linear layers


@pytest.fixture
def tiny(monkeypatch):
    """Build a small network of the same class; `tiny(spec=None)` gives the training network."""
    monkeypatch.setitem(vgg.CONFIGS, "tiny", TINY)

    def make(**kwargs):
        torch.manual_seed(0)
        options = {"alpha_init": 2.0, **kwargs}
        in_software = "spec" in kwargs and kwargs["spec"] is None
        return settle(vgg.VGG("tiny", **options) if in_software else on_crossbars(vgg.VGG, "tiny", **options))

    return make


def settle(model):
    """Batch norms with statistics other than 0 and 1; then inference."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(1, 4, generator=generator)
    return model.eval()

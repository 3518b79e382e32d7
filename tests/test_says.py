"""experiment/report/says.py: what the log says of a network before it is measured."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from experiment.report import says
from models import quant
from models.quant import CrossbarSpec, Setting

pytestmark = pytest.mark.usefixtures("one_thread")


class Small(nn.Module):
    """A convolution of 3 channels, a depthwise one of 8, and a linear layer of 40 inputs."""

    def __init__(self):
        super().__init__()
        self.conv = quant.Qconv2dDoreFa(3, 8, 3, bias=False, alpha_init=1.0, spec=CrossbarSpec())
        self.depthwise = quant.Qconv2dDoreFa(8, 8, 3, groups=8, bias=False, alpha_init=1.0, spec=CrossbarSpec())
        self.linear = quant.QLinearDoreFa(40, 6, bias=False, alpha_init=1.0, spec=CrossbarSpec())


def said(*settings):
    return says.fillings(Small(), settings)


def test_what_a_mapping_fills():
    """On 16 rows. tap: 9 row blocks of 3 rows, 8 times 9 of one row, and 16 + 16 + 8: 139 of 84 x 16. im2col: 27 rows in 2, 8 times 9
    rows in one, and 3."""
    tap, im2col = (CrossbarSpec(rows=16, mapping=mapping) for mapping in ("tap", "im2col"))
    assert said(Setting(tap)) == ["tap: 10 % of the rows in use; im2col would need 13 row blocks in place of 84"]
    assert said(Setting(im2col)) == ["im2col: 67 % of the rows in use; tap would need 84 row blocks in place of 13"]
    assert len(said(Setting(tap), Setting(CrossbarSpec(rows=16, cell_bits=2)))) == 1  # the same row blocks


def test_what_several_mappings_fill():
    """Rows are said where they differ, layers where not all are meant."""
    first, second = said(Setting(CrossbarSpec(rows=16)), Setting(CrossbarSpec(rows=64, mapping="im2col")))
    assert first.startswith("tap, 16 rows: 10 %")
    assert second == "im2col, 64 rows: 22 % of the rows in use; tap would need 82 row blocks in place of 10"  # 139 of 640
    assert said(Setting(CrossbarSpec(rows=16), "conv")) == [
        "tap, 2 layers: 8 % of the rows in use; im2col would need 10 row blocks in place of 81"]  # 99 of 1296
    own = said(Setting(CrossbarSpec(rows=16), per_layer={"linear": {"rows": 40}}))
    assert own[1] == "tap, 40 rows, 1 layer: 100 % of the rows in use; im2col would need as many row blocks, 1" and len(own) == 2


def test_normalization():
    assert says.normalization((0.49139968, 0.5, 0.4), (0.25, 0.2, 1.0)) == (
        "normalization of the images' channels: mean 0.491 0.5 0.4, deviation 0.25 0.2 1")
    own = SimpleNamespace(transforms=[nn.Identity(), SimpleNamespace(mean=torch.tensor([0.5]), std=torch.tensor([0.25]))])
    assert says.normalization((0.0,), (1.0,), own).endswith("mean 0.5, deviation 0.25")
    assert says.normalization((0.0,), (1.0,), SimpleNamespace(mean=0.5, std=0.25)).endswith("mean 0.5, deviation 0.25")
    assert says.normalization((0.0,), (1.0,), lambda image: image) == "normalization: that of the network's own transform"


def test_what_a_conversion_chose():
    """Bits of the first and the last layer, inputs of both signs and of one, and the span of inputs with the largest and least."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))
    with torch.no_grad():
        model[2].weight.mul_(100)
    x = 2 * torch.rand(64, 8) - 1
    net = quant.convert(model, CrossbarSpec(4, 4, adc_range="ideal"), x, inputs="twos", activations="max")
    text = says.conversion(net)
    assert text.startswith("conversion chose: bits of weights and inputs 8 and 8 in 2 of 3 layers, 4 and 4 in 1 of 3 layers; inputs "
                           "unsigned in 2 of 3 layers, twos in 1 of 3 layers; ranges of inputs from 0..")
    with torch.no_grad():
        low, high = (float(model[:end](x).max()) for end in (2, 4))
    assert text.endswith(f"from 0..{low:.3g} (layer 2) to 0..{high:.3g} (layer 4)")

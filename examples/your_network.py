"""Put your own network on crossbars, in three lines. Here it is a small residual network for scikit-learn's digits, in plain PyTorch.

    python examples/your_network.py

It is trained in seconds, and needs no download. `convert` takes any `torch.nn.Module` and some of its training inputs.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout

from models.quant import CrossbarSpec, Device, calibrate, convert, correct, program, set_spec


class Residual(nn.Module):
    """Two convolutions beside a shortcut, `[N, channels, H, W]` to the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.gelu(self.bn1(self.conv1(x)))))
        y += x
        return F.gelu(y)


def small_network() -> nn.Module:
    """`[N, 1, 8, 8]` to logits `[N, 10]`."""
    return nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.GELU(), Residual(32), nn.MaxPool2d(2), Residual(32), nn.Flatten(),
                         nn.Linear(32 * 16, 10))


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, test images and labels; images `[N, 1, 8, 8]` with mean 0 and deviation 1."""
    pixels, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    x = pixels.float().view(-1, 1, 8, 8)
    x = (x - x.mean()) / x.std()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1400], order[1400:]
    return x[train], labels[train], x[test], labels[test]


def trained(x: Tensor, y: Tensor, epochs: int = 10) -> nn.Module:
    """The network after some passes over the images."""
    torch.manual_seed(0)
    network = small_network()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(epochs):
        for pick in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(network(x[pick]), y[pick]).backward()
            optimizer.step()
    return network.eval()


@torch.no_grad()
def accuracy(network: nn.Module, x: Tensor, y: Tensor) -> float:
    """Percent of the images that are classified right."""
    return 100 * (network(x).argmax(1) == y).double().mean().item()


def main(epochs: int = 10) -> None:
    train_x, train_y, test_x, test_y = digits()
    network = trained(train_x, train_y, epochs)
    print(f"float                        {accuracy(network, test_x, test_y):6.2f} %")

    spec = CrossbarSpec(w_bits=4, a_bits=4, cell_bits=2, adc_bits=6, mapping="im2col")
    net = convert(network, spec, train_x[:256])
    print(f"{'2-bit cells, 6-bit ADC':28s} {accuracy(net, test_x, test_y):6.2f} %\n\n{net.crossbar_report}\n")

    # Other hardware for the same network: no conversion, ranges alone are chosen anew.
    for adc_bits in (5, 4, 3):
        set_spec(net, replace(spec, adc_bits=adc_bits))
        calibrate(net, train_x[:256])
        print(f"{f'2-bit cells, {adc_bits}-bit ADC':28s} {accuracy(net, test_x, test_y):6.2f} %")

    # A chip of measured cells, an hour after their first read: the ADC ranges of the design, a digital correction of its own.
    set_spec(net, spec)
    calibrate(net, train_x[:256])
    program(net, Device.load("techA", time="1h"), seed=0)
    correct(net, train_x[:256])
    print(f"{'techA, 6-bit ADC, after 1 h':28s} {accuracy(net, test_x, test_y):6.2f} %")


if __name__ == "__main__":
    main()

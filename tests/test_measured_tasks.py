"""Networks whose question is no class, as they are, through `convert` and `measure`: an encoder, a pitch estimator, a detector and a
segmenter. Each value is computed again by a plain loop."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from models.quant import CrossbarSpec, Metric, Setting, convert, measure, measure_float, signal_to_error

pytestmark = pytest.mark.usefixtures("one_thread")
SPEC = CrossbarSpec(8, 8, adc_range="ideal")
SETTING = Setting(CrossbarSpec(8, 8, cell_bits=2, adc_bits=8))


def seeded(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def cosine(a, b):
    return F.cosine_similarity(a.flatten(), b.flatten(), 0).item()


@torch.no_grad()
def alive(model, images):
    """A network of random weights whose batch norms have the statistics of some images, so that its answers depend on the image."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean of all batches
    model.train()(images)
    return model.eval()


# ---- an encoder: vectors, without targets ------------------------------------------------------------------------------


def test_an_encoder():
    """torchvision's vision transformer without its head."""
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    model = models.VisionTransformer(image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=48, mlp_dim=96).eval()
    model.heads = nn.Identity()
    images, others = seeded(16, 3, 32, 32), seeded(12, 3, 32, 32, seed=1)
    net, metric = convert(model, SPEC, images), signal_to_error(model)
    record = measure(net, others, None, SETTING, calibration=images, metric=metric, batch_size=5)
    with torch.no_grad():
        wanted, found = model(others).double(), net(others).double()
    assert record.accuracy == pytest.approx(10 * math.log10(wanted.square().sum() / (found - wanted).square().sum()), rel=1e-6)
    assert 20 < record.accuracy < record.software_accuracy + 0.5 and record.software_accuracy < 60
    assert record.changed_predictions is record.predictions is None and record.n_images == 12


# ---- a pitch estimator: bins of a waveform, cents ----------------------------------------------------------------------


RATE, SAMPLES, BINS, LOWEST, WIDTH = 4000, 512, 48, 110.0, 50.0  # Hz, samples of a waveform, its bins of so many cents above so many Hz


class Pitch(nn.Module):
    """CREPE in small (Kim et al., arXiv 1802.06182): convolutions of a waveform, and a sigmoid for each of some bins of pitch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layers = []
        for inputs, outputs, kernel, stride in ((1, 16, 64, 4), (16, 24, 16, 1), (24, 24, 16, 1)):
            layers += [nn.Conv1d(inputs, outputs, kernel, stride, padding=kernel // 2 - 1), nn.ReLU(), nn.BatchNorm1d(outputs),
                       nn.MaxPool1d(2)]
        self.features, self.bins = nn.Sequential(*layers), nn.LazyLinear(BINS)

    def forward(self, waveform):
        return torch.sigmoid(self.bins(self.features(waveform[:, None]).flatten(1)))


def tones(count, seed):
    """(waveforms `[N, samples]`, cents above LOWEST `[N]`): three harmonics in noise."""
    generator = torch.Generator().manual_seed(seed)
    cents = torch.rand(count, generator=generator) * (BINS - 9) * WIDTH + 4 * WIDTH
    phase = 2 * math.pi * torch.rand(count, 3, 1, generator=generator)
    turns = (LOWEST * 2 ** (cents / 1200))[:, None, None] * torch.arange(1, 4)[:, None] * torch.arange(SAMPLES) / RATE
    waveform = (torch.sin(2 * math.pi * turns + phase) / torch.arange(1, 4)[:, None]).sum(1)
    return waveform + 0.05 * torch.randn(count, SAMPLES, generator=generator), cents


def cents_of(activations):
    """The mean of the bins around the largest, weighed by their activations."""
    near = (torch.arange(BINS) - activations.argmax(1, keepdim=True)).abs() <= 4
    weights = activations * near
    return (weights * WIDTH * torch.arange(BINS)).sum(1) / weights.sum(1)


@pytest.fixture(scope="module")
def pitch(one_thread):
    """One that was trained for some seconds, its waveforms and its metric."""
    model = Pitch()
    model(tones(2, 0)[0])
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(60):
        waveform, cents = tones(48, 100 + step)
        wanted = torch.exp(-((cents[:, None] - WIDTH * torch.arange(BINS)) ** 2) / (2 * 50.0**2))
        optimizer.zero_grad()
        F.binary_cross_entropy(model(waveform), wanted).backward()
        optimizer.step()
    error = Metric("pitch_error", lambda found, wanted: (cents_of(found) - wanted).abs(), "cents", higher=False)
    return model.eval(), error


def test_a_pitch_estimator(pitch):
    model, error = pitch
    training, (waveforms, cents) = tones(64, 1), tones(90, 2)
    loader = DataLoader(list(zip(waveforms, cents.double())), batch_size=40)  # real numbers are no classes, but the network takes one input
    net = convert(model, SPEC, [training])
    original = measure_float(model, loader, None, metric=error)
    setting = Setting(CrossbarSpec(8, 8, cell_bits=2, adc_bits=5))
    record = measure(net, loader, None, setting, calibration=[training], metric=error, original=original)
    for found, network in ((original.accuracy, model), (record.accuracy, net)):
        total = 0.0
        with torch.no_grad():
            for activations, wanted in zip(network(waveforms).tolist(), cents.tolist()):
                best = max(range(BINS), key=activations.__getitem__)
                near = range(max(0, best - 4), min(BINS, best + 5))
                own = sum(activations[each] * WIDTH * each for each in near) / sum(activations[each] for each in near)
                total += abs(own - wanted)
        assert found == pytest.approx(total / 90, rel=1e-4)
    assert original.accuracy < 20 and original.accuracy != record.accuracy == pytest.approx(original.accuracy, abs=5)
    assert record.float_accuracy == original.accuracy and record.metric == ("pitch_error", "cents", False)
    assert record.accuracy != record.software_accuracy and record.chance > 0


# ---- a detector: boxes and classes, targets of several lengths ---------------------------------------------------------


@pytest.fixture(scope="module")
def detector(one_thread):
    """DETR of transformers: a small ResNet, an encoder, a decoder with learned queries; outputs with names."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    backbone = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"], layer_type="basic")
    model = transformers.DetrForObjectDetection(transformers.DetrConfig(
        backbone_config=backbone, d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, num_queries=6, num_labels=4, init_std=0.3, init_xavier_std=3.0))
    return model.eval()


def overlap(a, b):
    """Intersection over union of two boxes (centre, size)."""
    sides = [[(box[axis] - box[axis + 2] / 2, box[axis] + box[axis + 2] / 2) for axis in (0, 1)] for box in (a, b)]
    shared = math.prod(max(0.0, min(p[1], q[1]) - max(p[0], q[0])) for p, q in zip(*sides))
    return shared / (a[2] * a[3] + b[2] * b[3] - shared)


def best_overlaps(output, target):
    """`[N]`: the mean over an image's boxes of the best overlap with one that is found."""
    return torch.tensor([sum(max(overlap(own, box) for own in found) for box in boxes["boxes"].tolist()) / len(boxes["boxes"])
                         for found, boxes in zip(output["pred_boxes"].tolist(), target)])


def test_a_detector(detector):
    images, others = seeded(12, 3, 48, 48), seeded(9, 3, 48, 48, seed=1)
    boxes = [{"class_labels": torch.arange(1 + number % 3), "boxes": torch.rand(1 + number % 3, 4, generator=torch.Generator().manual_seed(
        number)) * 0.4 + 0.2} for number in range(9)]
    data = DataLoader(list(zip(others, boxes)), batch_size=4, collate_fn=lambda batch: {
        "pixel_values": torch.stack([image for image, _ in batch]), "labels": [target for _, target in batch]})
    net = convert(detector, SPEC, {"pixel_values": images})
    report = net.crossbar_report
    assert {"class_labels_classifier", "bbox_predictor.layers.0", "model.input_projection"} <= {layer["name"] for layer in report.layers}
    alone = [name for name, reason in report.digital.items() if reason == "a product of parameters alone"]
    assert "model.decoder.layers.0.self_attn.q_proj" in alone and "model.decoder.layers.1.self_attn.q_proj" not in alone
    record = measure(net, data, None, SETTING, calibration=[{"pixel_values": images}], metric=best_overlaps)
    with torch.no_grad():
        both = [network(pixel_values=others) for network in (net, detector)]
    assert record.accuracy == pytest.approx(best_overlaps(both[0], boxes).double().mean().item(), rel=1e-4)
    assert record.n_images == 9 and record.metric.name == "best_overlaps" and record.numbers.shape == (9, 2)
    for name in ("logits", "pred_boxes"):
        found, wanted = (output[name] for output in both)
        assert cosine(found, wanted) > 0.995 and cosine(found - found.mean(0), wanted - wanted.mean(0)) > 0.95  # from image to image


# ---- a segmenter: classes of pixels, by torchmetrics -------------------------------------------------------------------


@pytest.fixture(scope="module")
def segmenter(one_thread):
    segmentation = pytest.importorskip("torchvision.models.segmentation")
    torch.manual_seed(0)
    model = segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4)
    return alive(model, seeded(32, 3, 64, 64))


def test_a_segmenter(segmenter):
    torchmetrics = pytest.importorskip("torchmetrics")
    images, others = seeded(12, 3, 64, 64, seed=3), seeded(5, 3, 64, 64, seed=1)
    with torch.no_grad():
        labels = (segmenter(others)["out"] + 0.2 * seeded(5, 4, 64, 64, seed=2)).argmax(1)
    net = convert(segmenter, SPEC, images)
    metric = torchmetrics.JaccardIndex(task="multiclass", num_classes=4)
    before = copy.deepcopy(metric.state_dict())
    record = measure(net, others, labels, None, metric=metric, batch_size=2)
    with torch.no_grad():
        found = net(others)["out"].argmax(1)
    shares = [((found == name) & (labels == name)).sum().item() / ((found == name) | (labels == name)).sum().item() for name in range(4)]
    assert record.accuracy == pytest.approx(sum(shares) / 4) and record.metric == ("multiclass_jaccard_index", "", True)
    original = measure_float(segmenter, others, labels, metric=metric, batch_size=2)
    assert record.accuracy == pytest.approx(original.accuracy, abs=0.1) and 0.2 < original.accuracy < 0.99
    assert metric.state_dict() == before
    pixels = measure(net, others, labels, None, batch_size=2)  # and by the share of right pixels
    assert pixels.accuracy == pytest.approx(100 * (found == labels).double().mean().item()) and pixels.predictions.shape == (5, 64, 64)

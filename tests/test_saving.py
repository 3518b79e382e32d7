"""Networks on crossbars as files: the same outputs to the last bit without any image, and other networks refused."""

import copy
from dataclasses import replace

import pytest
import torch
from test_convert import Functional, Of, Small, Tied, Tokens, Viewed, seeded
from torch import nn

from models.quant import Calibration, CrossbarSpec, Device, Setting, calibrate, convert, crossbar_layers, load, measure, program, save
from models.quant.conversion.encodings import ENCODINGS

pytestmark = pytest.mark.usefixtures("one_thread")
SPEC = CrossbarSpec(4, 4, cell_bits=2, adc_bits=4, rows=16)
TOKENS = torch.arange(22).view(2, 11) % 11


def other_weights(model):
    """The model that is handed over: whatever its weights are."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in [*model.parameters(), *(buffer for buffer in model.buffers() if buffer.is_floating_point() and buffer.dim() == 1)]:
            tensor.copy_(torch.rand(tensor.shape) + 0.5)
    return model


def seldom(s, x):
    """Of two layers each example has one."""
    first = x[:, :1] > 0
    return torch.where(first, 0.0, 1.0) * x[:, :4] + torch.zeros(len(x), 4).masked_scatter(first, s.one(x[first[:, 0]])).masked_scatter(
        ~first, s.other(x[~first[:, 0]]))


NETWORKS = {
    **{f"small, {inputs}": (Small, dict(inputs=inputs), seeded((6, 3, 6, 6))) for inputs in ENCODINGS},
    "small, other bits": (Small, dict(skip=["depth*"], specs={"head": CrossbarSpec(5, 3, cell_bits=3, adc_bits=5, dac_bits=2)}),
                          seeded((6, 3, 6, 6))),
    "rounded": (Small, dict(rounding="gptq", first_last_bits=None, weight_scale="layer"), seeded((6, 3, 6, 6))),
    "trained": (Small, dict(qat=True), seeded((6, 3, 6, 6))),
    "computed weights": (Functional, {}, seeded((6, 8))),
    "tied, of words": (Tied, {}, TOKENS), "viewed": (Viewed, {}, seeded((6, 3, 6, 6))),
    "cast": (lambda: Of(lambda s, x: (x.bfloat16() @ (2 * s.w).bfloat16()).float(), w=nn.Parameter(seeded((8, 8)))), {}, seeded((6, 8))),
    "seldom used": (lambda: Of(seldom, one=nn.Linear(8, 4), other=nn.Linear(8, 4)), {}, seeded((60, 8))),
    "masked": (lambda: Of(lambda s, x: s.layer(x[0], src_mask=x[1]), layer=nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)),
               dict(take=lambda batch: ((batch,), None)), (seeded((6, 5, 8)), nn.Transformer.generate_square_subsequent_mask(5))),
    "squeezed": (lambda: Of(lambda s, x: s.norm(s.conv(x).mean((2, 3)).squeeze()), conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm1d(4)), {},
                 seeded((6, 3, 6, 6))),
    "in the order of memory": (lambda: Of(lambda s, x: s.conv(x).view(-1, 16).softmax(1), conv=nn.Conv2d(3, 4, 3)), {},
                               seeded((6, 3, 6, 6))),
    "tokens first": (lambda: Tokens(True), dict(batch_dim=1), seeded((7, 6, 16))),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_converted_network_is_the_same_from_its_file(name, tmp_path):
    make, options, images = NETWORKS[name]
    spec = replace(SPEC, adc_plan="significance", adc_bits=2.5) if name == "tokens first" else SPEC
    net = convert(make(), spec, [images] if isinstance(images, tuple) else images, **options).eval()
    x = images if isinstance(images, tuple) or images.dtype == torch.int64 else images + 0.1
    wanted = net(x)
    save(net, tmp_path / "net.pt")
    given = other_weights(make())
    before = {name: value.clone() for name, value in given.state_dict().items()}
    loaded = load(tmp_path / "net.pt", given)
    assert torch.equal(loaded(x), wanted) and not loaded.training
    assert str(loaded.crossbar_report) == str(net.crossbar_report)
    assert all(torch.equal(value, before[name]) for name, value in given.state_dict().items())  # the model stays as it is
    assert [(name, layer.spec) for name, layer in crossbar_layers(loaded)] == [(name, layer.spec) for name, layer in crossbar_layers(net)]
    save(loaded, tmp_path / "again.pt")
    assert torch.equal(load(tmp_path / "again.pt", loaded)(x), wanted)  # into one that is on crossbars already


def test_files_whose_reports_call_row_blocks_arrays(tmp_path):
    net = convert(Small(), SPEC, seeded((6, 3, 6, 6)))
    for layer in net.crossbar_report.layers:
        layer["arrays"] = layer.pop("row_blocks")
    save(net, tmp_path / "net.pt")
    report = load(tmp_path / "net.pt", Small()).crossbar_report
    assert f"{sum(layer['row_blocks'] for layer in report.layers)} row blocks, " in str(report) and "arrays" not in report.layers[0]


def test_without_quantizers_and_in_sixteen_bits(tmp_path):
    x = seeded((6, 3, 6, 6))
    for spec, dtype in ((None, torch.float32), (SPEC, torch.bfloat16)):
        net = convert(Small().to(dtype), spec, x)
        save(net, tmp_path / "net.pt")
        assert torch.equal(load(tmp_path / "net.pt", other_weights(Small().to(dtype)))(x.to(dtype)), net(x.to(dtype)))
    with pytest.raises(ValueError, match="of torch.bfloat16 in the file, and .* of torch.float32 here$"):
        load(tmp_path / "net.pt", Small())


@pytest.mark.parametrize("spec, calibration", [
    (dict(adc_bits=3), Calibration()), (dict(adc_plan="significance", adc_bits=2), Calibration(share="layer")),
    (dict(adc_range="full", weights="pair"), Calibration())])
def test_a_calibrated_network_is_the_same_from_its_file(spec, calibration, tiny, tmp_path):
    net = tiny(spec=CrossbarSpec(rows=16)).to(memory_format=torch.channels_last)
    x = seeded((20, 3, 32, 32)).to(memory_format=torch.channels_last)
    setting = Setting(CrossbarSpec(rows=16, **spec), per_layer={"features.3*": {"adc_range": "ideal"}} if "weights" not in spec else {},
                      calibration=calibration)
    measure(net, x, torch.zeros(20, dtype=torch.int64), setting, calibration=x)
    wanted = net(x)
    save(net, tmp_path / "net.pt")
    loaded = load(tmp_path / "net.pt", other_weights(tiny(spec=CrossbarSpec())))
    assert torch.equal(loaded(x), wanted)
    strides = [[value.stride() for value in each.state_dict().values()] for each in (net, loaded)]
    assert strides[0] == strides[1]  # by which float layers add


def test_chips_and_codes_are_refused(tiny, tmp_path):
    net = tiny()
    calibrate(net, seeded((4, 3, 32, 32)))
    program(net, Device.preset("techA"))
    with pytest.raises(ValueError, match=r"is on a chip, .*; write its cells with write_cells, then call program\("):
        save(net, tmp_path / "net.pt")
    program(net, None)
    [(name, layer), *_] = crossbar_layers(net)
    layer.set_codes(layer.w_codes())
    with pytest.raises(ValueError, match=rf"^layer {name} has codes in place of its weights"):
        save(net, tmp_path / "net.pt")
    with pytest.raises(ValueError, match="^this network has no layers on crossbars"):
        save(nn.Linear(2, 2), tmp_path / "net.pt")
    assert not list(tmp_path.iterdir())


class Renamed(Small):
    pass


def changed(change):
    model = Small()
    change(model)
    return model


@pytest.mark.parametrize("model, message", [
    (lambda: changed(lambda model: setattr(model, "head", nn.Linear(8, 6))), r"here is no parameter head.weight of shape \[5, 8\]"),
    (lambda: changed(lambda model: setattr(model, "head", nn.Linear(8, 5, bias=False))), "tensor 'head.bias' is in the file alone"),
    (lambda: changed(lambda model: setattr(model, "more", nn.ReLU())), "module 'more' is in the network alone"),
    (lambda: changed(lambda model: model.register_buffer("more", torch.zeros(2))), "tensor 'more' is in the network alone"),
    (lambda: changed(lambda model: setattr(model, "norm", nn.InstanceNorm2d(8, affine=True))), "tensor 'norm.num_batches_tracked' is in"),
    (lambda: changed(lambda model: setattr(model.norm, "eps", 0.1)), "eps of norm is 1e-05 in the file, and 0.1 here"),
    (lambda: changed(lambda model: setattr(model.stem, "stride", (2, 2))), r"stride of stem is \(1, 1\) in the file, and \(2, 2\) here"),
    (Renamed, "class of the whole is 'Small' in the file, and 'Renamed' here"),
    (lambda: nn.Linear(3, 2), r"here is no parameter stem.weight of shape \[8, 3, 3, 3\]"),
    (Viewed, "here is no parameter stem.weight of shape"),
    (lambda: changed(lambda model: setattr(model, "stem", nn.Conv2d(3, 9, 3, padding=1))), "here is no parameter stem.weight of shape")])
def test_another_network_is_refused_in_one_line(model, message, tmp_path):
    save(convert(Small(), SPEC, seeded((6, 3, 6, 6))), tmp_path / "net.pt")
    refusal = f"{tmp_path}/net.pt cannot be loaded into this network: it is of another network"
    with pytest.raises(ValueError, match=rf"^{refusal}[:,] {message}[^\n]*$"):
        load(tmp_path / "net.pt", model())


def test_files_of_something_else(tmp_path):
    net = convert(Small(), SPEC, seeded((6, 3, 6, 6)))
    save(net, tmp_path / "net.pt")
    whole = (tmp_path / "net.pt").read_bytes()
    weight = next(value for value in net.state_dict().values() if value.numel() > 50).numpy().tobytes()
    place = whole.index(weight) + len(weight) // 2
    flipped = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1:]  # a bit of a weight
    for content in (b"", b"no file of torch", whole[:-1000], whole[:100], flipped):
        (tmp_path / "odd.pt").write_bytes(content)
        with pytest.raises(ValueError, match=rf"^{tmp_path}/odd.pt is not a file that save\(network, path\) wrote$"):
            load(tmp_path / "odd.pt", Small())
    for content in (net.state_dict(), [1, 2], {"format": 7}, net):
        torch.save(content, tmp_path / "odd.pt")
        with pytest.raises(ValueError, match=rf"^{tmp_path}/odd.pt (is not a file that save|holds 7, and this version of)"):
            load(tmp_path / "odd.pt", Small())
    content = torch.load(tmp_path / "net.pt", weights_only=True)
    for key in ("report", "specs", "state", "modules"):
        torch.save({**content, key: 3}, tmp_path / "odd.pt")
        with pytest.raises(ValueError, match=rf"^{tmp_path}/odd.pt cannot be loaded into this network: it is damaged \("):
            load(tmp_path / "odd.pt", Small())
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "absent.pt", Small())

"""Recurrent layers and cells on arrays: against PyTorch's own in float, and against sums of codes written out in NumPy."""

import copy
import io
import itertools
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils import _pytree as tree

from models.quant import (CrossbarSpec, Device, Training, calibrate, convert, crossbar_layers, image_numbers, load, program, save,
                          set_engine, set_spec)
from models.quant.cost import count
from models.quant.layers import prepared
from models.quant.network.modes import without_adc

pytestmark = [pytest.mark.usefixtures("plain_engine", "one_thread"),
              pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")]
W8A8 = CrossbarSpec(8, 8, adc_range="ideal")
W4A4 = CrossbarSpec(4, 4, adc_bits=6)
NOISY = Device("mine", "", 5.0, 65.0)
N, T, IN, H, PROJ = 5, 7, 4, 6, 3
LENGTHS = [3, 7, 1, 4, 7]
KINDS = {"lstm": (nn.LSTM, {}), "lstm, projected": (nn.LSTM, dict(proj_size=PROJ)), "gru": (nn.GRU, {}), "rnn": (nn.RNN, {}),
         "rnn, relu": (nn.RNN, dict(nonlinearity="relu"))}
CELLS = {"lstm": (nn.LSTMCell, {}), "gru": (nn.GRUCell, {}), "rnn": (nn.RNNCell, {}), "rnn, relu": (nn.RNNCell, dict(nonlinearity="relu"))}


@pytest.fixture
def plain_engine():
    with set_engine("reference"):
        yield


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(kind, dtype=torch.float32, **options):
    torch.manual_seed(0)
    made, own = KINDS[kind]
    return made(IN, H, **own, **options).to(dtype)


def states(module, sequences=N, seed=3):
    """States to begin with that are not zero."""
    sets, h = module.num_layers * (1 + module.bidirectional), module.proj_size or H
    made = [seeded(sets, sequences, size, seed=seed + number).to(module.weight_ih_l0.dtype) for number, size in enumerate((h, H))]
    return tuple(made) if isinstance(module, nn.LSTM) else made[0]


def tensors(y):
    return [leaf for leaf in tree.tree_leaves(y) if isinstance(leaf, torch.Tensor)]


def assert_same(found, wanted, **tolerance):
    for left, right in zip(tensors(found), tensors(wanted), strict=True):
        assert left.dtype == right.dtype and left.is_contiguous() >= right.is_contiguous()
        torch.testing.assert_close(left, right, **tolerance)


class Watch:
    """Sizes of the inputs of a network's layers on arrays, call by call."""

    def __init__(self, net):
        self.calls = {}
        for name, each in crossbar_layers(net):
            calls = self.calls[name.rpartition("_weight_")[2]] = []
            each.register_forward_pre_hook(lambda _, args, calls=calls: calls.append([*args[0].shape]))


# ---- in float, PyTorch's answers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_every_option_gives_what_pytorch_gives(kind, dtype):
    tolerance = dict(rtol=1e-12, atol=1e-13) if dtype == torch.float64 else dict(rtol=1e-4, atol=1e-6)
    for layers, both, bias, batch_first in itertools.product((1, 3), (False, True), (False, True), (False, True)):
        module = layer(kind, dtype, num_layers=layers, bidirectional=both, bias=bias, batch_first=batch_first)
        x = seeded(*((N, T) if batch_first else (T, N)), IN).to(dtype)
        net = convert(module, None, x)
        assert len(crossbar_layers(net)) == layers * (1 + both) * (3 if module.proj_size else 2)
        with torch.no_grad():
            assert_same(net(x), module(x), **tolerance)
            assert_same(net(x, states(module)), module(x, states(module)), **tolerance)
            one, first = x.select(0 if batch_first else 1, 0), tree.tree_map(lambda part: part[:, 0], states(module))
            assert_same(net(one), module(one), **tolerance)
            assert_same(net(one, first), module(one, first), **tolerance)
            for lengths, is_sorted in ((sorted(LENGTHS, reverse=True), True), (LENGTHS, False), ([1] * N, True)):
                packed = pack_padded_sequence(x, lengths, batch_first, is_sorted)
                assert_same(net(packed), module(packed), **tolerance)
                assert_same(net(packed, states(module)), module(packed, states(module)), **tolerance)
            assert_same(net(x[:, :0] if not batch_first else x[:0]), module(x[:, :0] if not batch_first else x[:0]))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", CELLS)
def test_cells_give_what_pytorch_gives(kind, bias):
    class Steps(nn.Module):
        """A cell that is called step by step."""

        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.cell = CELLS[kind][0](IN, H, bias=bias, **CELLS[kind][1]).double()

        def forward(self, x, state=None):
            for step in x.unbind(-2):
                state = self.cell(step, state)
            return state

    module, x = Steps(), seeded(N, T, IN).double()
    net = convert(module, None, x)
    assert [name for name, _ in crossbar_layers(net)] == ["cell.crossbar_weight_ih", "cell.crossbar_weight_hh"]
    state = (seeded(N, H).double(), seeded(N, H, seed=1).double()) if kind == "lstm" else seeded(N, H).double()
    with torch.no_grad():
        for args in ((x,), (x, state), (x[0],), (x[0], tree.tree_map(lambda part: part[0], state))):
            assert_same(net(*args), module(*args), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_pytorch(kind):
    module = layer(kind, torch.float64, num_layers=2, bidirectional=True).train()
    net, results = convert(module, None, seeded(T, N, IN).double()).train(), []
    for each in (net, module):
        x = seeded(T, N, IN).double().requires_grad_()
        y, state = each(pack_padded_sequence(x, LENGTHS, enforce_sorted=False), states(module))
        sum(part.square().sum() for part in tensors((y.data, state))).backward()
        results.append({"x": x.grad, **{name: parameter.grad for name, parameter in each.named_parameters()}})
    assert results[0].keys() == results[1].keys()
    for name, wanted in results[1].items():
        torch.testing.assert_close(results[0][name], wanted, rtol=1e-9, atol=1e-11)


def test_dropout_between_layers_in_training():
    """Of each layer's outputs but the last one's a share is dropped, anew at each step, and the rest is larger by as much."""
    share, many = 0.3, 200
    torch.manual_seed(0)
    module, x = nn.GRU(IN, 16, num_layers=3, dropout=share, batch_first=True), seeded(many, T, IN)
    net, seen = convert(module, None, x[:4]), {}
    for name, each in crossbar_layers(net):
        each.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0].detach()))
    with torch.no_grad():
        net(x)
        whole = {name: calls[0] for name, calls in seen.items()}
        seen.clear()
        net.train()
        y, _ = net(x)
    assert not (y == 0).any()
    dropped = {}
    for number in (1, 2):
        outputs = seen[f"crossbar_weight_ih_l{number}"][0]
        zeros = dropped[number] = outputs == 0
        count = zeros.numel()
        assert abs(zeros.double().mean() - share) < 5 * (share * (1 - share) / count) ** 0.5  # five deviations of a binomial
        for dim in (0, 1, 2):  # as many in every sequence, step and channel, of which each is another draw
            places = zeros.movedim(dim, 0).flatten(1).double().mean(1)
            assert (places - share).abs().max() < 5.5 * (share * (1 - share) / (count / len(places))) ** 0.5
    assert not torch.equal(dropped[1], dropped[2])
    first = seen["crossbar_weight_ih_l1"][0]
    torch.testing.assert_close(first[~dropped[1]], whole["crossbar_weight_ih_l1"][~dropped[1]] / (1 - share), rtol=1e-5, atol=1e-6)
    for _, *states_seen in (seen[f"crossbar_weight_hh_l{number}"] for number in (0, 1, 2)):  # a state drops nothing
        assert not any((state == 0).any() for state in states_seen)


# ---- numbers, against NumPy -----------------------------------------------------------------------------------------------


def rounded(x, scale, low, high):
    """Codes of x, int64, by the formula of docs/networks.md, the quotient in float32."""
    return np.clip(np.rint(np.asarray(x, np.float32) / np.float32(scale)), low, high).astype(np.int64)


class Product:
    """`s_a s_c sum A (W - m) + bias`, the sum one of whole numbers."""

    def __init__(self, net, name, bias):
        own = dict(crossbar_layers(net))[f"crossbar_{name}"]
        scales = own.weight_quant.scale.double().numpy()
        weight = getattr(net, name).detach().as_subclass(torch.Tensor).numpy()
        self.codes = np.stack([rounded(row, scale, -127, 127) for row, scale in zip(weight, scales)])
        self.scale, self.window, self.step = scales * float(own.act_quant.scale), own.act_quant.window, float(own.act_quant.scale)
        self.bias = getattr(net, bias).detach().double().numpy() if bias else 0.0

    def __call__(self, x):
        return rounded(x, self.step, *self.window) @ self.codes.T * self.scale + self.bias


def logistic(x):
    return 1 / (1 + np.exp(-x))


def numpy_layers(net, kind, x):
    """Outputs `[N, T, channels]` of a converted network, step by step."""
    for number in range(net.num_layers):
        outputs = []
        for suffix in ("", "_reverse")[:1 + net.bidirectional]:
            end = f"l{number}{suffix}"
            of_input, of_state = Product(net, f"weight_ih_{end}", f"bias_ih_{end}"), Product(net, f"weight_hh_{end}", f"bias_hh_{end}")
            projection = Product(net, f"weight_hr_{end}", None) if net.proj_size else None
            h, c, found = np.zeros((len(x), net.proj_size or H)), np.zeros((len(x), H)), {}
            for t in range(T)[::-1] if suffix else range(T):
                left, right = of_input(x[:, t]), of_state(h)
                if kind.startswith("lstm"):
                    i, f, g, o = np.split(left + right, 4, axis=1)
                    c = logistic(f) * c + logistic(i) * np.tanh(g)
                    h = logistic(o) * np.tanh(c)
                    h = projection(h) if projection else h
                elif kind == "gru":
                    (r, z, n), (r_h, z_h, n_h) = np.split(left, 3, axis=1), np.split(right, 3, axis=1)
                    z = logistic(z + z_h)
                    h = (1 - z) * np.tanh(n + logistic(r + r_h) * n_h) + z * h
                else:
                    h = np.tanh(left + right) if kind == "rnn" else np.maximum(left + right, 0)
                found[t] = h
            outputs.append(np.stack([found[t] for t in range(T)], 1))
        x = np.concatenate(outputs, 2)
    return x


@pytest.mark.parametrize("kind", KINDS)
def test_without_an_adc_they_are_sums_of_codes_between_gates_of_floats(kind):
    module, x = layer(kind, num_layers=2, bidirectional=True, batch_first=True), seeded(N, T, IN)
    net = convert(module, W8A8, x, correct="none")
    with torch.no_grad():
        found, floats = net(x)[0].double().numpy(), module(x)[0].double().numpy()
    wanted = numpy_layers(net, kind, x.numpy())
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
    assert 1e-4 < np.abs(found - floats).max() < 0.1  # quantization does something


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_a_lossless_adc_changes_nothing(kind):
    module, x = layer(kind, num_layers=2), seeded(T, N, IN)
    outputs = [convert(module, CrossbarSpec(8, 8, adc_bits=8, adc_range=adc_range, reference="digital"), x, correct="none")(x)[0]
               for adc_range in ("full", "ideal")]
    assert torch.equal(*outputs)


def test_a_state_has_the_window_of_its_own_values():
    """With "max" nothing is clipped, so the scale says which values were seen: the states of all steps but the last, of all images."""
    module, x = layer("gru", num_layers=2, batch_first=True), seeded(100, T, IN)  # more than one batch
    x[70] *= 4
    net = convert(module, W8A8, x, activations="max")
    of = {name: each.act_quant for name, each in crossbar_layers(net)}
    with torch.no_grad():
        y = module(x)[0]  # of the last layer
    for name, values in (("crossbar_weight_hh_l1", y[:, :-1]), ("crossbar_weight_ih_l0", x)):
        lo, hi = of[name].window
        assert lo < 0
        torch.testing.assert_close(of[name].scale, torch.maximum(values.max() / hi, values.min() / lo), rtol=1e-5, atol=0)
    positive = convert(layer("rnn, relu", batch_first=True), W8A8, x, skip=["weight_ih*"])
    assert dict(crossbar_layers(positive))["crossbar_weight_hh_l0"].act_quant.window == (0, 255)


class Rows(nn.Module):
    """An image read row by row."""

    def __init__(self, kind, **options):
        super().__init__()
        self.rnn = kind(8, 32, batch_first=True, **options)
        self.head = nn.Linear(32 * (1 + self.rnn.bidirectional), 10)

    def forward(self, x):
        return self.head(self.rnn(x)[0].mean(1))


@pytest.mark.parametrize("kind, options", [(nn.LSTM, dict(bidirectional=True)), (nn.GRU, dict(num_layers=2)), (nn.RNN, {})])
def test_digits_row_by_row_lose_little(kind, options):
    """Under 0.3 points, of all images: that is five of them, where conversions were seen to change the answers to two."""
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    torch.manual_seed(0)
    order = torch.randperm(len(digits.target))
    images, labels = torch.from_numpy(digits.images).float()[order] / 16, torch.from_numpy(digits.target)[order]
    net = Rows(kind, **options)
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(20):
        for part in torch.randperm(1000).split(50):
            loss = nn.functional.cross_entropy(net(images[part]), labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad(), set_engine("auto"):
        right = net.eval()(images).argmax(1) == labels
        assert right[1000:].double().mean() > 0.8
        for spec in (W8A8, CrossbarSpec(8, 8, adc_bits=8)):
            found = convert(net, spec, images[:256])(images).argmax(1) == labels
            assert found.sum() > right.sum() - 0.003 * len(labels)


# ---- calls, counts, noise -------------------------------------------------------------------------------------------------


def test_all_steps_of_an_input_are_one_call_and_a_state_has_one_a_step():
    module = layer("lstm, projected", num_layers=2, bidirectional=True)
    net = convert(module, W8A8, seeded(T, N, IN), batch_dim=1)
    watch = Watch(net)
    with torch.no_grad():
        net(seeded(T, N, IN))
    for suffix in ("", "_reverse"):
        assert watch.calls[f"ih_l0{suffix}"] == [[N, T, IN]] and watch.calls[f"ih_l1{suffix}"] == [[N, T, 2 * PROJ]]
        assert watch.calls[f"hh_l1{suffix}"] == [[N, PROJ]] * T and watch.calls[f"hr_l1{suffix}"] == [[N, H]] * T
    for calls in watch.calls.values():
        calls.clear()
    with torch.no_grad():
        net(pack_padded_sequence(seeded(T, N, IN), LENGTHS, enforce_sorted=False))
    sizes = [sum(length > t for length in LENGTHS) for t in range(T)]
    assert watch.calls["ih_l0"] == [[sum(LENGTHS), IN]]  # padding is not read
    assert watch.calls["hh_l0"] == [[size, PROJ] for size in sizes]
    assert watch.calls["hh_l0_reverse"] == [[size, PROJ] for size in sizes[::-1]]


class Packing(nn.Module):
    """Padded sequences and their lengths; the last state of each."""

    def __init__(self, module):
        super().__init__()
        self.rnn = module

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths.cpu(), self.rnn.batch_first, enforce_sorted=False)
        y, lengths = pad_packed_sequence(self.rnn(packed)[0], self.rnn.batch_first)
        return y.mean(1)


def packing(spec, **options):
    module = layer("gru", num_layers=2, batch_first=True, **options)
    batch = seeded(N, T, IN), torch.tensor(LENGTHS)
    return convert(Packing(module), spec, [batch]), batch


def test_counts_are_those_of_the_steps_that_sequences_have():
    net, batch = packing(W8A8)
    counts = count(net, [batch])
    for name, own in counts.layers.items():
        inputs = IN if "ih_l0" in name else H
        assert own.outputs == sum(LENGTHS) and own.multiplications == sum(LENGTHS) * inputs * 3 * H, name
    by_name = {each["name"]: each["multiplications"] for each in net.crossbar_report.layers}
    assert by_name["rnn.weight_hh_l1"] == by_name["rnn.weight_ih_l1"] == sum(LENGTHS) * H * 3 * H
    assert net.crossbar_report.share == 1


def test_ones_are_counted_at_every_step():
    """Against the codes of the states themselves."""
    module, x, seen = layer("rnn", batch_first=True), seeded(N, T, IN), []
    net = convert(module, W8A8, x)
    own = dict(crossbar_layers(net))["crossbar_weight_hh_l0"]
    own.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    counts = count(net, x)
    codes = np.concatenate([rounded(state, float(own.act_quant.scale), *own.act_quant.window) for state in seen])
    wanted = [sum(((part >> bit) & 1).sum(0) for part in (np.maximum(codes, 0), np.maximum(-codes, 0))) for bit in range(own.spec.a_bits)]
    np.testing.assert_array_equal(counts.layers["crossbar_weight_hh_l0"].ones[:, 0], wanted)
    assert len(seen) == T and counts.images == N


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_sequence_has_the_same_noise_in_any_batch(batch_first):
    module, x = layer("lstm", num_layers=2, batch_first=batch_first), seeded(N, T, IN)
    at = (lambda part: part) if batch_first else (lambda part: part.transpose(0, 1))
    net = convert(module, W4A4, at(x), batch_dim=0 if batch_first else 1)
    program(net, NOISY, 1, adc_noise=1.0)
    with torch.no_grad():
        with image_numbers(0, N):
            whole = at(net(at(x))[0])
        parts = []
        for first, end in ((0, 2), (2, N)):
            with image_numbers(first, end - first):
                parts.append(at(net(at(x[first:end]))[0]))
        assert torch.equal(torch.cat(parts), whole)
        with image_numbers(N, N):
            assert not torch.equal(at(net(at(x))[0]), whole)


def test_each_step_has_noise_of_its_own():
    """Of a state that stays what it is, the errors of two steps have no correlation: r of n pairs is below 5 / sqrt(n)."""
    torch.manual_seed(0)
    module, x = nn.RNN(IN, 16, nonlinearity="relu", batch_first=True), seeded(40, T, IN)
    net, found = convert(module, W4A4, x), []
    program(net, NOISY, 1, adc_noise=1.0)
    own = dict(crossbar_layers(net))["crossbar_weight_hh_l0"]
    own.register_forward_pre_hook(lambda *args: (torch.full((40, 16), 0.5), *args[1][1:]))
    own.register_forward_hook(lambda _, args, y: found.append(y))
    with torch.no_grad(), image_numbers(0, 40):
        net(x)
    with without_adc(net), torch.no_grad():
        exact = own.simulate(torch.full((40, 16), 0.5))
    errors = torch.stack([(y - exact - (y - exact).mean(0)).flatten() for y in found[:T]])
    assert errors.std() > 0
    others = np.corrcoef(errors.numpy())[np.triu_indices(T, 1)]
    assert np.abs(others).max() < 5 / errors.shape[1] ** 0.5


def test_packed_rows_have_noise_of_their_own():
    """The rows of packed sequences are no whole number for each sequence; still no two have the same noise."""
    net, _ = packing(W4A4)
    program(net, NOISY, 1, adc_noise=1.0)
    own, found = dict(crossbar_layers(net))["rnn.crossbar_weight_ih_l0"], []
    own.register_forward_hook(lambda _, args, y: found.append(y))
    same = seeded(1, 1, IN).expand(N, T, IN)
    with torch.no_grad():
        for first in (0, N):
            with image_numbers(first, N):
                net(same, torch.tensor(LENGTHS))
    rows = torch.cat(found)
    assert len(rows) == 2 * sum(LENGTHS) and len(rows.unique(dim=0)) == len(rows)


# ---- networks -------------------------------------------------------------------------------------------------------------


def test_parts_that_are_skipped_stay_digital():
    torch.manual_seed(0)
    module, x = Rows(nn.LSTM, num_layers=2).eval(), seeded(N, 8, 8)
    net = convert(module, W8A8, x, skip=["*weight_hh*", "head"])
    assert [name for name, _ in crossbar_layers(net)] == ["rnn.crossbar_weight_ih_l0", "rnn.crossbar_weight_ih_l1"]
    assert net.crossbar_report.digital == dict.fromkeys(["rnn.weight_hh_l0", "rnn.weight_hh_l1", "head"], "skipped")
    assert net.crossbar_report.share == 40 * 8 * 128 / (8 * (40 + 64) * 128 + 320)
    second = convert(module, W8A8, x, skip=["rnn.*_l0"])
    assert [name for name, _ in crossbar_layers(second)] == ["rnn.crossbar_weight_ih_l1", "rnn.crossbar_weight_hh_l1", "head.crossbar"]
    with torch.no_grad():
        for each in (net, second, convert(module, W8A8, x, specs={"rnn.weight_hh*": CrossbarSpec(4, 4, adc_range="ideal")})):
            torch.testing.assert_close(each(x), module(x), rtol=0, atol=0.05)


def test_a_whole_layer_that_is_skipped_is_pytorchs_own():
    torch.manual_seed(0)
    module, x = Rows(nn.LSTM).eval(), seeded(N, 8, 8)
    net = convert(module, W8A8, x, skip=["rnn"])
    with torch.no_grad():
        assert torch.equal(net.rnn(x)[0], module.rnn(x)[0])
    assert [name for name, _ in crossbar_layers(net)] == ["head.crossbar"]


def test_bits_of_single_products():
    module, x = layer("gru", batch_first=True), seeded(N, T, IN)
    net = convert(nn.Sequential(module), CrossbarSpec(4, 4, adc_range="ideal"), x, specs={"*hh*": CrossbarSpec(6, 5, adc_range="ideal")})
    assert [(each.weight_quant.wbit, each.act_quant.abit) for _, each in crossbar_layers(net)] == [(8, 8), (6, 5)]


class Several(nn.Module):
    """A subclass, a layer with normed weights, a learned first state, a user's call to keep weights together, the function itself."""

    class Own(nn.GRU):
        def forward(self, x):
            return super().forward(x)[0]

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.own = self.Own(IN, H, batch_first=True)
        self.normed = parametrizations.weight_norm(nn.LSTM(H, H, batch_first=True), "weight_hh_l0")
        self.start = nn.Parameter(torch.randn(1, 1, H))
        self.last = nn.GRU(H, H)

    def forward(self, x):
        self.own.flatten_parameters()
        x = self.normed(self.own(x))[0]
        start = self.start.expand(-1, len(x), -1).contiguous()
        weights = [self.last.weight_ih_l0, self.last.weight_hh_l0, self.last.bias_ih_l0, self.last.bias_hh_l0]
        return torch.gru(x, start, weights, True, 1, 0.0, False, False, True)[0]


def test_however_a_network_comes_to_them():
    module, x = Several().eval(), seeded(N, T, IN)
    net = convert(module, None, x)
    assert [name for name, _ in crossbar_layers(net)] == [
        f"{name}.crossbar_weight_{part}_l0" for name in ("own", "normed", "last") for part in ("ih", "hh")]
    with torch.no_grad():
        torch.testing.assert_close(net(x), module(x), rtol=1e-4, atol=1e-6)
    net = convert(module, W8A8, x, rounding="gptq")
    assert not net.crossbar_report.digital and not net.crossbar_report.notes
    with torch.no_grad():
        torch.testing.assert_close(net(x), module(x), rtol=0, atol=0.05)


def test_a_state_that_never_comes_from_an_input_is_digital_and_named():
    x = seeded(N, 1, IN)
    net = convert(layer("gru", batch_first=True), W8A8, x)
    assert [name for name, _ in crossbar_layers(net)] == ["crossbar_weight_ih_l0"]
    assert net.crossbar_report.digital == {"weight_hh_l0": "a product whose input is the same for every image"}


# ---- copies, files, training ----------------------------------------------------------------------------------------------


@pytest.fixture
def digits_net():
    torch.manual_seed(0)
    module = Rows(nn.LSTM, num_layers=2, bidirectional=True).eval()
    return module, convert(module, CrossbarSpec(8, 8, cell_bits=2, adc_bits=5), seeded(16, 8, 8))


def test_copies_and_files_have_the_same_outputs(digits_net, tmp_path):
    module, net = digits_net
    x = seeded(N, 8, 8, seed=5)
    with torch.no_grad():
        wanted = net(x)
        assert torch.equal(copy.deepcopy(net)(x), wanted) and torch.equal(pickle.loads(pickle.dumps(net))(x), wanted)
        save(net, tmp_path / "net.pt")
        other = copy.deepcopy(module)
        for parameter in other.parameters():
            nn.init.zeros_(parameter)
        again = load(tmp_path / "net.pt", other)
        assert torch.equal(again(x), wanted) and str(again.crossbar_report) == str(net.crossbar_report)
        buffer = io.BytesIO()
        torch.save(net.state_dict(), buffer)
        buffer.seek(0)
        twin = convert(module, CrossbarSpec(8, 8, cell_bits=2, adc_bits=5), 2 * seeded(16, 8, 8, seed=9))
        assert not torch.equal(twin(x), wanted)
        twin.load_state_dict(torch.load(buffer, weights_only=True))
        assert torch.equal(twin(x), wanted)


def test_a_copy_is_one_of_its_own(digits_net):
    _, net = digits_net
    x, other = seeded(N, 8, 8, seed=5), copy.deepcopy(digits_net[1])
    with torch.no_grad():
        wanted = net(x)
        for parameter in other.parameters():
            parameter.data.zero_()
        assert not torch.equal(other(x), wanted) and torch.equal(net(x), wanted)


def test_weights_of_a_float_network_load_under_their_names(digits_net):
    module, net = digits_net
    torch.manual_seed(1)
    other = Rows(nn.LSTM, num_layers=2, bidirectional=True).eval()
    assert other.state_dict().keys() <= net.state_dict().keys()
    missing, unexpected = net.load_state_dict(other.state_dict(), strict=False)
    assert not unexpected and all(".crossbar" in name for name in missing)
    set_spec(net, W8A8)
    x = seeded(N, 8, 8, seed=5)
    with torch.no_grad():
        torch.testing.assert_close(net(x), other(x), rtol=0, atol=0.05)
        assert (net(x) - module(x)).abs().max() > 0.1


def test_weights_that_are_loaded_as_they_are_stay_on_arrays():
    """PyTorch's layers keep a list of their weights, of which here none is left as it was."""
    module, other, x = layer("lstm", bias=False), layer("lstm", bias=False), seeded(T, N, IN)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-0.5)
    net = convert(module, W8A8, x, correct="none")
    net.load_state_dict(other.state_dict(), strict=False, assign=True)
    watch = Watch(net)
    with torch.no_grad():
        torch.testing.assert_close(net(x)[0], other(x)[0], rtol=0, atol=0.05)
    assert watch.calls == {"ih_l0": [[N, T, IN]], "hh_l0": [[N, H]] * T}


def test_a_network_that_got_other_weights_computes_with_them(digits_net):
    """In place, without a trace: weights are not looked at between steps, but between calls."""
    _, net = digits_net
    x = seeded(N, 8, 8, seed=5)
    with torch.no_grad():
        before = net(x)
        net.rnn.weight_hh_l1.data.mul_(0.5)
        with pytest.warns(RuntimeWarning, match="weights have changed"):
            after, anew = net(x), copy.deepcopy(net)(x)
        assert not torch.equal(before, after) and torch.equal(anew, after)


def test_weights_are_looked_at_once_a_call_of_the_layer(digits_net, monkeypatch):
    _, net = digits_net
    seen, look = [], prepared.fingerprint
    with torch.no_grad():
        net(seeded(N, 8, 8))
        monkeypatch.setattr(prepared, "fingerprint", lambda tensors: seen.append(1) or look(tensors))
        net(seeded(N, 8, 8))
    assert len(seen) == len(crossbar_layers(net))  # not once a step


def test_calibration_and_planned_bits():
    module, x = Rows(nn.GRU), seeded(16, 8, 8)
    net = convert(module, CrossbarSpec(4, 4, adc_bits=2.0, adc_plan="ones"), x)
    histograms = calibrate(net, x)
    reads = histograms["rnn.crossbar_weight_hh_l0"].sum(axis=(1, 2, 3))
    digits = len(dict(crossbar_layers(net))["rnn.crossbar_weight_hh_l0"].spec.digit_bits)
    assert reads.tolist() == [16 * 8 * 2 * 96 * 4] * digits  # sequences, steps, phases, columns, slices
    with torch.no_grad():
        torch.testing.assert_close(net(x), module(x), rtol=0, atol=0.1)


def test_training_with_quantizers_learns():
    torch.manual_seed(0)
    net, x = convert(Rows(nn.LSTM), CrossbarSpec(4, 4, adc_range="ideal"), seeded(32, 8, 8), train="quantizers"), seeded(32, 8, 8)
    labels, losses = torch.arange(32) % 10, []
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(40):
        loss = nn.functional.cross_entropy(net(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(parameter.grad.abs().max() > 0 for parameter in net.parameters())


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_training_goes_through_the_arrays(kind):
    """Outputs are those of evaluation, bit for bit, with the same noise; the gradient reaches every weight, and the images."""
    x = seeded(N, 8, 8)
    net = convert(Rows(kind, num_layers=2, bidirectional=True), W4A4, x, train=Training("chips", NOISY, chip_steps=100))
    program(net, NOISY, 1, adc_noise=1.0)
    for _, each in crossbar_layers(net):
        each.correct_batches = False
    with image_numbers(0, N):
        y = net(x.requires_grad_())
    with image_numbers(0, N), torch.no_grad():
        assert torch.equal(net.eval()(x), y)
    y.square().sum().backward()
    for gradient in (x.grad, *(parameter.grad for parameter in net.parameters())):
        assert gradient.isfinite().all() and gradient.abs().max() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_through_arrays_that_change_no_read_are_those_of_quantizers(kind):
    module, x, results = layer(kind, num_layers=2, batch_first=True), seeded(N, T, IN), []
    for train in ("quantizers", "adc"):
        net = convert(module, CrossbarSpec(8, 8, adc_bits=8, adc_range="full", reference="digital"), x, train=train, correct="none")
        y, state = net(x)
        sum(part.square().sum() for part in tensors((y, state))).backward()
        results.append([y, *(parameter.grad for parameter in net.parameters())])
    for found, wanted in zip(*results):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


# ---- errors ---------------------------------------------------------------------------------------------------------------


def test_what_cannot_be_done_is_said():
    class Operator(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = layer("gru")

        def forward(self, x):
            return torch.ops.aten.gru.input(x, x.new_zeros(1, N, H), self.rnn._flat_weights, True, 1, 0.0, False, False, False)[0]

    x = seeded(T, N, IN)
    with pytest.raises(ValueError, match=r"^rnn.weight_ih_l0 cannot be put on crossbars: it is a recurrent layer \(and 1 more\)"):
        convert(Operator(), W8A8, x)
    with pytest.raises(ValueError, match="Expected sequence length to be larger than 0 in RNN"):
        convert(layer("lstm"), W8A8, x[:0], batch_dim=1)
    packed = pack_padded_sequence(x, [T] * N)
    for images in (packed, [packed], [(packed,)]):
        with pytest.raises(ValueError, match="^a batch has packed sequences, which cannot be cut into examples; give padded ones"):
            convert(layer("lstm"), W8A8, images)

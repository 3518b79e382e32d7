"""Wires that resist: against closed forms, a dense nodal matrix, and the circuit solver badcrossbar."""

import logging
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ladders import behind, solve

from models.quant.devices import wires as wires_module
from models.quant.devices.wires import ROW_OHM, WIRE_OHM, Curve, Wires, effective, gate_curve, gate_exact


@pytest.fixture(scope="module")
def badcrossbar():
    """The package of that name, which warns that its plots need cairo, and lets the root logger print."""
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    with warnings.catch_warnings(record=True):
        package = pytest.importorskip("badcrossbar")
    root.setLevel(level)
    root.handlers[:] = handlers
    logging.getLogger("badcrossbar").setLevel(logging.WARNING)
    if not hasattr(package, "compute"):
        pytest.skip("badcrossbar lacks scipy or pathvalidate")
    return package


def dense(cells, volts, wire_ohm, row_ohm=0.0, driver_ohm=0.0):
    """Currents of the columns from one matrix of all nodes; an independent oracle. Nodes without resistance between them are one."""
    rows, columns = cells.shape
    wires = [(("sense", c), ("bit", rows - 1, c), wire_ohm) for c in range(columns)]
    wires += [(("bit", r, c), ("bit", r + 1, c), wire_ohm) for r in range(rows - 1) for c in range(columns)]
    wires += [(("driver", r), ("word", r, 0), row_ohm + driver_ohm) for r in range(rows)]
    wires += [(("word", r, c), ("word", r, c + 1), row_ohm) for r in range(rows) for c in range(columns - 1)]
    name = {node: node for wire in wires for node in wire[:2]}

    def find(node):
        return node if name[node] == node else find(name[node])

    for a, b, ohm in wires:
        if ohm == 0:  # the first of a pair is the terminal, where one is
            name[find(b)] = find(a)
    edges = [(a, b, 1 / ohm) for a, b, ohm in wires if ohm] + [
        (("word", r, c), ("bit", r, c), cells[r, c]) for r in range(rows) for c in range(columns)]
    nodes = {node: i for i, node in enumerate(sorted({find(node) for node in name}, key=str))}
    fixed = {nodes[find(("sense", c))]: np.zeros(len(volts)) for c in range(columns)}
    fixed |= {nodes[find(("driver", r))]: volts[:, r] for r in range(rows)}
    matrix, right = np.zeros((len(nodes), len(nodes))), np.zeros((len(nodes), len(volts)))
    for a, b, siemens in edges:
        i, j = nodes[find(a)], nodes[find(b)]
        matrix[[i, j], [i, j]] += siemens
        matrix[[i, j], [j, i]] -= siemens
    for i, value in fixed.items():
        matrix[i] = np.eye(len(nodes))[i]
        right[i] = value
    v = np.linalg.solve(matrix, right)
    return np.array([sum(cells[r, c] * (v[nodes[find(("word", r, c))]] - v[nodes[find(("bit", r, c))]]) for r in range(rows))
                     for c in range(columns)]).T


def array(seed, rows, columns, inputs=5):
    """Cells of 6 to 100 kOhm, some of them open, and inputs of 0 or 0.2 V."""
    rng = np.random.default_rng(seed)
    cells = rng.choice([0, 1 / 6e3, 1 / 2e4, 1 / 1e5], (rows, columns), p=[0.1, 0.4, 0.2, 0.3])
    return cells, 0.2 * (rng.random((inputs, rows)) < 0.5)


def close(found, wanted, share):
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= share * np.abs(wanted).max()


# ---- closed forms ----------------------------------------------------------------------------------------------------------


def uniform(n, g, r):
    """Current per volt of a column of n equal cells, all of them driven."""
    length = np.arccosh(1 + g * r / 2)
    return (1 - np.cosh((n - 0.5) * length) / np.cosh((n + 0.5) * length)) / r


@pytest.mark.parametrize("n", [1, 2, 3, 17, 128])
@pytest.mark.parametrize("g,r", [(1 / 6e3, 1.0), (1 / 6e3, 0.34), (1e-5, 5.6), (0.01, 20.0)])
def test_uniform_column(n, g, r):
    cells, volts = np.full((n, 3), g), np.full((1, n), 0.3)
    for found in (solve(cells, volts, r), solve(cells, volts, r, access="gate"), 0.3 * gate_exact(cells, volts > 0, r)):
        assert found == pytest.approx(np.full((1, 3), 0.3 * uniform(n, g, r)), rel=1e-9, abs=0)


@pytest.mark.parametrize("n", [1, 2, 31])
def test_uniform_word_line(n):
    """The same ladder seen from the driver: the currents of all columns together are those of the driver."""
    g, r = 1 / 6e3, 2.0
    assert solve(np.full((1, n), g), [[0.3]], 0.0, r).sum() == pytest.approx(0.3 * uniform(n, g, r), rel=1e-9, abs=0)


def test_drivers_alone():
    """`I = V g / (1 + R sum g)`: a driver and the parallel cells of its row."""
    cells, volts = array(0, 12, 7)
    found = solve(cells, volts, 0, 0, 250)
    close(found, volts @ (cells / (1 + 250 * cells.sum(axis=1, keepdims=True))), 1e-13)


def test_one_cell():
    assert solve([[1 / 900]], [[1.0]], 30, 20, 50) == pytest.approx(np.array([[1 / 1000]]), rel=1e-14, abs=0)


def test_without_resistance_nothing_changes():
    cells, volts = array(1, 20, 9)
    assert np.array_equal(effective(cells, Wires()), cells)
    for access in ("voltage", "gate"):
        close(solve(cells, volts, 0.0, access=access), volts @ cells, 1e-14)
    close(0.2 * gate_exact(cells, volts > 0, 0.0), volts @ cells, 1e-14)
    curve = gate_curve(cells, volts > 0, 0.0)
    assert np.array_equal(curve.cells, cells)
    assert curve.b == (1, 0, 0)
    assert curve.error == 0


@pytest.mark.parametrize("rows", [12, 32, 72])
def test_a_shorter_array_behind_the_curve_of_a_longer_one(rows):
    def some(seed, rows):
        rng = np.random.default_rng(seed)
        return rng.uniform(8e-6, 166e-6, (rows, 40)), rng.random((200, rows)) < rng.random((200, 1)) / 2

    def error(cells, on, b, wanted):
        s = on @ cells
        return np.sqrt(np.mean((s * (b[0] + s * (b[1] + s * b[2])) - wanted) ** 2) / np.mean(wanted**2))

    b = gate_curve(*some(0, 128), 1.0).b
    cells, on = some(1, rows)
    fit, wanted = gate_curve(cells, on, 1.0, b), gate_exact(cells, some(2, rows)[1], 1.0)
    assert fit.b == b and error(fit.cells, some(2, rows)[1], b, wanted) < 0.02
    assert fit.error == pytest.approx(error(fit.cells, on, b, gate_exact(cells, on, 1.0)), rel=1e-9, abs=0)
    assert np.allclose(fit.cells, cells * fit.left[:, None], rtol=1e-12)
    assert error(gate_curve(cells, on, 1.0).cells, some(2, rows)[1], b, wanted) > 0.05  # as if the line were as loaded


# ---- other solvers ---------------------------------------------------------------------------------------------------------

SHAPES = [(1, 1), (1, 4), (4, 1), (5, 3), (3, 6), (12, 9)]
OHMS = [(1.0, 0, 0), (0, 1.5, 0), (0, 0, 100), (0, 1.5, 100), (1.0, 2.0, 0), (1.0, 0, 100), (1.0, 2.0, 50), (3e4, 1e4, 2e4)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ohm", OHMS)
def test_voltage_access_against_a_dense_matrix(shape, ohm):
    cells, _ = array(2, *shape)
    volts = np.random.default_rng(3).normal(size=(4, shape[0]))
    close(solve(cells, volts, *ohm), dense(cells, volts, *ohm), 1e-10)


@given(seed=st.integers(0, 2**32), shape=st.tuples(st.integers(1, 8), st.integers(1, 8)),
       ohm=st.tuples(*[st.sampled_from([0.0, 0.5, 40.0, 3e3])] * 3))
@settings(max_examples=40)
def test_any_array_against_a_dense_matrix(seed, shape, ohm):
    rng = np.random.default_rng(seed)
    cells, volts = rng.random(shape) * 1e-3 * (rng.random(shape) < 0.8), rng.random((2, shape[0]))
    found, wanted = solve(cells, volts, *ohm), dense(cells, volts, *ohm)
    assert np.abs(found - wanted).max() <= 1e-10 * max(np.abs(wanted).max(), 1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_gate_access_against_a_dense_matrix(shape):
    """For each input an array of its own, in which the cells of the other rows are open; supplies may differ."""
    cells, volts = array(4, *shape)
    volts = volts * np.random.default_rng(5).uniform(0.5, 1.5, volts.shape)
    wanted = np.concatenate([dense(cells * (v != 0)[:, None], v[None], 3.0) for v in volts])
    close(solve(cells, volts, 3.0, access="gate"), wanted, 1e-11) if wanted.any() else None


@pytest.mark.parametrize("shape,word,bit", [
    ((16, 11), 1.5, 0.7), ((11, 16), 0.4, 2.0), ((64, 64), 1.0, 1.0), ((20, 30), 0, 1.0), ((20, 30), 2.0, 0)])
def test_badcrossbar(badcrossbar, shape, word, bit):
    cells, volts = array(6, *shape)
    with np.errstate(divide="ignore"):
        ohms = 1 / cells
    wanted = badcrossbar.compute(volts.T, ohms, r_i_word_line=word, r_i_bit_line=bit).currents.output
    assert solve(cells, volts, bit, word) == pytest.approx(wanted, rel=1e-9, abs=0)


def test_badcrossbar_with_gates(badcrossbar):
    """A row that is cut off has no cells."""
    cells, volts = array(7, 32, 8)
    for v in volts:
        with np.errstate(divide="ignore"):
            ohms = 1 / (cells * (v > 0)[:, None])
        wanted = badcrossbar.compute(v[:, None], ohms, r_i_word_line=0, r_i_bit_line=2.5).currents.output
        assert solve(cells, v[None], 2.5, access="gate") == pytest.approx(wanted, rel=1e-9, abs=0)
        assert 0.2 * gate_exact(cells, v[None] > 0, 2.5) == pytest.approx(wanted, rel=1e-9, abs=0)


README_VOLTS = np.array([[1.5, 4.1, 2.6, 2.1], [2.3, 4.5, 1.1, 0.8], [1.7, 4.0, 3.3, 1.1]]).T
README_OHMS = np.array([[345, 903, 755, 257, 646], [652, 401, 508, 166, 454], [442, 874, 190, 244, 635]])
README_AMPERES = np.array([
    [0.011585025421547, 0.0091906416362524, 0.015115681173258, 0.025833208221257, 0.0098117928826574],
    [0.027511479126334, 0.020013673442647, 0.034555728347364, 0.057632858259487, 0.021998285268505],
    [0.016499341463226, 0.0092538880287872, 0.022471161605166, 0.029380424625038, 0.011366741277999],
    [0.0096873619085334, 0.00549369660038, 0.009925952138338, 0.016978035907271, 0.0065862078010864],
])


def test_the_example_of_badcrossbars_readme():
    """What version 1.1.0 gives for it, so that this is checked where it is not installed."""
    assert solve(1 / README_OHMS, README_VOLTS, 0.5, 0.5) == pytest.approx(README_AMPERES, rel=1e-12, abs=0)


def test_the_example_is_what_badcrossbar_gives(badcrossbar):
    assert badcrossbar.compute(README_VOLTS.T, README_OHMS, 0.5).currents.output == pytest.approx(README_AMPERES, rel=1e-12, abs=0)


# ---- effective cells -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ohm", OHMS)
def test_effective_cells_serve_all_inputs(ohm):
    """Cells found once, inputs that they have not seen; the oracle solves each input."""
    cells, _ = array(8, 10, 13)
    volts = np.random.default_rng(9).normal(size=(20, 10))
    close(volts @ effective(cells, Wires("voltage", *ohm)), dense(cells, volts, *ohm), 1e-10)


@pytest.mark.parametrize("ohm", [(1.0, 0, 0), (0, 1.0, 0), (1.0, 2.0, 30)])
@pytest.mark.parametrize("shape", [(128, 128), (128, 40), (40, 128)])
def test_effective_cells_of_full_arrays(ohm, shape):
    """A matrix of all nodes would have 32,768 rows: here the two ways to eliminate, by rows and by columns, agree."""
    cells, _ = array(10, *shape)
    found = effective(cells, Wires("voltage", *ohm))
    padded = np.zeros((max(shape), shape[1])) if shape[1] > shape[0] else np.zeros((shape[0], max(shape) + 1))
    padded[-shape[0]:, :shape[1]] = cells  # cells that do not conduct, far from sense nodes and drivers, change nothing
    other = effective(padded, Wires("voltage", *ohm))[-shape[0]:, :shape[1]]
    close(other, found, 1e-12)
    assert (found >= 0).all()
    assert (found.sum(axis=0) < cells.sum(axis=0)).all()  # of single cells only where no word line resists: currents find other ways


@pytest.mark.parametrize("ohm", OHMS)
def test_a_batch_is_one_by_one(ohm):
    cells = np.stack([array(seed, 6, 9)[0] for seed in range(6)]).reshape(2, 3, 6, 9)
    found = effective(cells, Wires("voltage", *ohm))
    for i, j in np.ndindex(2, 3):
        assert np.array_equal(found[i, j], effective(cells[i, j], Wires("voltage", *ohm)))


@pytest.mark.parametrize("shape", [(5, 12), (12, 5)])
def test_blocks_are_the_shorter_side(shape, monkeypatch):
    """An array with 1,024 columns and 128 rows takes 64 times as long otherwise."""
    seen, inner = [], wires_module._nodal
    monkeypatch.setattr(wires_module, "_nodal", lambda cells, *ohm: seen.append(cells.shape) or inner(cells, *ohm))
    effective(array(19, *shape)[0], Wires("voltage", 1, 1))
    assert seen == [(1, 12, 5)]


def test_inputs_are_left_alone():
    cells, volts = array(11, 8, 8)
    kept = cells.copy(), volts.copy()
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    for wires in (Wires(), Wires(wire_ohm=1), Wires(row_ohm=1), Wires(wire_ohm=1, row_ohm=1)):
        effective(cells, wires)[...] = 0
    gate_curve(cells, volts > 0, 0.0).cells[...] = 0
    gate_curve(cells, volts > 0, 1.0).cells[...] = 0
    solve(cells, volts, 1, access="gate")
    assert torch.get_num_threads() == threads + 1
    torch.set_num_threads(threads)
    assert np.array_equal(cells, kept[0]) and np.array_equal(volts, kept[1])


# ---- gate access -----------------------------------------------------------------------------------------------------------


def test_one_supply_is_the_general_case():
    cells, volts = array(12, 128, 40, inputs=150)
    close(0.2 * gate_exact(cells, volts > 0, 1.3), solve(cells, volts, 1.3, access="gate"), 1e-13)


def test_rows_that_are_off_load_nothing():
    """With all rows on both ways of access are the same; with some off a grounded cell takes current, a cut one does not."""
    cells, volts = array(13, 64, 16)
    ones = np.ones((1, 64))
    close(solve(cells, ones, 2.0, access="gate"), solve(cells, ones, 2.0), 1e-13)
    assert (solve(cells, volts, 2.0, access="gate") > solve(cells, volts, 2.0)).all()


def test_gate_exact_of_many_arrays():
    cells = np.stack([array(seed, 16, 5)[0] for seed in range(3)])
    on = np.random.default_rng(14).random((3, 70, 16)) < 0.4
    each, shared = gate_exact(cells, on, 2.0), gate_exact(cells, on[0], 2.0)
    for i in range(3):
        assert np.array_equal(each[i], gate_exact(cells[i], on[i], 2.0))
        assert np.array_equal(shared[i], gate_exact(cells[i], on[0], 2.0))
    assert np.array_equal(gate_exact(cells, on.astype(np.int8), 2.0), each)


def rms(found, wanted):
    return np.sqrt(np.mean((found - wanted) ** 2) / np.mean(wanted**2))


@pytest.mark.parametrize("share,wire_ohm,low,high", [
    (0.25, 1.0, 0.12, 0.006), (0.25, 0.34, 0.04, 0.0025), (0.1, 1.0, 0.06, 0.006), (0.25, 4.0, 0.4, 0.015)])
def test_curve_is_close(share, wire_ohm, low, high):
    """Half the cells on, 6 kOhm; ignoring the wires would be `low` off or more."""
    rng = np.random.default_rng(15)
    cells, on = rng.choice([1 / 6e3, 1 / 1e5], (128, 64)), rng.random((600, 128)) < share
    curve = gate_curve(cells, on[:300], wire_ohm)
    assert curve.error < high
    for part in (on[:300], on[300:]):
        exact = gate_exact(cells, part, wire_ohm)
        assert rms(part @ cells, exact) > low
        assert rms(behind(curve, part), exact) < 1.1 * curve.error
    assert curve.error == pytest.approx(rms(behind(curve, on[:300]), gate_exact(cells, on[:300], wire_ohm)), rel=1e-6)


def test_curve_is_better_than_what_it_is_made_of():
    """Effective cells behind the best straight line, and the best curve behind the cells as they are, are further off."""
    rng = np.random.default_rng(16)
    cells, on = rng.choice([1 / 6e3, 1 / 1e5], (128, 64)), rng.random((300, 128)) < 0.5 * rng.random((300, 1))
    curve, exact = gate_curve(cells, on, 1.0), gate_exact(cells, on, 1.0).ravel()
    s, plain = (on @ curve.cells).ravel(), (on @ cells).ravel() * 1e3
    powers = plain[:, None] ** [1, 2, 3]
    assert curve.error < 0.5 * rms(s * (s @ exact) / (s @ s), exact)
    assert curve.error < 0.8 * rms(powers @ np.linalg.lstsq(powers, exact, rcond=None)[0], exact)


def test_effective_cells_of_a_curve_are_what_a_little_more_conductance_does():
    """At the mean input: here the only one, all rows on, of a column that is not uniform."""
    cells = np.random.default_rng(18).uniform(1e-5, 1e-3, (24, 1))
    share = (gate_curve(cells, np.ones((1, 24)), 20.0).cells / cells).ravel()
    more = cells + 1e-8 * np.eye(24)[:, :, None]  # 24 arrays, another cell of each is larger
    rise = (gate_exact(more, np.ones((1, 24)), 20.0) - gate_exact(cells, np.ones((1, 24)), 20.0)).ravel() / 1e-8
    assert share == pytest.approx(rise, rel=1e-4)
    assert share.min() < 0.1 < 0.7 < share.max()


def test_rows_that_are_seldom_on_count_seldom():
    """The mean line is that of the inputs: rows that are never on are no load, and weigh as the wire behind them."""
    cells, on = np.full((40, 3), 1 / 6e3), np.ones((2, 40))
    on[:, :20] = 0
    curve, short = gate_curve(cells, on, 5.0), gate_curve(cells[20:], on[:, 20:], 5.0)
    close(curve.cells[20:], short.cells, 1e-13)
    close(curve.cells[:20], np.full((20, 3), short.cells[0, 0]), 1e-13)


def test_one_curve_for_many_arrays():
    cells = np.stack([array(seed, 64, 20)[0] for seed in range(4)])
    on = np.random.default_rng(17).random((4, 90, 64)) < 0.3
    curve = gate_curve(cells, on, 1.0)
    assert curve.cells.shape == cells.shape and curve.left.shape == cells.shape[:2]
    assert len(curve.b) == 3 and all(type(b) is float for b in (*curve.b, curve.error))
    assert curve.error == pytest.approx(max(map(rms, behind(curve, on), gate_exact(cells, on, 1.0))), rel=1e-6)
    assert curve.error < 0.02


def test_one_curve_for_sparse_and_dense_arrays():
    """Each array has the wires of its own mean line and a factor, so that one curve is within 1.2 % of all of them, and within 2 % of
    arrays whose currents differ seven times; cells with the wires of another array are not."""
    rng = np.random.default_rng(19)
    cells = np.stack([np.where(rng.random((128, 64)) < share, 1 / 6e3, 1 / 1.2e5) for share in (0.25, 0.5, 0.4)] + [np.zeros((128, 64))])
    on, other = rng.random((2, 4, 64, 128)) < 0.5 * rng.random((2, 4, 64, 1))
    curve, exact = gate_curve(cells, on, 1.0), gate_exact(cells, other, 1.0)
    errors = [rms(*pair) for pair in zip(behind(curve, other)[:3], exact)]
    assert max(errors) < 0.012 and curve.error == pytest.approx(max(errors), rel=0.2)
    assert not behind(curve, other)[3].any() and np.array_equal(curve.left[3], np.ones(128))  # an array that conducts nothing
    cells[0] = np.where(rng.random((128, 64)) < 0.1, 1 / 6e3, 1 / 1.2e5)
    cells[1] = np.where(rng.random((128, 64)) < 0.7, 1 / 6e3, 1 / 1.2e5)
    curve, exact, first = gate_curve(cells[:2], on[:2], 1.0), gate_exact(cells[:2], other[:2], 1.0), gate_curve(cells[0], on[0], 1.0)
    assert max(rms(*pair) for pair in zip(behind(curve, other[:2]), exact)) < 0.02
    whole = Curve(cells[1] * first.left[:, None], first.b, 0.0, first.left)  # as if all arrays had the wires of the first
    assert rms(behind(whole, other[1]), exact[1]) > 0.03


def test_curve_without_currents():
    curve = gate_curve(np.full((4, 2), 1e-4), np.zeros((3, 4)), 1.0)
    assert curve.b == (1, 0, 0) and curve.error == 0


# ---- settings and what is refused --------------------------------------------------------------------------------------------

# Node: wire width, thickness over width, resistivity, barrier (nm, 1, 1e-8 ohm m, nm), from NeuroSim V1.4.
NODES = {"130nm": (175, 1.6, 2.01, 10), "90nm": (110, 1.6, 2.20, 10), "65nm": (105, 1.7, 2.21, 7), "45nm": (80, 1.7, 2.37, 5),
         "32nm": (56, 1.8, 2.63, 4), "22nm": (40, 1.9, 2.97, 2.5), "14nm": (32, 2.0, 3.25, 2.5), "7nm": (20, 2.0, 4.17, 2)}


def test_ohms_of_the_nodes():
    assert list(WIRE_OHM) == list(ROW_OHM) == list(NODES)
    for node, (width, ratio, rho, barrier) in NODES.items():
        bulk = 4 * rho * 10 / (ratio * width)  # 1e-8 ohm m are 10 ohm nm
        of_width = bulk / (1 - barrier * (2 * ratio + 1) / (ratio * width)) / 4
        assert WIRE_OHM[node] == pytest.approx(4 * of_width, rel=0.03) and ROW_OHM[node] == pytest.approx(12 * of_width, rel=0.03)


@pytest.mark.parametrize("values,message", [
    (dict(access="both"), "access is 'both'; allowed are voltage, gate"),
    (dict(wire_ohm=-1.0), "wire_ohm is -1.0; allowed is a number from 0 up"),
    (dict(row_ohm=float("inf")), "row_ohm is inf; allowed is a number from 0 up"),
    (dict(driver_ohm=float("nan")), "driver_ohm is nan; allowed is a number from 0 up"),
    (dict(wire_ohm="1"), "wire_ohm is '1'; allowed is a number from 0 up"),
    (dict(wire_ohm=True), "wire_ohm is True; allowed is a number from 0 up"),
    (dict(access="gate", row_ohm=1.0), "row_ohm is 1.0 with access 'gate'; no current flows into a gate, so allowed is 0"),
    (dict(access="gate", driver_ohm=5), "driver_ohm is 5 with access 'gate'; no current flows into a gate, so allowed is 0"),
])
def test_wires_that_are_refused(values, message):
    with pytest.raises(ValueError) as error:
        Wires(**values)
    assert str(error.value) == message


def test_one_curve_weighs_arrays_by_their_own_currents():
    """No other coefficients near those found have a smaller sum of squares, each array's currents in units of their root mean square."""
    rng = np.random.default_rng(0)
    cells = np.stack([np.where(rng.random((128, 32)) < share, 1 / 6e3, 1 / 1.2e5) for share in (0.1, 0.9)])
    on = rng.random((2, 64, 128)) < 0.5 * rng.random((2, 64, 1))
    curve, exact = gate_curve(cells, on, 6.0), gate_exact(cells, on, 6.0)
    s, size = on @ curve.cells, np.sqrt((exact**2).mean((1, 2), keepdims=True))

    def error(b):
        return (((s * (b[0] + s * (b[1] + s * b[2])) - exact) / size) ** 2).sum()

    least = error(curve.b)
    for i in range(3):
        for step in (-1e-3, -3e-4, 3e-4, 1e-3):
            b = np.array(curve.b)
            b[i] *= 1 + step
            assert error(b) > (1 - 1e-5) * least, i

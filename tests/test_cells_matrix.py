"""The CPU engine's two ways to add up cells on a grid, sums of rows and products of matrices, each made to run every layer that it can."""

from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from strategies import grid_cases
from test_cells import assert_same, layer_case

from models.quant import CrossbarSpec
from models.quant.engines import reference
from models.quant.engines.cpu import cells, engine
from models.quant.engines.cpu.grid import cells_matrix
from models.quant.engines.cpu.grid.cells_narrow import NOT_NARROW
from models.quant.arrays.readout import Readout

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["rows", "matrix"])
def way(request, monkeypatch):
    """Layers of few rows and pixels too; a processor without tiles has one way."""
    if request.param == "rows":
        monkeypatch.setattr(cells, "can_multiply", lambda: False)
    else:  # layers that 16 bits hold too
        monkeypatch.setattr(cells.Prepared, "_narrow", NOT_NARROW)
    monkeypatch.setattr(cells, "TILE_ROWS", 0)
    monkeypatch.setattr(cells_matrix, "SPARSEST", 1000)
    monkeypatch.setattr(cells_matrix, "FEWEST", 1)
    return request.param


@given(case=st.one_of(grid_cases(adc_ranges=["calibrated", "dynamic"]), grid_cases(planned="ones")))
@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_layer(way, case):
    layer = case.layer()
    assume(engine.unsupported(layer, torch.device("cpu")) is None)
    found = cells.Prepared(layer).simulate(case.input())
    wanted = oracle.accumulate(case.a_codes, case.w_codes, case.spec, case.geometry, case.reference_twice, case.delta, case.q_min,
                               case.bits, case.cells)
    assert_same(engine, found.numpy(), wanted)


@pytest.mark.parametrize("dac_bits", [1, 2, 3])
@pytest.mark.parametrize("channels, out, mapping", [(130, 70, "tap"), (25, 129, "im2col")])
def test_whole_tiles_and_parts_of_them(way, channels, out, mapping, dac_bits):
    """Five by six pixels are more than a strip's turn and no multiple of it; digits of several bits scale the cells' upper bytes."""
    case = layer_case(CrossbarSpec(4, 4, 1, 6, 128, mapping, dac_bits=dac_bits), channels, out, size=(5, 6), padding=(1, 1, 1, 1))
    case.delta = [3.7, 1.3, 0.9, 2.0]
    found = engine.accumulate(engine.prepare(case.layer()), case.input())
    assert_same(engine, found.numpy(), oracle.accumulate(case.a_codes, case.w_codes, case.spec, case.geometry, case.reference_twice,
                                                 case.delta, case.q_min, cells=case.cells))


@pytest.mark.parametrize("geometry", [dict(stride=(2, 1)), dict(stride=(3, 2), padding=(2, 0, 1, 3), dilation=(1, 2)),
                                      dict(stride=(1, 3), padding=(1, 1, 0, 0), dilation=(3, 1), groups=2)], ids=str)
def test_strips_of_several_rows(way, geometry):
    """Enough images that a work item is a whole one, whose output rows are taken several at a time; the last strip is shorter. Columns are
    too many for pixels side by side."""
    case = layer_case(CrossbarSpec(2, 2, 1, 5, 32), 4, 140, size=(45, 23), images=8, **geometry)
    case.delta = [0.9, 1.3]
    found = engine.accumulate(engine.prepare(case.layer()), case.input())
    assert_same(engine, found.numpy(), oracle.accumulate(case.a_codes, case.w_codes, case.spec, case.geometry, case.reference_twice,
                                                         case.delta, case.q_min, cells=case.cells))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("images", [0, 1, 64, 129, 130])
def test_pixels_of_layers_of_1_x_1(way, images, threads):
    """One behind the other, in rows of at most 64, as many for each thread; the last is filled up."""
    case = layer_case(CrossbarSpec(2, 2, 1, 5, 32), 40, 140, kernel=(1, 1), size=(1, 1), images=images)
    torch.set_num_threads(threads)  # one again behind the test
    found = engine.accumulate(engine.prepare(case.layer()), case.input())
    assert found.shape[1:] == (images, 1, 1, 140)
    assert_same(engine, found.numpy(), oracle.accumulate(case.a_codes, case.w_codes, case.spec, case.geometry, case.reference_twice,
                                                         case.delta, case.q_min, cells=case.cells))


@pytest.mark.parametrize("readout", [
    Readout(base=900.0, cell_noise=((40.0, 0.0, 0.5),) * 4, seed=5), Readout(cell_noise=((400.0, 1.5, 0.5),) * 4, seed=7),
    Readout(curve=((0.98, -1e-6, 2e-12, 20.0),) * 4)], ids=["noise", "noise of levels", "curve"])
def test_what_reads_have_besides(way, readout):
    case = layer_case(CrossbarSpec(4, 4, 1, 6, 128), 130, 70, kernel=(2, 2), padding=(1, 1, 1, 1))
    layer = replace(case.layer(), readout=readout)
    found = engine.accumulate(engine.prepare(layer), case.input())
    assert_same(engine, found.numpy(), reference.accumulate(layer, case.input()).numpy())


def test_cells_of_two_bytes():
    """Products of their bytes, with the digit scaled for the upper one, are those of the cells: the largest ones that fit, and next to
    where a byte turns over."""
    cell = np.array([-16384, -16383, -129, -128, -65, -64, -1, 0, 63, 64, 127, 128, 191, 192, 16318, 16319])
    words = cells_matrix.tiles(np.broadcast_to(cell[None, :, None], (1, len(cell), 64)), 7).view(np.int8)
    high, low = words.reshape(2, 4, 16, 16, 4)[:, 0, :4, 3].reshape(2, 16).astype(int)  # a column of the first block, 16 rows
    assert np.array_equal(128 * high + low, cell)


@pytest.mark.parametrize("dac_bits, cell, fits", [(1, 16319, True), (1, 16320, False), (3, 4079, True), (3, 4080, False), (3, -4096, True)])
def test_which_cells_fit_in_two_bytes(dac_bits, cell, fits):
    case = layer_case(CrossbarSpec(4, 4, 1, 6, 64, dac_bits=dac_bits), channels=64, out=64, kernel=(1, 1))
    cells_of_one = torch.full((4, 64, 64), cell)
    assert cells_matrix.fits(case.layer(), cells_of_one) == fits
    bits = cells_matrix.scale_bits(case.layer())
    high, low = cells_matrix.tiles(cells_of_one.numpy(), bits).view(np.int8).reshape(4, 2, -1).swapaxes(0, 1).astype(int)
    assert ((2**bits * high + low == cell).all()) == fits

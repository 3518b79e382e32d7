"""From one node to another (`energy_factor`, `area_factor`), 130 nm to 7 nm.

Source: Stillmaker and Baas, "Scaling equations for the accurate prediction of CMOS device performance from 180 nm to 7 nm",
Integration 58, 2017: energy of a gate as a polynomial of the supply (tables for each node, high performance), area relative to 45 nm.
Each node is taken at the nominal supply of its predictive models; between nodes both factors are linear in logarithms.
"""

import numpy as np

# nm: (supply V, e2, e1, e0 of energy = e2 V^2 + e1 V + e0 in fJ, area relative to 45 nm)
NODES = {
    130: (1.3, 7.171, -6.709, 2.904, 6.4), 90: (1.2, 4.762, -4.781, 2.092, 2.8), 65: (1.1, 3.755, -4.398, 1.975, 1.5),
    45: (1.0, 1.018, -0.3107, 0.1539, 1.0), 32: (0.9, 0.8367, -0.4341, 0.1701, 0.46), 20: (0.9, 0.373, -0.1582, 0.04104, 0.21),
    16: (0.85, 0.2958, -0.1241, 0.03024, 0.19), 14: (0.8, 0.2363, -0.09675, 0.02239, 0.17), 10: (0.75, 0.2068, -0.09311, 0.02375, 0.1),
    7: (0.7, 0.1776, -0.09097, 0.02447, 0.059)}
SMALLEST, LARGEST = min(NODES), max(NODES)
_LOG_NODE = np.log(sorted(NODES))
_LOG_ENERGY = np.log([np.polyval(NODES[node][1:4], NODES[node][0]) for node in sorted(NODES)])
_LOG_AREA = np.log([NODES[node][4] for node in sorted(NODES)])


def energy_factor(node: float, to: float) -> float:
    """What the energy (and here also the leakage) of a circuit at `node` nm is multiplied by at `to` nm."""
    return _between(_LOG_ENERGY, node, to)


def area_factor(node: float, to: float) -> float:
    """What its area is multiplied by."""
    return _between(_LOG_AREA, node, to)


def _between(logs: np.ndarray, node: float, to: float) -> float:
    return float(np.exp(np.interp(np.log(to), _LOG_NODE, logs) - np.interp(np.log(node), _LOG_NODE, logs)))

"""What a network on crossbars costs: energy, latency, area and use of its arrays, counted from its own bits.

    counts = count(network, images)                                    # once; serves all cells and ADCs
    report = estimate(counts, network, Technology.load("rram_32nm"))   # what the layers' specs cost
    print(report.energy, report.latency, report.area, report.tops_per_watt)

`docs/cost.md` has the formulas, the sources and what is not modelled.
"""

from ..network.counts import Counts, LayerCounts
from .count import count, counting
from .estimate import Band, CostReport, LayerCost, Origin, estimate
from .events import Events, events
from .technology import Source, Technology

__all__ = ["Band", "CostReport", "Counts", "Events", "LayerCost", "LayerCounts", "Origin", "Source", "Technology", "count", "counting",
           "estimate", "events"]

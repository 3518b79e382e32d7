"""Remedies: changes of a setting that may win back what it loses. Each makes a setting like any other.

    for remedy in remedies_for(setting):
        print(remedy, remedy.of(setting))
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from models.quant import Calibration, CrossbarSpec
from models.quant.measuring.setting import Setting

from ..program import flags
from .eval_settings import with_what_counts

OF_CALIBRATION = {field.name for field in fields(Calibration)}


@dataclass(frozen=True, eq=False)
class Remedy:
    """A change of a setting. Attributes: name; changes, `{field of the hardware or of its calibration: value}`, the first one of which says
    what kind of remedy it is."""

    name: str
    changes: Mapping[str, Any]

    def __str__(self) -> str:
        return self.name

    def __add__(self, other: "Remedy") -> "Remedy":
        """Both together, the other one's changes behind."""
        return Remedy(f"{self.name}, {other.name}", {**self.changes, **other.changes})

    @property
    def kind(self) -> str:
        """The field that two remedies of one kind share, so that they are not taken together."""
        return next(iter(self.changes))

    def of(self, setting: Setting) -> Setting:
        """The setting with this change. Raises: ValueError that says why there is none: it has the change, or cannot have it."""
        of_ranges, of_spec = ({name: value for name, value in self.changes.items() if (name in OF_CALIBRATION) == whether}
                              for whether in (True, False))
        if setting.spec.adc_range == "ideal" and not {"weights", "rows", "cell_bits"} & {*self.changes}:
            raise ValueError("it has no ADC")
        if of_ranges and setting.spec.adc_range != "calibrated":
            raise ValueError(f"its ranges are {setting.spec.adc_range}, not calibrated")
        if "on" in of_ranges and not setting.chips:
            raise ValueError("its cells are ideal")
        try:
            made = replace(setting, spec=replace(setting.spec, **of_spec), calibration=replace(setting.calibration, **of_ranges))
        except ValueError as error:
            raise ValueError(flags.in_flags(str(error))) from None
        if made == setting:
            raise ValueError("it has that")
        return with_what_counts(made)


def remedies_for(setting: Setting) -> list[Remedy]:
    """All that there are, those that a setting cannot have among them: `Remedy.of` says so. Noise on weights without cells has none."""
    if setting.without_cells:
        return []
    spec = setting.spec
    return [
        Remedy("pairs", {"weights": "pair", "reference": "analog"}), Remedy("correction on the chip", {"correct": "channel"}),
        Remedy("ranges of the chip", {"on": "chip"}),
        *(Remedy(f"{rows} rows", {"rows": rows}) for rows in (spec.rows // 2, spec.rows // 4)),
        *(Remedy(f"{bits:g}-bit ADC", {"adc_bits": bits}) for bits in (spec.adc_bits + 1, spec.adc_bits + 2)),
        Remedy("planned bits", {"adc_plan": "significance"}),
        Remedy("planned bits by ones", {"adc_plan": "ones", "adc_idle": CrossbarSpec.adc_idle}),
        *(Remedy(f"{bits}-bit cells", {"cell_bits": bits}) for bits in dict.fromkeys([max(spec.cell_bits // 2, 1), 1]))]


def all_remedied(setting: Setting) -> list[Setting]:
    """The settings of all remedies that a setting can have, each alone."""
    found = []
    for remedy in remedies_for(setting):
        with contextlib.suppress(ValueError):
            found.append(remedy.of(setting))
    return found

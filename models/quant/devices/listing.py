"""What `--device list` says of the devices that come with the package."""

import numpy as np

from .device import Device
from .presets import presets
from .tables import Samples


def describe() -> list[str]:
    """A line for each preset: name, levels, scatter, times, temperatures, cells measured, source, notes."""
    return [_describe(Device.load(name)) for name in presets()]


def _describe(device: Device) -> str:
    levels = device.level_values
    parts = [", ".join(f"{g:g}" for g in levels) + " uS" if levels else f"{device.g_min:g} to {device.g_max:g} uS", _scatter(device)]
    for temp, times in device.law.times.items():
        where = "" if temp is None else f" at {temp:g} C"
        parts.append(f"{times}{where}" if str(times) else f"no times{where}")
    parts += [f"{key} {share:g}" for key in ("stuck_on", "stuck_off") if (share := getattr(device, key))]
    parts += ["n not known" if device.n is None else f"n = {device.n}", device.source, device.certainty, device.note]
    return f"{device.name}: " + "; ".join(part for part in parts if part)


def _scatter(device: Device) -> str:
    g = np.array(device.level_values or np.linspace(device.g_min, device.g_max, 33))
    sigma = device.sigma(g)
    kind = "measured cells" if isinstance(device.law, Samples) else device.law.shape
    return f"{kind}, sigma {sigma.min():.3g} to {sigma.max():.3g} uS at first" if sigma.any() else "no scatter at first"

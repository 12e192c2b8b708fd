"""Broken machines, each after what somebody met, with the verdict and the line that mends it.

`thread` is where the symptom was described; facts that it leaves open are those of a machine that
is otherwise well.
"""

from __future__ import annotations

from tests.doctor.broken.drivers import DRIVERS
from tests.doctor.broken.machine import Broken
from tests.doctor.broken.settings import SETTINGS
from tests.doctor.broken.software import SOFTWARE

__all__ = ["BROKEN", "Broken"]
BROKEN: tuple[Broken, ...] = (*SOFTWARE, *DRIVERS, *SETTINGS)

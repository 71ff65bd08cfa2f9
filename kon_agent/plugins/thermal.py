"""The `thermal` collector: how warm the machine is, and whether it slows itself down because of it.

Sources, all in sysfs, each used where it exists:

    /sys/class/thermal/thermal_zone*, cooling_device*    Documentation/driver-api/thermal/sysfs-api.rst
    /sys/class/hwmon/hwmon*                              Documentation/hwmon/sysfs-interface.rst
    /sys/devices/system/cpu/cpu*/{thermal_throttle,cpufreq}   x86 throttling, and any CPU's clock
    /sys/devices/platform/soc/soc:firmware/get_throttled      the Raspberry Pi's firmware

Invariants:
* A sensor that gives no figure now (EIO, EAGAIN, ENODATA, a device asleep) is left out of this cycle and
  stops nobody.
* Nothing is remembered between cycles: a sensor that appears, goes or is renumbered is reported as it is.
* No more than MAX_DEVICES of a kind and MAX_SENSORS of a chip are asked.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice

from kon_agent.config.schema import ThermalConfig
from kon_agent.errors import NoData
from kon_agent.metric import Metric, MetricType
from kon_agent.plugins import procfs
from kon_agent.plugins.context import Context

MAX_DEVICES = 1024  # zones, chips or processors; a machine of 512 cores has as many as 512 cooling devices
MAX_SENSORS = 256  # of one chip; a large server's has some dozens
MAX_TRIPS = 32  # trip points of a zone; the kernel's old limit (THERMAL_MAX_TRIPS was 12)

THERMAL = "/sys/class/thermal"
HWMON = "/sys/class/hwmon"
CPUS = "/sys/devices/system/cpu"
FIRMWARE = "/sys/devices/platform/soc/soc:firmware/get_throttled"

FIRMWARE_REASONS = ("under_voltage", "frequency_capped", "throttled", "soft_temperature_limit")
"""Bits 0 to 3 of the Raspberry Pi's word: now; the same from OCCURRED_SHIFT on: at some time since boot."""
OCCURRED_SHIFT = 16

ABSOLUTE_ZERO_MILLI = -273_150  # what drivers give for "no such limit" is colder, or 0

_NUMBER = re.compile(r"\d+")


class Thermal:
    """Report temperatures, fans, clocks, and what is throttled."""

    def __init__(self, config: ThermalConfig, context: Context) -> None:
        self._context = context

    def collect(self) -> Iterable[Metric]:
        """Return the metrics of this moment.

        Raises:
            NoData: the machine has no sensor that says anything: a virtual one, usually.
        """
        metrics = [*self._zones(), *self._cooling(), *self._chips(), *self._cpus(), *self._firmware()]
        if not metrics:
            raise NoData(f"no sensor below {THERMAL}, {HWMON} and {CPUS} gives a figure")
        return metrics

    def _zones(self) -> Iterator[Metric]:
        for zone in self._devices(THERMAL, "thermal_zone"):
            folder = f"{THERMAL}/{zone}"
            labels = {"zone": zone, "type": self._text(f"{folder}/type")}
            yield from self._figure("thermal_zone_celsius", f"{folder}/temp", labels, 1000)
            for trip in range(MAX_TRIPS):
                kind = self._text(f"{folder}/trip_point_{trip}_type")
                if not kind:
                    break
                limit = self._number(f"{folder}/trip_point_{trip}_temp") if kind == "critical" else None
                if limit is not None and limit > ABSOLUTE_ZERO_MILLI and limit != 0:
                    yield Metric("thermal_zone_critical_celsius", limit / 1000, labels, MetricType.OTHER)
                    break

    def _cooling(self) -> Iterator[Metric]:
        for device in self._devices(THERMAL, "cooling_device"):
            folder = f"{THERMAL}/{device}"
            labels = {"device": device, "type": self._text(f"{folder}/type")}
            yield from self._figure("cooling_device_state", f"{folder}/cur_state", labels)
            yield from self._figure("cooling_device_max_state", f"{folder}/max_state", labels)

    def _chips(self) -> Iterator[Metric]:
        for hwmon in self._devices(HWMON, "hwmon"):
            folder = f"{HWMON}/{hwmon}"
            # Two chips of a kind have the same name: the device they sit on tells them apart.
            path = self._context.path(f"{folder}/device")
            device = os.path.basename(os.path.realpath(path)) if os.path.exists(path) else hwmon
            chip = {"chip": self._text(f"{folder}/name") or hwmon, "device": device}
            yield from self._sensors(folder, "temp", "hwmon_celsius", chip, 1000)
            yield from self._sensors(folder, "fan", "hwmon_fan_rpm", chip)

    def _sensors(
        self, folder: str, kind: str, name: str, chip: Mapping[str, str], per_unit: int = 1
    ) -> Iterator[Metric]:
        """Yield a chip's sensors of a kind; a label that an earlier one has is told apart by the sensor's name."""
        seen: set[str] = set()
        entries = self._entries(folder, re.compile(rf"{kind}\d+_input"))
        for entry in islice(entries, MAX_SENSORS):
            sensor = entry.removesuffix("_input")
            label = self._text(f"{folder}/{sensor}_label") or sensor
            if label in seen:
                label = f"{label} {sensor}"
            seen.add(label)
            yield from self._figure(name, f"{folder}/{entry}", {**chip, "sensor": label}, per_unit)

    def _cpus(self) -> Iterator[Metric]:
        seen: set[str] = set()
        for cpu in self._devices(CPUS, "cpu"):
            folder = f"{CPUS}/{cpu}"
            number = cpu.removeprefix("cpu")
            khz = self._number(f"{folder}/cpufreq/scaling_cur_freq")
            if khz is not None:
                yield Metric("cpu_frequency_hertz", khz * 1000, {"cpu": number}, MetricType.OTHER)
            throttle = f"{folder}/thermal_throttle"
            count = self._number(f"{throttle}/core_throttle_count")
            if count is not None:
                yield Metric("cpu_core_throttles_total", count, {"cpu": number}, MetricType.OTHER)
            package = self._text(f"{folder}/topology/physical_package_id")
            # All cores of a package show the package's count: it is reported once.
            if package and package not in seen:
                seen.add(package)
                path = f"{throttle}/package_throttle_count"
                yield from self._figure("cpu_package_throttles_total", path, {"package": package})

    def _firmware(self) -> Iterator[Metric]:
        word = self._number(FIRMWARE, base=16)
        if word is None:
            return
        for bit, reason in enumerate(FIRMWARE_REASONS):
            labels = {"reason": reason}
            yield Metric("raspberrypi_throttled", word >> bit & 1, labels, MetricType.OTHER)
            occurred = word >> bit + OCCURRED_SHIFT & 1
            yield Metric("raspberrypi_throttled_since_boot", occurred, labels, MetricType.OTHER)

    def _devices(self, folder: str, kind: str) -> Iterator[str]:
        return islice(self._entries(folder, re.compile(rf"{kind}\d+")), MAX_DEVICES)

    def _entries(self, folder: str, pattern: re.Pattern[str]) -> Iterator[str]:
        """Yield the names in a folder that match as a whole, in the order of their numbers."""
        try:
            names = os.listdir(self._context.path(folder))
        except OSError:  # not there: no such subsystem; or gone since
            return
        yield from sorted(filter(pattern.fullmatch, names), key=_numbers)

    def _figure(self, name: str, path: str, labels: Mapping[str, str], per_unit: int = 1) -> Iterator[Metric]:
        """Yield a file's number as a metric; nothing where it gives none."""
        number = self._number(path)
        if number is not None:
            yield Metric(name, number / per_unit, labels, MetricType.OTHER)

    def _number(self, path: str, base: int = 10) -> int | None:
        try:
            return int(self._text(path), base)
        except ValueError:  # no text, or "<unsupported>" (cpufreq)
            return None

    def _text(self, path: str) -> str:
        """Return a file's text without the newline, empty where there is none now."""
        try:
            return procfs.read(self._context, path).decode("utf-8", "replace").strip()
        except (NoData, OSError):
            return ""


def _numbers(name: str) -> list[int]:
    return [int(number) for number in _NUMBER.findall(name)]

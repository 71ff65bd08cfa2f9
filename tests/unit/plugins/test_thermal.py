"""The thermal collector's promises."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from kon_agent.config.schema import ThermalConfig
from kon_agent.errors import NoData
from kon_agent.plugins import procfs, thermal
from kon_agent.plugins.context import Context
from kon_agent.plugins.thermal import Thermal

Values = dict[tuple[str, ...], float]


def put(folder: Path, **files: str) -> None:
    """Have these files in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text + "\n")


def values(root: Path) -> Values:
    """Collect from a tree; return the values by name and label values."""
    collected = Thermal(ThermalConfig(), Context(root=str(root))).collect()
    return {(metric.name, *metric.labels.values()): metric.value for metric in collected}


def test_a_zone_has_a_temperature_and_a_critical_one(tmp_path: Path) -> None:
    """Millidegrees become degrees; of the trip points the critical one is reported."""
    put(
        tmp_path / "sys/class/thermal/thermal_zone0",
        type="x86_pkg_temp",
        temp="47500",
        trip_point_0_type="passive",
        trip_point_0_temp="80000",
        trip_point_1_type="critical",
        trip_point_1_temp="105000",
    )
    assert {
        ("thermal_zone_celsius", "thermal_zone0", "x86_pkg_temp"): 47.5,
        ("thermal_zone_critical_celsius", "thermal_zone0", "x86_pkg_temp"): 105.0,
    } == values(tmp_path)


@pytest.mark.parametrize("limit", ["0", "-274000"])
def test_a_limit_that_is_none_is_left_out(tmp_path: Path, limit: str) -> None:
    """Zero, and what is colder than cold can be, is a driver's way of saying that there is no limit."""
    zone = tmp_path / "sys/class/thermal/thermal_zone0"
    put(zone, type="acpitz", temp="-5000", trip_point_0_type="critical", trip_point_0_temp=limit)
    assert {("thermal_zone_celsius", "thermal_zone0", "acpitz"): -5.0} == values(tmp_path)


def test_chips_report_temperatures_and_fans(tmp_path: Path) -> None:
    """A sensor is called by its label, else by its name; a chip by its name and the device it sits on."""
    chip = tmp_path / "sys/class/hwmon/hwmon3"
    put(chip, name="coretemp", temp1_input="51000", temp1_label="Package id 0", temp2_input="-1000", fan1_input="1200")
    device = tmp_path / "sys/devices/platform/coretemp.0"
    device.mkdir(parents=True)
    (chip / "device").symlink_to(device)
    assert {
        ("hwmon_celsius", "coretemp", "coretemp.0", "Package id 0"): 51.0,
        ("hwmon_celsius", "coretemp", "coretemp.0", "temp2"): -1.0,
        ("hwmon_fan_rpm", "coretemp", "coretemp.0", "fan1"): 1200.0,
    } == values(tmp_path)


def test_a_chip_without_name_and_device_is_called_by_its_number(tmp_path: Path) -> None:
    """Nothing but a sensor is needed for a figure."""
    put(tmp_path / "sys/class/hwmon/hwmon1", temp1_input="20000")
    assert {("hwmon_celsius", "hwmon1", "hwmon1", "temp1"): 20.0} == values(tmp_path)


def test_equal_labels_of_a_chip_are_told_apart(tmp_path: Path) -> None:
    """Two sensors of one label are two series."""
    chip = tmp_path / "sys/class/hwmon/hwmon0"
    put(chip, name="acpi", temp1_input="1000", temp1_label="T", temp2_input="2000", temp2_label="T")
    assert {"T", "T temp2"} == {key[-1] for key in values(tmp_path)}


def test_cores_and_packages_report_their_throttling(tmp_path: Path) -> None:
    """Every core has its own count and clock; a package's count, which all its cores show, is reported once."""
    for cpu, package, count in ((0, 0, "5"), (1, 0, "6"), (10, 1, "0")):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{cpu}"
        put(folder / "thermal_throttle", core_throttle_count=count, package_throttle_count=f"{package + 8}")
        put(folder / "topology", physical_package_id=str(package))
        put(folder / "cpufreq", scaling_cur_freq="1800000")
    put(tmp_path / "sys/devices/system/cpu/cpufreq")
    assert {
        ("cpu_core_throttles_total", "0"): 5.0,
        ("cpu_core_throttles_total", "1"): 6.0,
        ("cpu_core_throttles_total", "10"): 0.0,
        ("cpu_package_throttles_total", "0"): 8.0,
        ("cpu_package_throttles_total", "1"): 9.0,
        **{("cpu_frequency_hertz", cpu): 1.8e9 for cpu in ("0", "1", "10")},
    } == values(tmp_path)


def test_cooling_devices_report_how_hard_they_cool(tmp_path: Path) -> None:
    """The state is a step between 0 and the device's own most."""
    put(tmp_path / "sys/class/thermal/cooling_device2", type="Processor", cur_state="3", max_state="10")
    assert {
        ("cooling_device_state", "cooling_device2", "Processor"): 3.0,
        ("cooling_device_max_state", "cooling_device2", "Processor"): 10.0,
    } == values(tmp_path)


@pytest.mark.parametrize("text", ["50005", "0x50005"])
def test_the_raspberry_pi_says_why_it_is_slow(tmp_path: Path, text: str) -> None:
    """Low bits are now, high bits since boot: under-voltage and throttled."""
    put(tmp_path / "sys/devices/platform/soc/soc:firmware", get_throttled=text)
    collected = values(tmp_path)
    slow = {"under_voltage": 1.0, "frequency_capped": 0.0, "throttled": 1.0, "soft_temperature_limit": 0.0}
    assert {
        **{("raspberrypi_throttled", reason): value for reason, value in slow.items()},
        **{("raspberrypi_throttled_since_boot", reason): value for reason, value in slow.items()},
    } == collected


@pytest.mark.parametrize("code", [errno.EIO, errno.EAGAIN, errno.ENODATA])
def test_a_sensor_that_fails_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """One that answers with an error is left out of this cycle; the others stay."""
    put(tmp_path / "sys/class/hwmon/hwmon0", name="bad", temp1_input="1000", temp2_input="2000")
    read = procfs.read

    def fail(context: Context, path: str) -> bytes:
        if path.endswith("temp1_input"):
            raise OSError(code, "no figure")
        return read(context, path)

    monkeypatch.setattr(procfs, "read", fail)
    assert {("hwmon_celsius", "bad", "hwmon0", "temp2"): 2.0} == values(tmp_path)


def test_nonsense_is_no_figure(tmp_path: Path) -> None:
    """A clock that is `<unsupported>` and an empty file are left out."""
    put(tmp_path / "sys/devices/system/cpu/cpu0/cpufreq", scaling_cur_freq="<unsupported>")
    put(tmp_path / "sys/class/thermal/thermal_zone0", type="soc", temp="")
    put(tmp_path / "sys/class/thermal/thermal_zone1", type="gpu", temp="40000")
    assert {("thermal_zone_celsius", "thermal_zone1", "gpu"): 40.0} == values(tmp_path)


def test_no_more_sensors_than_the_bound_are_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of a chip's sensors are reported, in the order of their numbers."""
    monkeypatch.setattr(thermal, "MAX_SENSORS", 2)
    put(tmp_path / "sys/class/hwmon/hwmon0", **{f"temp{number}_input": "1000" for number in (1, 2, 10)})
    assert {"temp1", "temp2"} == {key[-1] for key in values(tmp_path)}


def test_a_machine_without_sensors_is_no_data(tmp_path: Path) -> None:
    """A virtual machine has none of all this: no failure."""
    with pytest.raises(NoData, match="no sensor"):
        values(tmp_path)

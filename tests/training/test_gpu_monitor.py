"""Readings of a card through an NVML that exists only here."""

import logging
import sys
from types import SimpleNamespace

import pytest
import torch

from megatron_moe.training.gpu_monitor import GpuMonitor

CUDA = torch.device("cuda", 0)


class FakeNVML:
    """Answers like pynvml for one card; raises its own error for what the card does not offer."""

    NVML_TEMPERATURE_GPU = 0
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED = 1
    NVML_VOLATILE_ECC = 0

    class NVMLError(Exception):
        pass

    def __init__(self, *, present: bool = True) -> None:
        self.present = present

    def nvmlInit(self) -> None:
        if not self.present:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return f"handle of {uuid}"

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        assert handle == "handle of GPU-1234"
        return 512_250  # mW

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        return 61 if sensor == self.NVML_TEMPERATURE_GPU else -1

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> SimpleNamespace:
        return SimpleNamespace(gpu=97, memory=40)

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:
        return SimpleNamespace(used=3 * 2**30, total=4 * 2**30)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:
        return 4

    def nvmlDeviceGetTotalEccErrors(self, handle: str, kind: int, counter: int) -> int:
        raise self.NVMLError("Not Supported")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234"))
    monkeypatch.setitem(sys.modules, "pynvml", FakeNVML())
    return monkeypatch


@pytest.mark.usefixtures("card")
def test_readings_come_with_units_and_what_the_card_lacks_is_left_out() -> None:
    monitor = GpuMonitor.for_device(CUDA)
    assert monitor is not None
    assert monitor.read() == {
        "gpu power (W)": 512.25,
        "gpu temperature (C)": 61.0,
        "gpu utilisation (%)": 97.0,
        "gpu memory (GiB)": 3.0,
        "gpu throttle reasons": 4.0,
    }


def test_a_cpu_has_none_and_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    assert GpuMonitor.for_device(torch.device("cpu")) is None
    assert caplog.records == []


def test_a_missing_package_is_said_once_with_the_way_out(
    card: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    card.setitem(sys.modules, "pynvml", None)
    with caplog.at_level(logging.WARNING):
        assert GpuMonitor.for_device(CUDA) is None
    assert len(caplog.records) == 1
    assert "megatron_moe[gpu]" in caplog.text


def test_a_driver_that_fails_does_not_stop_the_run(card: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    card.setitem(sys.modules, "pynvml", FakeNVML(present=False))
    with caplog.at_level(logging.WARNING):
        assert GpuMonitor.for_device(CUDA) is None
    assert "Driver Not Loaded" in caplog.text

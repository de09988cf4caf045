"""Readings of this rank's GPU through NVML (package nvidia-ml-py): power, heat, memory, errors."""

import logging
import socket
from typing import Any

import torch

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.optional import require
from megatron_moe.training.gpu_health import GpuHealth

logger = logging.getLogger(__name__)


class GpuMonitor:
    """Reads one card; a reading that the card does not offer is left out."""

    def __init__(self, nvml: Any, handle: Any, name: str) -> None:
        self._nvml = nvml
        self._handle = handle
        self._health = GpuHealth(nvml, handle, name)

    @classmethod
    def for_device(cls, device: torch.device) -> "GpuMonitor | None":
        """None on the CPU, and where NVML or its package is absent (said once in the log)."""
        if device.type != "cuda":
            return None
        try:
            nvml = require("pynvml", extra="gpu")
            nvml.nvmlInit()
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            return cls(nvml, nvml.nvmlDeviceGetHandleByUUID(uuid), f"{device} of {socket.gethostname()} ({uuid})")
        except ConfigError as error:
            logger.warning("no GPU readings in the log: %s", error)
        except Exception as error:  # NVML's own errors share no base class with ours, and none may stop a run
            logger.warning("no GPU readings in the log: NVML says %s", error)
        return None

    def read(self) -> dict[str, float]:
        """Power in W, temperature in °C, utilisation in %, memory in GiB, throttle reasons and ECC errors.

        What is new and bad is told in the log as well (gpu_health.py).
        """
        nvml, handle = self._nvml, self._handle
        readings = {
            "gpu power (W)": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
            "gpu temperature (C)": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
            "gpu utilisation (%)": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu,
            "gpu memory (GiB)": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used / 2**30,
            "gpu throttle reasons": lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle),
            "gpu ECC errors": lambda: nvml.nvmlDeviceGetTotalEccErrors(
                handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
            ),
        }
        found = {}
        for name, read in readings.items():
            try:
                found[name] = float(read())
            except Exception:  # not every card has every reading
                continue
        return found | self._health.check()

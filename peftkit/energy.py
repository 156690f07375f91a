"""Energy that was used, where the GPU counts it."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from accelerate.utils import gather_object


def energy_joules() -> float | None:
    """What this process's GPU has used since its driver was loaded, all processes on it together; None where nothing tells it.

    It is told by NVIDIA's library through the package nvidia-ml-py, by GPUs from Volta on.
    """
    if not torch.cuda.is_available() or find_spec("pynvml") is None:
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}")
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000  # from millijoules
    except pynvml.NVMLError:  # a card without the counter
        return None


def energy_used(before: float | None) -> dict[str, float]:
    """The energy of training over the GPUs of all processes, where they tell it."""
    each = [None if before is None else (energy_joules() or 0.0) - before]
    told = [joules for joules in gather_object(each) if joules is not None]
    return {"energy_joules": sum(told)} if told else {}

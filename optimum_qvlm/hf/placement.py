"""Devices: where to calibrate, and where the result goes."""

import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map

from optimum_qvlm.compat.accelerate import balanced_memory
from optimum_qvlm.compat.transformers import unmoved_arguments, unsplit_classes
from optimum_qvlm.errors import ConfigError

DeviceMap = dict[str, Any]


@dataclass(slots=True)
class Placement:
    """What `from_pretrained` was asked for while the model is calibrated on the CPU.

    transformers dispatches before the quantizer's last hook, so the request is kept here, everything is loaded
    on the CPU, and `apply` carries the request out on the quantized model.
    """

    requested: DeviceMap | str | None
    max_memory: dict[Any, Any] = field(default_factory=dict)
    final: DeviceMap | None = None

    def __post_init__(self) -> None:
        if isinstance(self.requested, dict):
            _refuse_disk(self.requested)
            self.final = self.requested

    def require_devices(self) -> None:
        """Refuse a map with a device that is not there.

        Raises:
            ConfigError: names the device.
        """
        for value in self.requested.values() if isinstance(self.requested, dict) else ():
            require_device(_device(value))

    def on_cpu(self) -> DeviceMap | str | None:
        """The device map to load with. Automatic ones stay, so that transformers tells `max_memory`."""
        return {"": "cpu"} if isinstance(self.requested, dict) else self.requested

    def note_memory(self, max_memory: dict[Any, Any], skeleton: Any) -> dict[Any, Any]:
        """Place the quantized `skeleton` (on the meta device) within the limits, now, before hours are spent.

        Returns limits that put the full-precision model on the CPU.

        Raises:
            ConfigError: it does not fit the memory that was given without the disk.
        """
        self.max_memory = dict(max_memory)
        unsplit = unsplit_classes(skeleton)
        limits = self.max_memory
        if self.requested != "sequential":
            low_zero = self.requested == "balanced_low_0"
            limits = balanced_memory(skeleton, limits, unsplit, low_zero=low_zero)
        self.final = dict(infer_auto_device_map(skeleton, limits, no_split_module_classes=unsplit))
        _refuse_disk(self.final)
        return {"cpu": sys.maxsize}

    def compute_device(self) -> torch.device:
        """Where blocks are searched: the device named most often that is no CPU, else the CPU."""
        if isinstance(self.requested, dict):
            devices = [_device(value) for value in self.requested.values()]
        else:
            devices = [_device(key) for key in self.max_memory if key not in ("cpu", "disk")][:1]
        fast = [device for device in devices if device.type != "cpu"]
        return max(fast, key=fast.count) if fast else torch.device("cpu")

    def apply(self, model: Any) -> None:
        """Dispatch the quantized model."""
        device_map = self.final
        if device_map is None:
            return
        devices = {str(_device(value)) for value in device_map.values()}
        if len(devices) == 1:
            torch.nn.Module.to(model, torch.device(devices.pop()))
        else:
            dispatch_model(model, device_map, skip_keys=unmoved_arguments(model))
        model.hf_device_map = device_map


def require_device(device: torch.device) -> None:
    """Refuse a device that torch cannot use here, before hours are spent.

    Raises:
        ConfigError: names the device.
    """
    try:
        torch.empty(0, dtype=torch.uint8, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter from a torch without the device's support
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"device {device} cannot be used here ({reason}); choose another one, as cpu") from error


def _refuse_disk(device_map: DeviceMap) -> None:
    to_disk = [name or "the model" for name, device in device_map.items() if device == "disk"]
    if to_disk:
        raise ConfigError(
            f"{to_disk[0]} would be offloaded to disk, which calibration cannot do; give more memory (max_memory) or "
            'a device, quantize with device_map="cpu", save, and offload when loading the saved model'
        )


def _device(value: Any) -> torch.device:
    return torch.device("cuda", value) if isinstance(value, int) else torch.device(value)

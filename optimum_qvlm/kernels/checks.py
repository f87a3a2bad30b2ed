"""Guards of the operations: shapes, dtypes, devices."""

from torch import Tensor

from optimum_qvlm.errors import SpecError
from optimum_qvlm.kernels.weights import Rounding


def require_activations(x: Tensor, channels: int | None = None) -> None:
    """Activations are floating [..., channels].

    Raises:
        SpecError: they are not, or have another number of channels.
    """
    if not x.is_floating_point() or x.dim() == 0:
        raise SpecError(f"activations must be floating [..., channels], got {x.dtype} with {x.dim()} dimensions")
    if channels is not None and x.shape[-1] != channels:
        raise SpecError(f"the activation has {x.shape[-1]} channels, the weight has in_features={channels}")


def require_rounding(x: Tensor, rounding: Rounding) -> None:
    """A grid and a rotation that fit the channels of `x`.

    Raises:
        SpecError: they do not.
    """
    if rounding.bits is not None and not 2 <= rounding.bits <= 8:
        raise SpecError(f"activation bits must lie in 2..8, or be None to leave them, got {rounding.bits}")
    if not 0.0 < rounding.clip <= 1.0:
        raise SpecError(f"clip must lie above 0 and at most at 1, got {rounding.clip}")
    for name, size in (("group", rounding.group), ("rotation", rounding.rotation)):
        if size is not None and (size < 1 or x.shape[-1] % size != 0):
            raise SpecError(f"{name}={size} does not divide the {x.shape[-1]} channels of the activation")


def require_same_device(x: Tensor, **others: Tensor | None) -> None:
    """Raise where a tensor lies on another device than `x`.

    Raises:
        SpecError: names the tensor and both devices.
    """
    device = x.device
    for name, tensor in others.items():
        if tensor is not None and tensor.device != device:
            raise SpecError(f"{name} is on {tensor.device}, the activation on {device}; move the module with .to()")

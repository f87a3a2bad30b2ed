"""Guards of the operations: shapes, dtypes, devices."""

from torch import Tensor

from optimum_qvlm.errors import SpecError

FULL_BITS = 16


def require_activations(x: Tensor, channels: int | None = None) -> None:
    """Activations are floating [..., channels].

    Raises:
        SpecError: they are not, or have another number of channels.
    """
    if not x.is_floating_point() or x.dim() == 0:
        raise SpecError(f"activations must be floating [..., channels], got {x.dtype} with {x.dim()} dimensions")
    if channels is not None and x.shape[-1] != channels:
        raise SpecError(f"the activation has {x.shape[-1]} channels, the weight has in_features={channels}")


def require_rounding(x: Tensor, bits: int, group: int | None, clip: float, rotation: int | None) -> None:
    """A grid that fits the channels of `x`; `bits` may be 16, which rounds nothing.

    Raises:
        SpecError: it does not.
    """
    if bits != FULL_BITS and not 2 <= bits <= 8:
        raise SpecError(f"activation bits must lie in 2..8, or be {FULL_BITS} to leave them, got {bits}")
    if not 0.0 < clip <= 1.0:
        raise SpecError(f"clip must lie above 0 and at most at 1, got {clip}")
    for name, size in (("group", group), ("rotation", rotation)):
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

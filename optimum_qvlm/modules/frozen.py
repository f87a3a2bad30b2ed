"""Parameters that cannot be trained, and that say so by the name of their module."""

from typing import Any
from weakref import ref

from torch import nn

from optimum_qvlm.errors import ReadOnlyError


def refuse_training(parameter: nn.Parameter, module: Any) -> None:
    """Have `parameter.requires_grad_()` raise an error of ours with what `module.owner()` says then.

    Whoever makes a module trainable, or a copy of one, asks each parameter; PyTorch would say that integers have no
    gradients, and not whose they are. The parameter keeps its class, which operators and compiled code look at.
    """
    parameter.requires_grad_ = _Refusal(parameter, module)  # type: ignore[assignment, method-assign]


class _Refusal:
    """Stands in for the method of one parameter. Copies and pickles of a parameter are without."""

    def __init__(self, parameter: nn.Parameter | None = None, module: Any = None) -> None:
        self._parameter = None if parameter is None else ref(parameter)
        self._module = None if module is None else ref(module)

    def __call__(self, requires_grad: bool = True) -> nn.Parameter | None:
        module = None if self._module is None else self._module()
        if requires_grad:
            raise ReadOnlyError(
                f"{'a quantized linear' if module is None else module.owner()} cannot be trained: its weight is packed "
                "integers. Let an adapter target it (target_modules) in place of training a copy (modules_to_save), "
                "keep it in full precision when quantizing (modules_to_not_convert), or call model.dequantize() first"
            )
        return None if self._parameter is None else self._parameter()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Refusal, ()

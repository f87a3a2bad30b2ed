"""Every error that this package raises on purpose.

All derive from `QVLMError`, a `ValueError`, so that one `except` catches them. A message names the module,
the value, the limit and the way out.
"""


class QVLMError(ValueError):
    """Base of all errors raised by optimum-qvlm."""


class SpecError(QVLMError):
    """A bit width, group size or scheme that cannot be used."""


class ConfigError(QVLMError):
    """A field of `QVLMConfig`, or of the `quantization_config` of a checkpoint, that is not valid."""


class DataError(QVLMError):
    """Calibration data that is missing, unreadable or does not fit the model."""


class UnsupportedModelError(QVLMError):
    """A model whose structure is not known well enough to quantize it."""


class CalibrationError(QVLMError):
    """A value met while calibrating that makes the result meaningless (NaN weights or activations)."""


class JournalError(QVLMError):
    """A journal of an interrupted calibration that is of another one, in use, or cannot be written."""


class CheckpointError(QVLMError):
    """A checkpoint whose files do not hold what its configuration says."""


class HubError(QVLMError):
    """The Hub could not be reached, or did not allow what was asked of it."""


class DependencyError(QVLMError):
    """A library whose installed release lacks something that this package uses of it."""


class ReadOnlyError(QVLMError):
    """A write to the weight of a quantized linear, which is computed from packed integers."""

"""Q-VLM quantization for transformers. Importing this package registers the method `qvlm`."""

from typing import Any

from optimum_qvlm.errors import QVLMError
from optimum_qvlm.hf.config import QVLMConfig
from optimum_qvlm.hf.register import register
from optimum_qvlm.models.adapter import Adapter, Join, Part
from optimum_qvlm.models.registry import register_adapter
from optimum_qvlm.version import __version__

__all__ = ["Adapter", "Join", "Part", "QVLMConfig", "QVLMError", "__version__", "dry_run", "register_adapter"]

register()


def __getattr__(name: str) -> Any:
    """`dry_run` is imported when it is first used: it needs what calibration needs, which loading a model does not."""
    if name == "dry_run":
        from optimum_qvlm.hf.dry_run import dry_run

        return dry_run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

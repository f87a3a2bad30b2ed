"""Q-VLM quantization for transformers. Importing this package registers the method `qvlm`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from optimum_qvlm.errors import QVLMError
from optimum_qvlm.hf.config import QVLMConfig
from optimum_qvlm.hf.register import register
from optimum_qvlm.version import __version__

if TYPE_CHECKING:
    from optimum_qvlm.export.compressed_tensors import export_compressed_tensors
    from optimum_qvlm.hf.dry_run import dry_run
    from optimum_qvlm.hf.fusion import fuse_linears, unfuse_linears
    from optimum_qvlm.models.adapter import Adapter, Join, Part
    from optimum_qvlm.models.registry import register_adapter
    from optimum_qvlm.settings import EncoderOptions, SearchOptions

__all__ = [
    "Adapter",
    "EncoderOptions",
    "Join",
    "Part",
    "QVLMConfig",
    "QVLMError",
    "SearchOptions",
    "__version__",
    "dry_run",
    "export_compressed_tensors",
    "fuse_linears",
    "register_adapter",
    "unfuse_linears",
]

_LATE = {
    "Adapter": "optimum_qvlm.models.adapter",
    "EncoderOptions": "optimum_qvlm.settings",
    "Join": "optimum_qvlm.models.adapter",
    "Part": "optimum_qvlm.models.adapter",
    "SearchOptions": "optimum_qvlm.settings",
    "dry_run": "optimum_qvlm.hf.dry_run",
    "export_compressed_tensors": "optimum_qvlm.export.compressed_tensors",
    "fuse_linears": "optimum_qvlm.hf.fusion",
    "register_adapter": "optimum_qvlm.models.registry",
    "unfuse_linears": "optimum_qvlm.hf.fusion",
}
"""Names that are imported when they are first used: loading a quantized model needs none of them."""

register()


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return getattr(import_module(_LATE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

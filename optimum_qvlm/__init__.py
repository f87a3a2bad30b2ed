"""Q-VLM quantization for transformers. Importing this package registers the method `qvlm`."""

from optimum_qvlm.errors import QVLMError
from optimum_qvlm.hf.config import QVLMConfig
from optimum_qvlm.hf.register import register
from optimum_qvlm.version import __version__

__all__ = ["QVLMConfig", "QVLMError", "__version__"]

register()

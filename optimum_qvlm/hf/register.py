"""Make transformers know the method. Importing the package does this once."""

from optimum_qvlm.compat.transformers import register_method, take_loading_attributes
from optimum_qvlm.hf.config import QUANT_METHOD, QVLMConfig
from optimum_qvlm.hf.quantizer import QVLMQuantizer


def register() -> None:
    """Enter configuration and quantizer into transformers' tables; a second call changes nothing."""
    register_method(QUANT_METHOD, QVLMConfig, QVLMQuantizer)
    take_loading_attributes(QVLMConfig)

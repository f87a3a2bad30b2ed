"""Make transformers know the method. Importing the package does this once."""

from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from optimum_qvlm.compat.transformers import take_loading_attributes
from optimum_qvlm.hf.config import QUANT_METHOD, QVLMConfig
from optimum_qvlm.hf.quantizer import QVLMQuantizer


def register() -> None:
    """Enter configuration and quantizer into transformers' tables; a second call changes nothing."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = QVLMConfig
    AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = QVLMQuantizer
    take_loading_attributes(QVLMConfig)

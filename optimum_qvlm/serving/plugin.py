"""What vLLM calls in each of its processes, by the entry point `vllm.general_plugins`."""

from optimum_qvlm.hf.config import QUANT_METHOD


def register() -> None:
    """Make the method `qvlm` known to vLLM. A second call changes nothing."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

    from optimum_qvlm.serving.config import ServedConfig

    if QUANT_METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(QUANT_METHOD)(ServedConfig)

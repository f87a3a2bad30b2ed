"""Registration with transformers."""

import importlib

import pytest
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    AutoHfQuantizer,
    AutoQuantizationConfig,
)

import optimum_qvlm
from optimum_qvlm import QVLMConfig
from optimum_qvlm.hf.quantizer import QVLMQuantizer
from optimum_qvlm.hf.register import register


def entries():
    return AUTO_QUANTIZATION_CONFIG_MAPPING["qvlm"], AUTO_QUANTIZER_MAPPING["qvlm"]


@pytest.mark.parametrize("times", [0, 1, 2])
def test_registration_can_be_repeated(times):
    """transformers' own decorator refuses a second registration."""
    sizes = len(AUTO_QUANTIZATION_CONFIG_MAPPING), len(AUTO_QUANTIZER_MAPPING)

    for _ in range(times):
        register()

    assert entries() == (QVLMConfig, QVLMQuantizer)
    assert (len(AUTO_QUANTIZATION_CONFIG_MAPPING), len(AUTO_QUANTIZER_MAPPING)) == sizes


def test_the_package_can_be_imported_again():
    """Notebooks do, with autoreload."""
    importlib.reload(optimum_qvlm)

    assert entries() == (QVLMConfig, QVLMQuantizer)


def test_transformers_makes_our_configuration_from_a_dict():
    config = AutoQuantizationConfig.from_dict({"quant_method": "qvlm", "scheme": "w4a4"})

    assert config == QVLMConfig("w4a4")


def test_transformers_makes_our_quantizer_from_a_configuration():
    quantizer = AutoHfQuantizer.from_config(QVLMConfig("w4a4"), pre_quantized=False)

    assert isinstance(quantizer, QVLMQuantizer)
    assert quantizer.is_serializable()
    assert quantizer.is_trainable
    assert AutoHfQuantizer.supports_quant_method({"quant_method": "qvlm"})


def test_the_quantizer_works_on_a_copy_of_the_configuration():
    """The user's can be used again then."""
    config = QVLMConfig("w4a4", dataset=[object()])

    quantizer = QVLMQuantizer(config, pre_quantized=False)

    assert quantizer.config is not config
    assert quantizer.config == config
    assert quantizer.config.dataset is config.dataset

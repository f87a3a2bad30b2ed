"""The quantization configuration of a saved model, as vLLM asks for it."""

import re
from pathlib import Path
from typing import Any, Self

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.model_loader.utils import get_model_cls
from vllm.model_executor.models.utils import WeightsMapper

from optimum_qvlm.errors import ConfigError, UnsupportedModelError
from optimum_qvlm.hf.config import QUANT_METHOD, QVLMConfig
from optimum_qvlm.hf.format.modules import GUARDS
from optimum_qvlm.hf.format.record import require_sealed
from optimum_qvlm.hf.format.server_names import NESTED, TOWER, has_nested_tower, server_name
from optimum_qvlm.serving.method import ServedLinearMethod

DECODE_TOKENS = "qvlm_decode_tokens"
"""Key of vLLM's `--additional-config` that sets `decode_tokens`. Without it activations are always rounded, so that an
answer does not depend on how many requests are decoded at once."""


class ServedConfig(QuantizationConfig):
    """The record of a calibration under the names of vLLM's modules.

    Attributes:
        config: what the checkpoint says.
        entries: what each quantized linear got, by the name that vLLM gives it, fused ones by their parts.
    """

    def __init__(self, config: QVLMConfig) -> None:
        super().__init__()
        record = require_sealed(config.record)
        self.config, self.model_config = config, record.model_config or {}
        self.entries = {server_name(name, self.model_config): entry for name, entry in record.modules.items()}

    def get_name(self) -> str:
        """The method's."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """All that the operations take."""
        return [torch.float32, torch.float16, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Of CUDA devices, times ten."""
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: it stands in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Read `quantization_config`.

        Raises:
            ConfigError: it is not valid, or of a newer release.
            CheckpointError: it was changed since it was saved.
        """
        read = QVLMConfig.from_dict(config)
        assert isinstance(read, QVLMConfig)
        return cls(read)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Check a local folder as loading it in transformers would, from headers alone.

        Raises:
            CheckpointError: files and record do not fit together.
        """
        from optimum_qvlm.hf.format.inspection import inspect_checkpoint
        from optimum_qvlm.hf.format.model_config import require_same_model

        if Path(model_name).is_dir():
            inspect_checkpoint(model_name)
            require_same_model(self.config.record, hf_config, Path(model_name) / "config.json")

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Call the modules as this model class does."""
        renamed = {}
        for name, entry in self.entries.items():
            tensor = hf_to_vllm_mapper.map_name(f"{name}.weight_packed")
            renamed[name if tensor is None else tensor.removesuffix(".weight_packed")] = entry
        self.entries = renamed

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """Drop the tensor that warns other programs, and name those of towers as vLLM does."""
        guards = {re.compile(f"^{re.escape(guard)}$"): None for guard in GUARDS}
        towers = {TOWER: NESTED} if has_nested_tower(self.model_config) else {}
        return WeightsMapper(orig_to_new_regex=guards | towers)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """How `layer` computes: by our operations where one of its linears is on record.

        Raises:
            UnsupportedModelError: something else than a linear is on record.
        """
        self._let_the_loader_know()
        names = self._parts_of(prefix)
        entries = [self.entries.get(name) for name in names]
        if isinstance(layer, LinearBase):
            if all(entry is None for entry in entries):
                return UnquantizedLinearMethod()
            return ServedLinearMethod(dict(zip(names, entries, strict=True)), _decode_tokens())
        inside = next((name for name in self.entries if name == prefix or name.startswith(f"{prefix}.")), None)
        if inside is not None:
            raise UnsupportedModelError(
                f"{inside} is quantized, and vLLM computes it in a {type(layer).__name__}, for which there is no "
                "quantized form yet; keep it in full precision with modules_to_not_convert"
            )
        return None

    def _parts_of(self, prefix: str) -> list[str]:
        """Names of the linears that are one in vLLM: `prefix` itself where it is on record, as it is on disk."""
        parent, _, leaf = prefix.rpartition(".")
        if prefix in self.entries or leaf not in self.packed_modules_mapping:
            return [prefix]
        return [f"{parent}.{part}" if parent else part for part in self.packed_modules_mapping[leaf]]

    def _let_the_loader_know(self) -> None:
        """vLLM's loader asks the configuration that it finds on the model for `get_checkpoint_weight_mapper`. Some
        classes of models have none."""
        model_class = get_model_cls(get_current_vllm_config().model_config)
        if not isinstance(getattr(model_class, "quant_config", self), property):
            model_class.quant_config = self


def _decode_tokens() -> int:
    """What `--additional-config` asks for.

    Raises:
        ConfigError: no count.
    """
    additional = get_current_vllm_config().additional_config
    tokens = additional.get(DECODE_TOKENS, 0) if isinstance(additional, dict) else 0
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 0:
        raise ConfigError(f"{DECODE_TOKENS} of --additional-config must be a count of tokens from 0, got {tokens!r}")
    return tokens

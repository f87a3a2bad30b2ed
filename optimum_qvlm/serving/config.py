"""The quantization configuration of a saved model, as vLLM asks for it."""

import re
from pathlib import Path
from typing import Any, Self

import torch
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.model_loader.utils import get_model_cls
from vllm.model_executor.models.utils import WeightsMapper

from optimum_qvlm.errors import ConfigError, UnsupportedModelError
from optimum_qvlm.hf.config import QUANT_METHOD, QVLMConfig
from optimum_qvlm.hf.format.modules import GUARDS
from optimum_qvlm.hf.format.record import require_sealed
from optimum_qvlm.hf.format.server_names import NESTED, TOWER, has_nested_tower, server_name
from optimum_qvlm.plan import ModuleRecord
from optimum_qvlm.serving.mapper import CheckpointMapper
from optimum_qvlm.serving.method import ServedLinearMethod

logger = init_logger("vllm.qvlm")  # vLLM shows what is below its own

DECODE_TOKENS = "qvlm_decode_tokens"
"""Key of vLLM's `--additional-config` that sets `decode_tokens`. Without it activations are always rounded, so that an
answer does not depend on how many requests are decoded at once."""


class ServedConfig(QuantizationConfig):
    """The record of a calibration under the names of vLLM's modules.

    Attributes:
        config: what the checkpoint says.
        model_config: what config.json said of the model when it was saved.
        modules: what each quantized linear got, by its name on disk.
        names: the name that vLLM gives each, fused ones by their parts.
        served: those of them that are computed with our operations, known once the model is built.
    """

    def __init__(self, config: QVLMConfig) -> None:
        super().__init__()
        record = require_sealed(config.record)
        self.config, self.model_config = config, record.model_config or {}
        self.modules = record.modules
        self.names = {name: server_name(name, self.model_config) for name in self.modules}
        self.served: set[str] = set()

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
        for stored, name in self.names.items():
            tensor = hf_to_vllm_mapper.map_name(f"{name}.weight_packed")
            self.names[stored] = name if tensor is None else tensor.removesuffix(".weight_packed")

    @property
    def entries(self) -> dict[str, ModuleRecord]:
        """What each quantized linear got, by the name that vLLM gives it."""
        return {name: self.modules[stored] for stored, name in self.names.items()}

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """Drop the tensor that warns other programs, name those of towers as vLLM does, and dequantize what it computes
        by something else than its linears, as some projectors.

        Raises:
            UnsupportedModelError: that is all of it.
        """
        guards = {re.compile(f"^{re.escape(guard)}$"): None for guard in GUARDS}
        towers = {TOWER: NESTED} if has_nested_tower(self.model_config) else {}
        plain = {stored: entry for stored, entry in self.modules.items() if self.names[stored] not in self.served}
        if not self.served:
            raise UnsupportedModelError(
                f"{next(iter(plain))} and the other quantized linears are none of vLLM's for this model; serve what "
                "dequantize() returns, or use transformers"
            )
        if plain:
            logger.warning_once(
                "vLLM has no quantized form of %d of %d linears (%s, ...): what it computes of these, it does in full "
                "precision",
                len(plain),
                len(self.modules),
                next(iter(plain)),
            )
        return CheckpointMapper(orig_to_new_regex=guards | towers, plain=plain)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """How `layer` computes: by our operations where one of its linears is on record.

        Raises:
            UnsupportedModelError: a linear inside of something else is on record.
        """
        self._let_the_loader_know()
        entries = self.entries
        if isinstance(layer, LinearBase):
            parts = {name: entries.get(name) for name in self._parts_of(prefix)}
            self.served.update(name for name, entry in parts.items() if entry is not None)
            if all(entry is None for entry in parts.values()):
                return UnquantizedLinearMethod()
            return ServedLinearMethod(parts, _decode_tokens())
        inside = next((name for name in entries if name.startswith(f"{prefix}.")), None)
        if inside is not None:
            raise UnsupportedModelError(
                f"{inside} is quantized, and vLLM computes it in a {type(layer).__name__}, for which there is no "
                "quantized form yet; keep it in full precision with modules_to_not_convert"
            )
        return None

    def _parts_of(self, prefix: str) -> list[str]:
        """Names of the linears that are one in vLLM: `prefix` itself where it is on record, as it is on disk."""
        parent, _, leaf = prefix.rpartition(".")
        if prefix in self.names.values() or leaf not in self.packed_modules_mapping:
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

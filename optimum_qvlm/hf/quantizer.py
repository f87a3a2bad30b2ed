"""The quantizer that transformers calls from `from_pretrained`."""

import copy
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from optimum_qvlm.compat.transformers import QuantizerBase, has_adapters, kept_in_float32
from optimum_qvlm.errors import CheckpointError, ConfigError
from optimum_qvlm.hf.config import QVLMConfig
from optimum_qvlm.hf.format.record import CalibrationRecord, config_identity

logger = logging.get_logger("transformers.optimum_qvlm")


class QVLMQuantizer(QuantizerBase):
    """Calibrates a full-precision checkpoint, or loads one that was saved quantized.

    Attributes:
        quantization_config: a copy of the user's, with the record of what was done.
        source: where the checkpoint came from, for the files beside the weights.
        processor_files: name -> content of a processor that the user passed and the source lacks.
        report: content of `qvlm_report.json`, None where the source's own is copied.
        dry_run: what a dry run showed, None after a real one.
        journal: folder of what the calibration has kept, until the model is saved as a whole; None where there is none.
    """

    requires_calibration = False

    def __init__(self, quantization_config: QVLMConfig, **kwargs: Any) -> None:
        super().__init__(copy.deepcopy(quantization_config), **kwargs)
        if self.pre_quantized:
            self.config.take_requests()
        elif self.config.dequantize:
            raise ConfigError(
                "dequantize=True loads a quantized checkpoint as a plain model, and this one is not quantized; leave "
                "it out"
            )
        self.source: Any = None
        self.processor_files: dict[str, bytes] = {}
        self.report: dict[str, Any] | None = None
        self.dry_run: Any = None
        self.journal: Path | None = None
        self._placement: Any = None
        self._plan: Any = None
        self._model: Any = None
        self._reference: Any = None
        self._tokenizer: Any = None
        self._source_bytes: int | None = None
        self._dtypes: dict[str, torch.dtype] = {}

    @property
    def config(self) -> QVLMConfig:
        """The configuration with its own type."""
        assert isinstance(self.quantization_config, QVLMConfig)
        return self.quantization_config

    def is_serializable(self) -> bool:
        """Quantized models can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on a quantized model can be trained; transformers refuses the bare model itself."""
        return True

    @property
    def is_compileable(self) -> bool:
        """`generate` compiles the decoding step of models with a static cache."""
        return True

    def update_device_map(self, device_map: dict[str, Any] | None) -> dict[str, Any] | None:
        """Keep the request for after the calibration, and load on the CPU until then."""
        if self.pre_quantized:
            return device_map
        from optimum_qvlm.hf.placement import Placement

        self._placement = Placement(device_map)
        self._placement.require_devices()
        return self._placement.on_cpu()  # type: ignore[no-any-return]

    def before_building(self, config: Any) -> None:
        """Look at the model's sizes, and of a quantized checkpoint at the index of its folder."""
        from optimum_qvlm.hf.format.model_sizes import require_buildable

        require_buildable(config.to_dict(), config.name_or_path or "the model")
        if self.pre_quantized:
            from optimum_qvlm.hf.format.index import require_index_of

            require_index_of(self.config, config.name_or_path or "")
            self._require_same_model(config, config.name_or_path or None)

    def _require_same_model(self, config: Any, folder: str | Path | None) -> None:
        from optimum_qvlm.hf.format.model_config import require_same_model

        if folder is not None:
            require_same_model(self.config.record, config, Path(folder) / "config.json")

    def adjust_max_memory(self, max_memory: dict[str, int | str]) -> dict[str, int | str]:
        """The only hook that sees `max_memory`."""
        if self.pre_quantized:
            return max_memory
        from optimum_qvlm.hf.format.modules import quantized_skeleton

        return self._placement.note_memory(max_memory, quantized_skeleton(self._model, self._plan))  # type: ignore[no-any-return]

    def before_loading(self, model: Any, files: list[str]) -> None:
        """Hold the files beside the weights, and check the checkpoint or plan the calibration before anything is read.

        Raises:
            CheckpointError: the checkpoint does not hold what its configuration says.
            ConfigError: the settings do not fit the model.
        """
        from optimum_qvlm.hf.access import watch_access
        from optimum_qvlm.hf.format.coverage import require_coverage
        from optimum_qvlm.hf.format.modules import extra_tensors, require_checkpoint, swap_in_quantized
        from optimum_qvlm.hf.saving.source import Source, require_weights_inside

        if not files:
            raise CheckpointError("a model is quantized from the files of a checkpoint; none were given")
        require_weights_inside(model.config.name_or_path, files)
        self.source = Source.of(files).hold()
        watch_access(model, self._note_access)
        if self.pre_quantized:
            self.source.require_inside(map(Path, files))
            self._require_same_model(model.config, self.source.folder)
            record = require_checkpoint(self.config, files)
            swap_in_quantized(model, record)
            require_coverage(model, record.manifest or {}, extra_tensors(record.modules))
            self._dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        else:
            self._prepare(model, files)

    def after_loading(self, model: Any) -> Any:
        """Calibrate, or finish what was loaded, and give the model our methods."""
        from optimum_qvlm.hf.access import unwatch_access
        from optimum_qvlm.hf.format.modules import prepare_modules
        from optimum_qvlm.hf.fusion import fuse_where_it_pays
        from optimum_qvlm.hf.methods import wrap_methods
        from optimum_qvlm.hf.saving.save import wrap_saving

        unwatch_access(model)
        if self.pre_quantized:
            self._cast(model)
        else:
            self._calibrate(model)
        if self.config.dequantize:
            return self.to_plain(model, model.config.dtype)
        prepare_modules(model, self.config.weight_only_tokens())
        if self._reference is not None:
            self._compare(model)
        if self.config.record is not None:
            fuse_where_it_pays(model, self.config.record)
        wrap_saving(model)
        wrap_methods(model)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The state dict with guards and shapes, as it goes to disk."""
        from optimum_qvlm.hf.format.modules import stored_state
        from optimum_qvlm.hf.format.names import runtime_modules

        record = self.config.record
        assert record is not None
        paths = runtime_modules(model, record.modules, "weight_packed")
        entries = {path: record.modules[name] for name, path in paths.items()}
        return stored_state(model, config_identity(self.config.to_dict()), entries), {}

    def to_plain(self, model: Any, dtype: Any = None) -> Any:
        """The model with plain linears, of `dtype` where it is given, else of that of the scales.

        Raises:
            ConfigError: a parameter is offloaded.
        """
        from optimum_qvlm.hf.format.modules import quantized_modules
        from optimum_qvlm.hf.methods import unwrap_methods
        from optimum_qvlm.hf.saving.save import unwrap_saving
        from optimum_qvlm.modules.swap import replace_module

        offloaded = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
        if offloaded is not None:
            raise ConfigError(
                f"{offloaded} is offloaded, and dequantizing needs all weights in memory; load with a device_map that "
                "keeps them there"
            )
        target = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        for path, module in quantized_modules(model).items():
            replace_module(model, path, module.to_linear(module.grid.scale_dtype if target is None else target))
        if target is not None and target != model.dtype:
            torch.nn.Module.to(model, target)
        unwrap_saving(model)
        unwrap_methods(model)
        return model

    def name_as_written(self, model: Any, *, original_format: bool) -> None:
        """Let the record name modules as their tensors will be named in the files that are about to be written.

        Raises:
            CheckpointError: another module took the place of a quantized one.
        """
        from optimum_qvlm.hf.format.modules import quantized_modules
        from optimum_qvlm.hf.format.names import runtime_modules, written_names
        from optimum_qvlm.hf.format.record import rename_modules

        record = self.config.record
        assert record is not None
        if has_adapters(model):
            return  # only adapters are written
        paths, quantized = runtime_modules(model, record.modules, "weight_packed"), quantized_modules(model)
        absent = next((name for name in record.modules if paths.get(name) not in quantized), None)
        adapted = next((path.partition(".base_layer")[0] for path in quantized if ".base_layer" in path), None)
        if adapted is not None:
            raise CheckpointError(
                f"{adapted} has an adapter, which is no part of the checkpoint; save what unload() of the PEFT model "
                "returns, or the adapter alone by save_pretrained() of the PEFT model"
            )
        if absent is not None:
            raise CheckpointError(
                f"{absent} was quantized, but the model has another module in its place, so that it cannot be saved as "
                "quantized; put the quantized one back, or save what dequantize() returns"
            )
        rename_modules(record, written_names(model, paths, original_format=original_format))

    def _note_access(self, access: Any) -> None:
        self.source = replace(self.source, access=access)

    def _prepare(self, model: Any, files: list[str]) -> None:
        """Plan on the model without weights, so that what does not fit is refused at once."""
        from optimum_qvlm.data.recipe import find_preset
        from optimum_qvlm.hf.format.names import disk_names_of_linears
        from optimum_qvlm.hf.format.safetensors_files import read_headers
        from optimum_qvlm.models.registry import adapter_for
        from optimum_qvlm.pipeline.planner import make_plan

        self._source_bytes = sum(Path(file).stat().st_size for file in files)
        for sentence in self.config.idle_settings():
            logger.warning(sentence)
        if isinstance(self.config.dataset, str):
            find_preset(self.config.dataset)
        names = disk_names_of_linears(model, read_headers(files))
        self._plan = make_plan(adapter_for(model), self.config.options(), names)
        self._require_head(model)
        self._model = model

    def _require_head(self, model: Any) -> None:
        from optimum_qvlm.evaluation.fidelity import predicts_tokens
        from optimum_qvlm.pipeline.encoder.step import learns_encoder

        if learns_encoder(self._plan, self.config.options()) and not predicts_tokens(model):
            raise ConfigError(
                f"encoder.epochs={self.config.encoder.epochs} learns from the answers that the language model predicts,"
                f" and {type(model).__name__} has no output embedding to predict them; load a class with a language "
                "model head, as AutoModelForImageTextToText, or set encoder.epochs to 0"
            )

    def _calibrate(self, model: Any) -> None:
        from optimum_qvlm.hf.calibration_data import prepare_data, require_all_loaded, users_processor
        from optimum_qvlm.hf.dry_run import try_out
        from optimum_qvlm.hf.format.modules import packed_bytes
        from optimum_qvlm.hf.resume import journal_of
        from optimum_qvlm.pipeline.calibrate import calibrate
        from optimum_qvlm.report.summary import summarize

        self._model = None
        require_all_loaded(model)
        device = self._placement.compute_device()
        before = packed_bytes(model)
        if self.config.method != "rtn":
            self.config.processor = users_processor(self.config, self.source.access)
        if self.config.rehearse:
            self.dry_run, result = try_out(model, self._plan, self.config, self.source, device)
        else:
            data = None
            if self.config.method != "rtn":
                data = prepare_data(model, self._plan, self.config, self.source, device)
                self._note_reference(model, data, device)
            with journal_of(model, self._plan, self.config, data, device) as journal:
                result = calibrate(model, self._plan, self.config.options(), data, device, journal=journal)
                self.journal = None if journal is None else journal.folder
        if self.config.processor is not None:
            self._keep_processor(self.config.processor)
        self.report = summarize(
            result,
            self.config.to_dict(),
            bytes_before=before,
            bytes_after=packed_bytes(model),
            source_bytes=self._source_bytes,
            warnings=self.config.idle_settings(),
        )
        self.report["calibration"] |= self.source.origin()
        self.config.record = CalibrationRecord(
            modules=result.modules, blocks=result.blocks(), calibration=self.report["calibration"]
        )
        self.config.drop_data()
        self._placement.apply(model)

    def _cast(self, model: Any) -> None:
        """Give parameters the dtype that the user asked for: of quantized checkpoints, older transformers keep
        the stored one for every key that it renames."""
        kept = kept_in_float32(model)
        for name, parameter in model.named_parameters():
            target = self._dtypes.get(name, parameter.dtype)
            if parameter.is_meta or parameter.dtype == target or kept.intersection(name.split(".")):
                continue
            parameter.data = parameter.data.to(target)

    def _note_reference(self, model: Any, data: Any, device: torch.device) -> None:
        """What full precision says of held-out samples, where the dataset has more than are calibrated on."""
        from optimum_qvlm.evaluation.compare import observe
        from optimum_qvlm.hf.calibration_data import reader_of_answers
        from optimum_qvlm.models.registry import adapter_for
        from optimum_qvlm.pipeline.layer_streaming import streamed

        if data.held_out:
            self._tokenizer = reader_of_answers(self.config, self.source, data.recipe.source)
            layers = [layer.path for part in self._plan.parts for layer in part.layers]
            images = adapter_for(model).image_tokens()
            with streamed(model, layers, device):
                self._reference = data, images, observe(model, data.held_out, images, quantized=False, device=device)

    def _compare(self, model: Any) -> None:
        """Fidelity of the finished model on the held-out samples."""
        from optimum_qvlm.evaluation.compare import fidelity_report, observe
        from optimum_qvlm.evaluation.transcripts import transcripts

        assert self.report is not None
        data, image_tokens, reference = self._reference
        answered = observe(model, data.held_out, image_tokens, quantized=True)
        self.report["fidelity"] = fidelity_report(reference, answered)
        if self._tokenizer is not None:
            pictured = self.config.report_samples == "images"
            lines = transcripts(
                reference, answered, data.held_out, data.held_out_samples, self._tokenizer, images=pictured
            )
            self.report["fidelity"]["samples"] = [line.to_dict() for line in lines]
        self._reference = self._tokenizer = None

    def _keep_processor(self, processor: Any) -> None:
        """Hold the files of the user's own processor, which the source may lack, for saving."""
        with tempfile.TemporaryDirectory() as folder:
            processor.save_pretrained(folder)
            paths = [path for path in Path(folder).rglob("*") if path.is_file()]
            self.processor_files = {str(path.relative_to(folder)): path.read_bytes() for path in paths}

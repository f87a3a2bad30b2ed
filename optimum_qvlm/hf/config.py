"""`QVLMConfig`: what the user asks for, and after calibration what every module got."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from inspect import Signature, signature
from typing import Any, Literal, Self

from transformers.utils.quantization_config import QuantizationConfigMixin

from optimum_qvlm.errors import ConfigError
from optimum_qvlm.files import strict_json
from optimum_qvlm.hf.format.migration import migrate
from optimum_qvlm.hf.format.record import SEALS, CalibrationRecord, config_digest, config_identity, read_record
from optimum_qvlm.hf.settings import LISTS, idle_settings, require_group, require_levels, require_valid
from optimum_qvlm.pipeline.options import (
    FAST_CLIPS,
    FEEDBACK_CLIPS,
    CalibrationOptions,
    Effort,
    LinearChoice,
    site_options,
)
from optimum_qvlm.search.encoder_loss import EncoderOptions
from optimum_qvlm.search.site import ClipGrids
from optimum_qvlm.spec import GroupSize, Scheme

QUANT_METHOD = "qvlm"
FORMAT_VERSION = 1

PAPER_QUANTILES = (1.0, 0.995, 0.99, 0.985, 0.98)

Override = str | None | Mapping[str, Any]

_SETTINGS = (
    "scheme",
    "group_size",
    "vision_scheme",
    "symmetric",
    "modules_to_not_convert",
    "overrides",
    "num_samples",
    "batch_size",
    "max_length",
    "seed",
    "method",
    "search_tokens",
    "max_block_depth",
    "threshold",
    "activation_range",
    "activation_clips",
    "weight_clips",
    "soft_assignment",
    "decode_tokens",
    "exact_decode",
    "effort",
    "transforms",
    "error_feedback",
    "servable",
    "two_level_scales",
    "encoder_epochs",
    "encoder_lr",
    "encoder_eta",
    "encoder_l1",
    "encoder_l2",
)
_RUN_TIME = ("decode_tokens", "exact_decode", "dequantize")
"""Settings that `from_pretrained` takes beside a quantized checkpoint."""

_PRECISION = (
    "scheme",
    "group_size",
    "vision_scheme",
    "symmetric",
    "modules_to_not_convert",
    "overrides",
    "activation_range",
    "transforms",
    "servable",
    "two_level_scales",
)
"""Settings that say what a checkpoint holds: another value asked for when it is loaded is an error."""

_RESULTS = ("modules", "blocks", "calibration", *SEALS)


class QVLMConfig(QuantizationConfigMixin):
    """Quantize a vision-language or text model while `from_pretrained` loads it.

    Args:
        scheme: bits of the language model's linears, `"w4a16"`, `"w4a8"`, `"w4a4"`, `"w6a6"`, `"w8a8"` or any
            `w<2..8>a<2..8 or 16>`; a16 leaves activations in floating point.
        group_size: input channels that share a weight scale in the language model's linears below 8 bits.
            "auto" takes the largest of 128, 64, 32, 16 that divides a linear's inputs; None shares whole rows.
        vision_scheme: bits of the vision tower's and the projector's linears; None leaves them as they are.
        symmetric: weight grids centred on zero; False adds a zero point per group.
        modules_to_not_convert: name patterns that stay in full precision.
        overrides: pattern -> scheme, None (full precision) or {"scheme", "group_size", "symmetric"}; the first
            pattern that matches a name decides. A pattern is shell-style, or a run of whole dotted components;
            names are those of the tensors on disk, as the plan and the report print them.
        dataset: calibration samples. None is the packaged set; a preset's name; a `datasets.Dataset` or list of
            dicts with image(s), question and answer; a list of chat messages; or a list of ready model inputs.
        processor: the processor (or tokenizer) that renders samples; by default the checkpoint's own.
        num_samples: how many samples to calibrate on.
        batch_size: samples per forward.
        max_length: longest sequence in tokens; image tokens are never cut.
        seed: seed of every random choice.
        method: "qvlm" searches blocks of dependent layers, "layerwise" each site alone, "rtn" rounds to nearest
            without data.
        search_tokens: how many tokens the search looks at.
        max_block_depth: layers that are searched together at most.
        threshold: dependency per pair of layers above which they share a block, in nats (h0 in the paper); None is
            the median over the model.
        activation_range: "dynamic" takes the range of activations from each input, "static" from the calibration.
        activation_clips: candidates for the clip of a site's activations, 1.0 among them: ratios of the peak where
            ranges are dynamic, quantiles of the magnitudes where they are static. None is a default for each.
        weight_clips: candidates for the clip of weights, ratios of the peak, 1.0 among them; None is the default.
        soft_assignment: what squared distances are divided by where dependency is measured: "step_squared", which
            does not depend on units, or the grid's "step", as the paper prints.
        decode_tokens: up to this many tokens in one call, a quantized linear leaves activations in floating point,
            on every device, whatever the scheme says: decoding is no slower for it, and closer to full precision.
        exact_decode: True rounds activations at every number of tokens, as the scheme says.
        effort: "balanced", or "fast", which tries fewer candidates and searches no blocks jointly.
        transforms: "auto" chooses per site whether its activations are equalized, rotated, both or neither; "off",
            "equalize", "rotate" and "both" decide for all sites.
        error_feedback: let each channel of a weight make good what rounding the ones before it did wrong; False
            rounds each weight on its own.
        servable: leave out what other runtimes cannot do in a forward: of transforms, only equalizers that the norm
            before a site can take up are used.
        two_level_scales: make the weight scales of a row whole multiples of one step, so that long prompts run as
            products of bytes on a GPU. For symmetric weights of 2 to 4 bits in groups, with activations rounded to one
            scale per token (8 bits) or to fixed ones; other linears that overrides ask for, and those of the vision
            tower, keep their scales.
        encoder_epochs: passes over the samples in which tower and projector are optimised by gradients through the
            language model, after their search; 0 leaves that out.
        encoder_lr: learning rate of that.
        encoder_eta: share of the language model's final error beside the error of the encoder's output.
        encoder_l1: factor of the weighted dependencies of layers in its loss.
        encoder_l2: factor of the two errors in its loss.
        dequantize: load a quantized checkpoint as a model of plain linears with the rounded weights, as the model's
            `dequantize()` gives. It is never saved.

    Beside a quantized checkpoint `decode_tokens`, `exact_decode` and `dequantize` hold where they are given; other
    settings must be those that were saved, or are not given.

    Raises:
        ConfigError, SpecError: a field is not valid.

    Example:
        >>> QVLMConfig("w4a8", vision_scheme=None).scheme
        'w4a8'
    """

    rehearse = False
    """Set by `dry_run` on its copy: try the calibration out in place of doing it. No setting, and never saved."""

    given: frozenset[str] = frozenset()
    """Names of the arguments that were passed, whatever their value."""

    requests: Mapping[str, Any] | None = None
    """Of a configuration that was read: what the user's, passed beside the checkpoint, asks for."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Note what is given: a default that nobody asked for overwrites nothing that was saved."""
        config: Self = object.__new__(cls)
        config.given = frozenset((*kwargs, "scheme") if args else kwargs)
        return config

    def __init__(
        self,
        scheme: str = "w4a8",
        *,
        group_size: GroupSize = "auto",
        vision_scheme: str | None = "w8a8",
        symmetric: bool = True,
        modules_to_not_convert: list[str] | None = None,
        overrides: Mapping[str, Override] | None = None,
        dataset: Any = None,
        processor: Any = None,
        num_samples: int = 64,
        batch_size: int = 8,
        max_length: int = 2048,
        seed: int = 0,
        method: Literal["qvlm", "layerwise", "rtn"] = "qvlm",
        search_tokens: int = 2048,
        max_block_depth: int = 3,
        threshold: float | None = None,
        activation_range: Literal["dynamic", "static"] = "dynamic",
        activation_clips: Sequence[float] | None = None,
        weight_clips: Sequence[float] | None = None,
        soft_assignment: Literal["step_squared", "step"] = "step_squared",
        decode_tokens: int = 16,
        exact_decode: bool = False,
        effort: Effort = "balanced",
        transforms: Literal["auto", "off", "equalize", "rotate", "both"] = "auto",
        error_feedback: bool = True,
        servable: bool = False,
        two_level_scales: bool = False,
        encoder_epochs: int = 0,
        encoder_lr: float = 1e-2,
        encoder_eta: float = 1.0,
        encoder_l1: float = 1.0,
        encoder_l2: float = 10.0,
        dequantize: bool = False,
    ) -> None:
        self.quant_method = QUANT_METHOD
        self.scheme = scheme
        self.group_size = group_size
        self.vision_scheme = vision_scheme
        self.symmetric = symmetric
        self.modules_to_not_convert = modules_to_not_convert
        self.overrides = dict(overrides) if isinstance(overrides, Mapping) else overrides
        self.dataset = dataset
        self.processor = processor
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.max_length = max_length
        self.seed = seed
        self.method = method
        self.search_tokens = search_tokens
        self.max_block_depth = max_block_depth
        self.threshold = threshold
        self.activation_range = activation_range
        self.activation_clips = activation_clips
        self.weight_clips = weight_clips
        self.soft_assignment = soft_assignment
        self.decode_tokens = decode_tokens
        self.exact_decode = exact_decode
        self.effort = effort
        self.transforms = transforms
        self.error_feedback = error_feedback
        self.servable = servable
        self.two_level_scales = two_level_scales
        self.encoder_epochs = encoder_epochs
        self.encoder_lr = encoder_lr
        self.encoder_eta = encoder_eta
        self.encoder_l1 = encoder_l1
        self.encoder_l2 = encoder_l2
        self.dequantize = dequantize
        self.record: CalibrationRecord | None = None
        self._validate()

    __signature__ = Signature([*signature(__init__).parameters.values()][1:])
    """Of `__init__`: without it, help and editors would show that of `__new__`."""

    @classmethod
    def paper(cls, bits: int = 4, **settings: Any) -> Self:
        """The paper's mode: static bounds at quantiles 1.0 to 0.98, blocks of up to 3 layers, the tower at `bits` too.

        `settings` are further arguments, or replace those of the mode.
        """
        scheme = f"w{bits}a{bits}"
        mode: dict[str, Any] = {
            "scheme": scheme,
            "vision_scheme": scheme,
            "num_samples": 64,
            "max_block_depth": 3,
            "activation_range": "static",
            "activation_clips": PAPER_QUANTILES,
            "soft_assignment": "step",
            "transforms": "off",
            "error_feedback": False,
            "encoder_epochs": 10,
        }
        return cls(**(mode | settings))

    def options(self) -> CalibrationOptions:
        """The same as validated values."""
        static = self.activation_range == "static"
        return CalibrationOptions(
            language=self._language(static),
            vision=LinearChoice(
                scheme=None if self.vision_scheme is None else Scheme.parse(self.vision_scheme),
                symmetric=self.symmetric,
                static=static,
            ),
            keep=tuple(self.modules_to_not_convert or ()),
            overrides=tuple((pattern, self._override(pattern)) for pattern in self.overrides or {}),
            method=self.method,
            seed=self.seed,
            search_tokens=self.search_tokens,
            search=site_options(
                self._grids(static),
                self.effort,
                self.transforms,
                error_feedback=self.error_feedback,
                fold=self.servable,
            ),
            fold=self.servable,
            joint=self.method == "qvlm" and self.effort == "balanced",
            max_block_depth=self.max_block_depth,
            threshold=self.threshold,
            softness=self.soft_assignment,
            encoder=EncoderOptions(
                epochs=self.encoder_epochs,
                learning_rate=self.encoder_lr,
                entropy_weight=self.encoder_l1,
                error_weight=self.encoder_l2,
                final_share=self.encoder_eta,
            ),
        )

    def _language(self, static: bool) -> LinearChoice:
        """Of the decoder's linears.

        Raises:
            ConfigError: two-level scales are asked for and gain nothing.
        """
        scheme = Scheme.parse(self.scheme)
        if self.two_level_scales:
            require_levels(scheme, self.group_size, symmetric=self.symmetric, static=static)
        return LinearChoice(
            scheme=scheme,
            group_size=self.group_size,
            symmetric=self.symmetric,
            static=static,
            two_level=self.two_level_scales,
        )

    def _grids(self, static: bool) -> ClipGrids:
        """A quantile is a static bound, whose gain needs no margin."""
        default = FAST_CLIPS if self.effort == "fast" else ClipGrids()
        if self.error_feedback:
            default = replace(default, weight=FEEDBACK_CLIPS[:: 2 if self.effort == "fast" else 1])
        if static:
            default = replace(default, activation=PAPER_QUANTILES, activation_margin=0.0)
        elif self.servable:  # other runtimes take the peak of each token
            default = replace(default, activation=(1.0,))
        return replace(
            default,
            activation=default.activation if self.activation_clips is None else tuple(self.activation_clips),
            weight=default.weight if self.weight_clips is None else tuple(self.weight_clips),
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON values: settings, and after calibration the results. Never data or processors."""
        values: dict[str, Any] = {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION}
        values |= {name: getattr(self, name) for name in _SETTINGS}
        values["dataset"] = self.dataset if isinstance(self.dataset, str) else None
        if self.record is not None:
            values["modules"] = {name: record.to_dict() for name, record in self.record.modules.items()}
            values["blocks"] = self.record.blocks
            values["calibration"] = self.record.calibration
            seals = {name: getattr(self.record, name) for name in SEALS}
            values |= {name: seal for name, seal in seals.items() if seal is not None}
        return strict_json.loads(strict_json.dumps(values))  # type: ignore[no-any-return]

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Self | tuple[Self, dict[str, Any]]:
        """Undo `to_dict`.

        Raises:
            ConfigError: an unknown field, a record that is not whole, or a format version that is not read.
        """
        values = migrate(dict(config_dict), FORMAT_VERSION)
        values.pop("quant_method", None)
        results = {name: values.pop(name) for name in _RESULTS if name in values}
        unknown = set(values) - {*_SETTINGS, "dataset", "processor"}
        if unknown:
            raise ConfigError(f"unknown fields in quantization_config: {', '.join(sorted(map(str, unknown)))}")
        config = cls(**values)
        if results:
            config.record = read_record(results)
            config.record.found_digest = config_digest(config_dict)
            config.record.found_identity = config_identity(config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def idle_settings(self) -> list[str]:
        """Sentences about settings that were changed but have no effect beside others; empty where there are none."""
        return idle_settings(vars(self), _defaults())

    def weight_only_tokens(self) -> int:
        """Up to how many tokens activations are not rounded."""
        return 0 if self.exact_decode else self.decode_tokens

    def get_loading_attributes(self) -> dict[str, Any]:
        """What transformers carries over from this configuration to that of a quantized checkpoint.

        Of settings that cannot be changed any more only `requests`, for `take_requests` to look at.
        """
        asked = {name: getattr(self, name) for name in (*_RUN_TIME, *_PRECISION) if self._is_asked_for(name)}
        run_time = {name: value for name, value in asked.items() if name in _RUN_TIME}
        return {**run_time, "requests": asked} if len(run_time) < len(asked) else run_time

    def take_requests(self) -> None:
        """Compare what was asked for beside the checkpoint with what it holds.

        Raises:
            ConfigError: they differ.
        """
        requests, self.requests = self.requests or {}, None
        for name in _PRECISION:
            if name in requests and strict_json.dumps(requests[name]) != strict_json.dumps(getattr(self, name)):
                raise ConfigError(
                    f"quantization_config asks for {name}={requests[name]!r}, but the checkpoint is quantized with "
                    f"{name}={getattr(self, name)!r}; leave it out to load the checkpoint as it is, or quantize the "
                    "full-precision model"
                )

    def _is_asked_for(self, name: str) -> bool:
        """Given, or changed since."""
        return name in self.given or getattr(self, name) != _defaults()[name]

    def drop_data(self) -> None:
        """Forget dataset and processor objects; a preset's name stays, as a record."""
        self.dataset = self.dataset if isinstance(self.dataset, str) else None
        self.processor = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy that shares dataset and processor, which may be large or hold open files."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(self.__dict__)
        for name in ("overrides", *LISTS):
            value = getattr(self, name)
            setattr(copied, name, None if value is None else value.copy())
        copied.record = copy.deepcopy(self.record, memo)
        return copied

    def __eq__(self, other: object) -> bool:
        return isinstance(other, QVLMConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def _override(self, pattern: str) -> LinearChoice:
        value = (self.overrides or {})[pattern]
        static = self.activation_range == "static"
        if value is None:
            return LinearChoice(scheme=None)
        if isinstance(value, str):
            scheme, levels = Scheme.parse(value), self.two_level_scales
            return LinearChoice(scheme=scheme, symmetric=self.symmetric, static=static, two_level=levels)
        if not isinstance(value, Mapping) or set(value) - {"scheme", "group_size", "symmetric"}:
            raise ConfigError(
                f"overrides[{pattern!r}] must be a scheme, None, or a dict with scheme, group_size, symmetric; "
                f"got {value!r}"
            )
        group_size = value.get("group_size", "auto")
        require_group(group_size, f"overrides[{pattern!r}]: group_size")
        symmetric = value.get("symmetric", self.symmetric)
        if not isinstance(symmetric, bool):
            raise ConfigError(f"overrides[{pattern!r}]: symmetric must be True or False, got {symmetric!r}")
        scheme = value.get("scheme", self.scheme)
        return LinearChoice(
            scheme=None if scheme is None else Scheme.parse(scheme),
            group_size=group_size,
            symmetric=symmetric,
            static=static,
            two_level=self.two_level_scales,
        )

    def _validate(self) -> None:
        require_valid(vars(self))
        for name in LISTS:
            value = getattr(self, name)
            setattr(self, name, None if value is None else list(value))
        self.options()


def _defaults() -> dict[str, Any]:
    """What each setting is where it is not given."""
    return {name: parameter.default for name, parameter in signature(QVLMConfig).parameters.items()}

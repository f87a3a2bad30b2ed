"""`QVLMConfig`: what the user asks for, and after calibration what every module got."""

import copy
import difflib
from collections.abc import Mapping
from dataclasses import fields, replace
from inspect import Parameter, Signature
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, Self, cast

from transformers.utils.quantization_config import QuantizationConfigMixin

from optimum_qvlm.errors import ConfigError
from optimum_qvlm.files import strict_json
from optimum_qvlm.hf.deprecated import EXACT_DECODE, FormerNames, as_fields, made_of, move_deprecated
from optimum_qvlm.hf.format.migration import migrate
from optimum_qvlm.hf.format.record import SEALS, CalibrationRecord, config_digest, config_identity, read_record
from optimum_qvlm.hf.settings import (
    DEFAULTS,
    HELD,
    RUN_TIME,
    SAVED,
    idle_settings,
    require_agreement,
    require_levels,
    saved_values,
)
from optimum_qvlm.pipeline.options import (
    FAST_CLIPS,
    FEEDBACK_CLIPS,
    CalibrationOptions,
    Effort,
    LinearChoice,
    Method,
    Transforms,
    site_options,
)
from optimum_qvlm.quant.entropy import Softness
from optimum_qvlm.search.site import ClipGrids
from optimum_qvlm.settings import (
    NESTED,
    EncoderOptions,
    Group,
    SearchOptions,
    Settings,
    Switch,
    declaration,
    nested_names,
    require,
)
from optimum_qvlm.spec import TWO_LEVEL_BITS, GroupSize, Scheme, WeightSpec

QUANT_METHOD = "qvlm"
FORMAT_VERSION = 1

PAPER_QUANTILES = (1.0, 0.995, 0.99, 0.985, 0.98)

PAPER_SEARCH = {
    "max_block_depth": 3,
    "activation_range": "static",
    "activation_clips": PAPER_QUANTILES,
    "soft_assignment": "step",
    "transforms": "off",
    "error_feedback": False,
    "token_weights": False,
}
"""The paper's search: static bounds, nothing done to activations, each weight rounded on its own."""

Override = str | None | Mapping[str, Any]

_RESULTS = ("modules", "blocks", "calibration", *SEALS)


class QVLMConfig(FormerNames, QuantizationConfigMixin):
    """Quantize a vision-language or text model while `from_pretrained` loads it.

    Args:
        scheme: bits of the language model's linears, `"w4a16"`, `"w4a8"`, `"w4a4"`, `"w6a6"`, `"w8a8"` or any
            `w<2..8>a<2..8 or 16>`; a16 leaves activations in floating point.
        search: how roundings are searched: `SearchOptions` or a dict with some of its fields.
        encoder: how tower and projector are optimised: `EncoderOptions` or a dict with some of its fields.
        settings: everything else by name, see `optimum_qvlm.settings.Settings`, where each is declared with its default
            and what it may be. Names of `overrides` are those of the tensors on disk, as plan and report print them.

    Beside a quantized checkpoint `decode_tokens` and `dequantize` hold where they are given; other settings must be
    those that were saved, or are not given. Fields of `SearchOptions` and `EncoderOptions` are still accepted under
    their names of before as arguments, with a DeprecationWarning.

    Raises:
        ConfigError, SpecError: a field is not valid.
        TypeError: there is no such setting.

    Example:
        >>> QVLMConfig("w4a8", vision_scheme=None).scheme
        'w4a8'
    """

    if TYPE_CHECKING:  # what `__init__` sets from the declaration
        vision_scheme: str | None
        group_size: GroupSize
        symmetric: bool
        two_level_scales: bool
        modules_to_not_convert: list[str] | None
        overrides: dict[str, Override] | None
        method: Method
        effort: Effort
        servable: bool
        dataset: Any
        processor: Any
        resume: str | PathLike[str] | Literal[True] | None
        report_samples: str
        num_samples: int
        batch_size: int
        max_length: int
        seed: int
        decode_tokens: int
        dequantize: bool

    rehearse = False
    """Set by `dry_run` on its copy: try the calibration out in place of doing it. No setting, and never saved."""

    given: frozenset[str] = frozenset()
    """Names of the arguments that were passed, whatever their value."""

    requests: Mapping[str, Any] | None = None
    """Of a configuration that was read: what the user's, passed beside the checkpoint, asks for."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Note what is given: a default that nobody asked for overwrites nothing that was saved."""
        config: Self = object.__new__(cls)
        given = {*kwargs, "scheme"} if args else set(kwargs)
        config.given = frozenset({"decode_tokens" if name == EXACT_DECODE else name for name in given})
        return config

    def __init__(
        self,
        scheme: str = "w4a8",
        *,
        search: SearchOptions | Mapping[str, Any] | None = None,
        encoder: EncoderOptions | Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        nested = {"search": as_fields(search, SearchOptions), "encoder": as_fields(encoder, EncoderOptions)}
        move_deprecated(settings, nested)
        declared = {entry.name: entry.default for entry in fields(Settings)}
        unknown = sorted(set(settings) - set(declared))
        if unknown:
            close = difflib.get_close_matches(unknown[0], [*declared, *NESTED], n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise TypeError(f"QVLMConfig has no setting {', '.join(unknown)}{hint}")
        self.quant_method = QUANT_METHOD
        self.scheme = scheme
        self.__dict__.update(declared | settings | {"scheme": scheme})
        self.search = made_of(SearchOptions, nested["search"])
        self.encoder = made_of(EncoderOptions, nested["encoder"])
        self.record: CalibrationRecord | None = None
        self._validate()

    __signature__ = Signature(
        [
            Parameter("scheme", Parameter.POSITIONAL_OR_KEYWORD, default="w4a8", annotation=str),
            *(
                Parameter(entry.name, Parameter.KEYWORD_ONLY, default=entry.default, annotation=entry.type)
                for entry in fields(Settings)[1:]
            ),
            *(Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=made) for name, made in NESTED.items()),
        ]
    )
    """What help and editors show: the declared settings."""

    @classmethod
    def paper(cls, bits: int = 4, **settings: Any) -> Self:
        """The paper's mode: static bounds at quantiles 1.0 to 0.98, blocks of up to 3 layers, the tower at `bits` too.

        `settings` are further arguments, or replace those of the mode: of `search` and `encoder` what differs from
        their defaults.
        """
        scheme = f"w{bits}a{bits}"
        nested = {name: as_fields(settings.pop(name, None), options) for name, options in NESTED.items()}
        move_deprecated(settings, nested)
        mode: dict[str, Any] = {"scheme": scheme, "vision_scheme": scheme, "num_samples": 64}
        return cls(
            **(mode | settings),
            search=PAPER_SEARCH | nested["search"],
            encoder={"epochs": 10} | nested["encoder"],
        )

    def options(self) -> CalibrationOptions:
        """The same as validated values."""
        static = self.search.activation_range == "static"
        return CalibrationOptions(
            language=self._language(static),
            vision=self._choice(self.vision_scheme),
            keep=tuple(self.modules_to_not_convert or ()),
            overrides=tuple((pattern, self._override(pattern)) for pattern in self.overrides or {}),
            method=self.method,
            seed=self.seed,
            search_tokens=self.search.tokens,
            search=site_options(
                self._grids(static),
                self.effort,
                cast(Transforms, self.search.transforms),
                error_feedback=self.search.error_feedback,
                fold=self.servable,
            ),
            fold=self.servable,
            joint=self.method == "qvlm" and self.effort == "balanced",
            max_block_depth=self.search.max_block_depth,
            threshold=self.search.threshold,
            softness=cast(Softness, self.search.soft_assignment),
            encoder=self.encoder,
            weighs_tokens=self.search.token_weights,
        )

    def _language(self, static: bool) -> LinearChoice:
        """Of the decoder's linears.

        Raises:
            ConfigError: two-level scales are asked for and gain nothing.
        """
        scheme = Scheme.parse(self.scheme)
        if self.two_level_scales:
            require_levels(scheme, self.group_size, symmetric=self.symmetric, static=static)
        return self._choice(self.scheme, self.group_size)

    def _choice(
        self, scheme: str | None, group_size: GroupSize = "auto", symmetric: bool | None = None
    ) -> LinearChoice:
        """Grids of a scheme; `symmetric` None is as for all."""
        if scheme is None:
            return LinearChoice(weight=None)
        bits = Scheme.parse(scheme)
        symmetric = self.symmetric if symmetric is None else symmetric
        two_level = self.two_level_scales and symmetric and bits.weight_bits <= TWO_LEVEL_BITS
        return LinearChoice(
            weight=WeightSpec(bits=bits.weight_bits, symmetric=symmetric, two_level=two_level),
            activation_bits=bits.activation_bits,
            group_size=group_size,
            static=self.search.activation_range == "static",
            fitted=self.search.fitted_activations and not self.servable,
        )

    def _grids(self, static: bool) -> ClipGrids:
        """A quantile is a static bound, whose gain needs no margin."""
        default = FAST_CLIPS if self.effort == "fast" else ClipGrids()
        asked = self.search
        if asked.error_feedback:
            default = replace(default, weight=FEEDBACK_CLIPS[:: 2 if self.effort == "fast" else 1])
        if static:
            default = replace(default, activation=PAPER_QUANTILES, activation_margin=0.0)
        elif self.servable:  # other runtimes take the peak of each token
            default = replace(default, activation=(1.0,))
        return replace(
            default,
            activation=default.activation if asked.activation_clips is None else tuple(asked.activation_clips),
            weight=default.weight if asked.weight_clips is None else tuple(asked.weight_clips),
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON values: settings, and after calibration the results. Never data or processors."""
        values: dict[str, Any] = {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION}
        values |= self._saved()
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
        unknown = set(values) - {*SAVED, EXACT_DECODE, "dataset", "processor"}
        if unknown:
            raise ConfigError(f"unknown fields in quantization_config: {', '.join(sorted(map(str, unknown)))}")
        nested: dict[str, Any] = {name: {} for name in NESTED}
        for name, (argument, own) in nested_names().items():
            if name in values:
                nested[argument][own] = values.pop(name)
        if values.pop(EXACT_DECODE, False) is True:
            values["decode_tokens"] = 0
        config = cls(**values, **nested)
        if results:
            config.record = read_record(results)
            config.record.found_digest = config_digest(config_dict)
            config.record.found_identity = config_identity(config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def idle_settings(self) -> list[str]:
        """Sentences about settings that were changed but have no effect beside others; empty where there are none."""
        return idle_settings(self)

    def weight_only_tokens(self) -> int:
        """Up to how many tokens activations are not rounded."""
        return self.decode_tokens

    def get_loading_attributes(self) -> dict[str, Any]:
        """What transformers carries over from this configuration to that of a quantized checkpoint.

        Of settings that cannot be changed any more only `requests`, for `take_requests` to look at.
        """
        saved = self._saved()
        held = {name: saved[name] for name in HELD if self._is_asked_for(name, saved[name])}
        run_time = {name: getattr(self, name) for name in RUN_TIME if self._is_asked_for(name, getattr(self, name))}
        return {**run_time, "requests": run_time | held} if held else run_time

    def take_requests(self) -> None:
        """Compare what was asked for beside the checkpoint with what it holds.

        Raises:
            ConfigError: they differ.
        """
        requests, self.requests = self.requests or {}, None
        saved = self._saved()
        for name in HELD:
            if name in requests and strict_json.dumps(requests[name]) != strict_json.dumps(saved[name]):
                raise ConfigError(
                    f"quantization_config asks for {name}={requests[name]!r}, but the checkpoint is quantized with "
                    f"{name}={saved[name]!r}; leave it out to load the checkpoint as it is, or quantize the "
                    "full-precision model"
                )

    def _is_asked_for(self, name: str, value: Any) -> bool:
        """Given, or changed since."""
        return name in self.given or value != DEFAULTS[name]

    def _saved(self) -> dict[str, Any]:
        """Settings under their flat names in config.json."""
        return saved_values(self) | {n: v for name in NESTED for n, v in saved_values(getattr(self, name)).items()}

    def drop_data(self) -> None:
        """Forget dataset and processor objects and the journal; a preset's name stays, as a record."""
        self.dataset = self.dataset if isinstance(self.dataset, str) else None
        self.processor = None
        self.resume = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy that shares dataset and processor, which may be large or hold open files."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(self.__dict__)
        for name in ("overrides", "modules_to_not_convert"):
            value = getattr(self, name)
            setattr(copied, name, None if value is None else value.copy())
        copied.record = copy.deepcopy(self.record, memo)
        return copied

    def __eq__(self, other: object) -> bool:
        return isinstance(other, QVLMConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def _override(self, pattern: str) -> LinearChoice:
        value = (self.overrides or {})[pattern]
        if value is None or isinstance(value, str):
            return self._choice(value)
        if not isinstance(value, Mapping) or set(value) - {"scheme", "group_size", "symmetric"}:
            raise ConfigError(
                f"overrides[{pattern!r}] must be a scheme, None, or a dict with scheme, group_size, symmetric; "
                f"got {value!r}"
            )
        group_size = value.get("group_size", "auto")
        require(Group(), group_size, f"overrides[{pattern!r}]: group_size")
        symmetric = value.get("symmetric", self.symmetric)
        require(Switch(), symmetric, f"overrides[{pattern!r}]: symmetric")
        return self._choice(value.get("scheme", self.scheme), group_size, symmetric)

    def _validate(self) -> None:
        if isinstance(self.overrides, Mapping):
            self.overrides = dict(self.overrides)
        for entry in fields(Settings):
            require(declaration(entry).kind, getattr(self, entry.name), entry.name)
        keep = self.modules_to_not_convert
        self.modules_to_not_convert = None if keep is None else list(keep)
        require_agreement(self)
        self.options()

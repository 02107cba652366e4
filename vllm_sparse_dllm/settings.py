# SPDX-License-Identifier: Apache-2.0
"""Settings of the engine and parameters of a request: one table, one validator.

The engine's settings live in vLLM's ``additional_config["sparse_dllm"]``. A request may
override them in ``SamplingParams.extra_args`` (HTTP: ``vllm_xargs``) under the same names with
the prefix ``diffusion_``. Every message names the field, the value and what is allowed.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_sparse_dllm.denoise.traits import ModelTraits

CONFIG_KEY = "sparse_dllm"
REQUEST_PREFIX = "diffusion_"
#: Keys of a request's ``vllm_xargs`` that vLLM's front end reads itself.
_KEYS_OF_VLLM = frozenset({"session_id"})
#: Steps beyond one per position commit nothing; the bound keeps timetables small.
MAX_STEPS = 65536
_MAX_LENGTH = 1 << 24

CACHE_POLICIES = ("none", "prefix", "dual", "sparse")
REMASKING_RULES = (
    "low_confidence",
    "random",
    "maskgit_plus",
    "topk_margin",
    "entropy",
    "origin",
)
GRANULARITIES = ("token", "page")
#: The package's own; `cache.saliency` can register others.
SALIENCIES = ("paper", "attention", "window")
ATTENTION_BACKENDS = ("auto", "triton", "flash_attn", "xformers", "portable")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    try:
        return (_is_int(value) or isinstance(value, float)) and math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False


@dataclass(frozen=True)
class Field:
    """One setting: its allowed values, in words and as a check.

    Attributes:
        allowed: The allowed values in words, as in error messages and the README.
        check: Returns whether a value other than ``None`` is allowed.
        convert: Normalises an allowed value.
        nullable: Whether ``None`` is allowed; the string ``"none"`` then means the same.
        scope: ``"both"``, ``"engine"`` or ``"request"``.
    """

    allowed: str
    check: Callable[[Any], bool]
    convert: Callable[[Any], Any] = lambda value: value
    nullable: bool = False
    scope: str = "both"

    def parse(self, name: str, value: Any) -> Any:
        """Return the normalised value.

        Raises:
            ValueError: If the value is not allowed.
        """
        if self.nullable and (value is None or value == "none"):
            return None
        if value is None or not self.check(value):
            raise ValueError(f"{name} must be {self.allowed}, got {reprlib.repr(value)}")
        return self.convert(value)


def _one_of(names: tuple[str, ...], nullable: bool = False) -> Field:
    allowed = "one of " + ", ".join(names) + (", or null" if nullable else "")
    return Field(allowed, lambda v: isinstance(v, str) and v in names, nullable=nullable)


FIELDS: dict[str, Field] = {
    "cache_policy": _one_of(CACHE_POLICIES),
    "keep_ratio": Field("a number with 0 < r <= 1", lambda v: _is_real(v) and 0 < v <= 1, float),
    "kernel_size": Field(
        "an odd integer from 1 to 65535", lambda v: _is_int(v) and 1 <= v <= 65535 and v % 2 == 1
    ),
    "delay_steps": Field(
        f"an integer from 0 to {MAX_STEPS}", lambda v: _is_int(v) and 0 <= v <= MAX_STEPS
    ),
    "saliency": _one_of(SALIENCIES),
    "granularity": _one_of(GRANULARITIES),
    "eviction_delay": Field(
        f"an integer from 0 to {MAX_STEPS}", lambda v: _is_int(v) and 0 <= v <= MAX_STEPS
    ),
    "refresh_interval": Field(
        f"an integer from 1 to {MAX_STEPS}", lambda v: _is_int(v) and 1 <= v <= MAX_STEPS
    ),
    "suffix_window": Field(
        f"an integer from 0 to {_MAX_LENGTH}, or null",
        lambda v: _is_int(v) and 0 <= v <= _MAX_LENGTH,
        nullable=True,
    ),
    "block_length": Field(
        f"an integer from 1 to {_MAX_LENGTH}", lambda v: _is_int(v) and 1 <= v <= _MAX_LENGTH
    ),
    "steps": Field(
        f"an integer from 1 to {MAX_STEPS}, or null",
        lambda v: _is_int(v) and 1 <= v <= MAX_STEPS,
        nullable=True,
    ),
    "remasking": _one_of(REMASKING_RULES, nullable=True),
    "threshold": Field(
        "a number with 0 < t <= 1, or null",
        lambda v: _is_real(v) and 0 < v <= 1,
        float,
        nullable=True,
    ),
    "factor": Field("a number > 0, or null", lambda v: _is_real(v) and v > 0, float, nullable=True),
    "default_response_length": Field(
        "an integer >= 1", lambda v: _is_int(v) and v >= 1, scope="engine"
    ),
    "attention_backend": replace(_one_of(ATTENTION_BACKENDS), scope="engine"),
    "alg_temp": Field(
        "0, or a number from 1e-9 to 1e9",
        lambda v: _is_real(v) and (v == 0 or 1e-9 <= v <= 1e9),
        float,
        scope="request",
    ),
    "cfg_scale": Field(
        "a number with 0 <= w <= 1000",
        lambda v: _is_real(v) and 0 <= v <= 1000,
        float,
        scope="request",
    ),
    "canvas": Field(
        "a list of token ids, not empty",
        lambda v: isinstance(v, list | tuple) and len(v) > 0 and all(map(_is_int, v)),
        tuple,
        scope="request",
    ),
    "trace": Field("0, 1 or 2", lambda v: _is_int(v) and 0 <= v <= 2, scope="request"),
}


@dataclass(frozen=True)
class DecodingSettings:
    """How one response is denoised. Names and meanings as in the README's table.

    Attributes:
        cache_policy: Which keys a step sees.
        keep_ratio: Fraction of prefix and suffix keys that ``sparse`` keeps, 0 < r <= 1.
        kernel_size: Odd width of the max-pool over saliency (Sparse-dLLM, section 3.2).
        delay_steps: Full forwards of a block before the one that fills the sparse cache.
        saliency: What ``sparse`` ranks keys by.
        granularity: ``token`` selects single positions, ``page`` runs as long as a page.
        eviction_delay: Block steps that ``sparse`` runs on the whole cache before it evicts;
            0 evicts at the refresh.
        refresh_interval: Blocks that one refresh serves; a finished block's keys join the cache.
        suffix_window: Positions after the block that take part, or None for all.
        block_length: Positions of a block.
        steps: Denoising steps for the whole response, or None for one per masked position.
        remasking: Unmasking rule, or None for the model's own.
        threshold: Commit everything at least this probable (Fast-dLLM), or None.
        factor: Fast-dLLM's factor rule, or None.
        alg_temp: Temperature of the noise on the order of commits, 0 for none (Dream).
        cfg_scale: Classifier-free guidance weight, 0 for none (LLaDA).
        canvas: First token ids of the response: the mask id where the model is to write; other
            ids are fixed. None for masks only.
        trace: What is reported about decoding: 0 nothing, 1 the step and the confidence of each
            token, 2 also the positions kept after each change of the cache.
    """

    cache_policy: str = "sparse"
    keep_ratio: float = 0.5
    kernel_size: int = 3
    delay_steps: int = 1
    saliency: str = "paper"
    granularity: str = "token"
    eviction_delay: int = 0
    refresh_interval: int = 1
    suffix_window: int | None = None
    block_length: int = 32
    steps: int | None = None
    remasking: str | None = None
    threshold: float | None = None
    factor: float | None = None
    alg_temp: float = 0.0
    cfg_scale: float = 0.0
    canvas: tuple[int, ...] | None = None
    trace: int = 0

    @property
    def num_sequences(self) -> int:
        """Number of sequences a request runs: two under classifier-free guidance."""
        return 2 if self.cfg_scale > 0 else 1


@dataclass(frozen=True)
class EngineSettings:
    """The engine's defaults.

    Attributes:
        decoding: Settings of a request that overrides nothing.
        default_response_length: Response length when a request names no ``max_tokens``.
        attention_backend: Backend that computes attention; ``auto`` picks one for the device.
    """

    decoding: DecodingSettings = DecodingSettings()
    default_response_length: int = 256
    attention_backend: str = "auto"

    @classmethod
    def from_additional_config(cls, additional_config: Any) -> EngineSettings:
        """Read ``additional_config["sparse_dllm"]``.

        Raises:
            ValueError: On an unknown key, a bad value or a setting next to that key, not under it.
        """
        if not isinstance(additional_config, Mapping):
            raise ValueError(
                f"additional_config must be a mapping, got {type(additional_config).__name__}"
            )
        for key in map(str, additional_config):
            # Other plugins may have keys there, but none of these.
            beside = key in FIELDS and FIELDS[key].scope != "request"
            misspelt = key != CONFIG_KEY and key.lower().replace("-", "_") == CONFIG_KEY
            if beside or misspelt or key.startswith(REQUEST_PREFIX):
                raise ValueError(
                    f"additional_config[{key!r}] has no effect: settings go into "
                    f"additional_config[{CONFIG_KEY!r}]"
                )
        given = additional_config.get(CONFIG_KEY, {})
        if not isinstance(given, Mapping):
            raise ValueError(f"additional_config[{CONFIG_KEY!r}] must be a mapping, got {given!r}")
        values = _parse(given, scope="engine", prefix="")
        default_length = values.pop("default_response_length", cls.default_response_length)
        attention_backend = values.pop("attention_backend", cls.attention_backend)
        decoding = _consistent(replace(DecodingSettings(), **values), prefix="")
        return cls(decoding, default_length, attention_backend)


def request_settings(
    engine: EngineSettings, traits: ModelTraits, extra_args: Mapping[str, Any] | None
) -> DecodingSettings:
    """Merge a request's ``extra_args`` into the engine's settings.

    Raises:
        ValueError: On an unknown name, a bad value or values that exclude each other.
    """
    if extra_args is not None and not isinstance(extra_args, Mapping):
        raise ValueError(f"vllm_xargs must be an object, got {reprlib.repr(extra_args)}")
    given: dict[str, Any] = {}
    for key, value in (extra_args or {}).items():
        if key in _KEYS_OF_VLLM:
            continue
        name = str(key).removeprefix(REQUEST_PREFIX)
        if name == key or not isinstance(key, str):
            raise ValueError(
                f"{key!r} is not a parameter of this model; allowed: {_names('request')}"
            )
        given[name] = value
    values = _parse(given, scope="request", prefix=REQUEST_PREFIX)
    settings = replace(engine.decoding, **values)
    if settings.remasking is None:
        settings = replace(settings, remasking=traits.default_remasking)
    settings = _consistent(settings, prefix=REQUEST_PREFIX)
    if settings.cfg_scale > 0 and not traits.supports_guidance:
        raise ValueError(
            f"{REQUEST_PREFIX}cfg_scale must be 0 for {traits.family} models, "
            f"got {settings.cfg_scale}"
        )
    return settings


def allow_saliencies(names: Iterable[str]) -> None:
    """Set the allowed saliencies; `cache.saliency` calls it when its registry changes."""
    FIELDS["saliency"] = _one_of(tuple(names))


def _names(scope: str) -> str:
    prefix = REQUEST_PREFIX if scope == "request" else ""
    return ", ".join(prefix + n for n, f in FIELDS.items() if f.scope in ("both", scope))


def _parse(given: Mapping[str, Any], *, scope: str, prefix: str) -> dict[str, Any]:
    parsed: dict[str, Any] = {}
    for name, value in given.items():
        field = FIELDS.get(name)
        if field is None or field.scope not in ("both", scope):
            raise ValueError(f"unknown setting {prefix}{name}; allowed: {_names(scope)}")
        parsed[name] = field.parse(prefix + name, value)
    return parsed


def _consistent(settings: DecodingSettings, prefix: str) -> DecodingSettings:
    if settings.threshold is not None and settings.factor is not None:
        raise ValueError(
            f"{prefix}threshold and {prefix}factor exclude each other, got "
            f"{settings.threshold} and {settings.factor}; set one of them to null"
        )
    if settings.alg_temp > 0:
        if settings.threshold is not None or settings.factor is not None:
            raise ValueError(
                f"{prefix}alg_temp must be 0 with {prefix}threshold or {prefix}factor, "
                f"got {settings.alg_temp}"
            )
        if settings.remasking == "origin":
            raise ValueError(
                f"{prefix}alg_temp must be 0 with {prefix}remasking origin, got {settings.alg_temp}"
            )
    return settings


_unlisted = {f.name for f in fields(DecodingSettings)} - FIELDS.keys()
if _unlisted:
    raise AssertionError(f"settings without a validator: {_unlisted}")

# SPDX-License-Identifier: Apache-2.0
"""Settings: good and bad values of every field, both scopes, and conflicting settings."""

from __future__ import annotations

import ast
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.helpers import traits_of
from vllm_sparse_dllm.settings import (
    ATTENTION_BACKENDS,
    CACHE_POLICIES,
    CONFIG_KEY,
    FIELDS,
    GRANULARITIES,
    REMASKING_RULES,
    REQUEST_PREFIX,
    SALIENCIES,
    DecodingSettings,
    EngineSettings,
    request_settings,
)

LLADA, DREAM = traits_of("llada"), traits_of("dream")
BOTH = pytest.mark.parametrize("traits", [LLADA, DREAM], ids=["llada", "dream"])

NAMES = ["cache_policy", "saliency", "granularity", "remasking", "attention_backend"]
INTEGERS = [
    *("kernel_size", "delay_steps", "eviction_delay", "refresh_interval", "suffix_window"),
    *("block_length", "steps", "default_response_length", "trace"),
]
REALS = ["keep_ratio", "threshold", "factor", "alg_temp", "cfg_scale"]
LISTS = ["canvas"]
NULLABLE = ["suffix_window", "steps", "remasking", "threshold", "factor"]

GOOD: dict[str, list[Any]] = {
    "cache_policy": list(CACHE_POLICIES),
    "keep_ratio": [1e-9, 0.5, 1, 1.0],
    "kernel_size": [1, 3, 99],
    "delay_steps": [0, 1, 7],
    "saliency": list(SALIENCIES),
    "granularity": list(GRANULARITIES),
    "eviction_delay": [0, 1, 7, 65536],
    "refresh_interval": [1, 2, 65536],
    "suffix_window": [0, 1, 4096, 16777216],
    "block_length": [1, 32, 4096],
    "steps": [1, 64],
    "remasking": list(REMASKING_RULES),
    "threshold": [1e-9, 0.9, 1, 1.0],
    "factor": [1e-9, 1, 2.5],
    "default_response_length": [1, 512],
    "attention_backend": list(ATTENTION_BACKENDS),
    "alg_temp": [0, 0.0, 0.2, 3],
    "cfg_scale": [0, 0.0, 1, 1.5],
    "canvas": [(3,), (0, 5, 2**40, -1)],
    "trace": [0, 1, 2],
}

#: Each must be refused. Nothing is converted: "3", 3.0 and True are not the integer 3.
NOT_A_REAL: list[Any] = ["0.5", "", True, False, math.nan, math.inf, -math.inf, [0.5], {}, 1j]
NOT_AN_INTEGER: list[Any] = ["3", "", True, False, 3.0, 0.5, math.nan, math.inf, [3], {}]
BAD: dict[str, list[Any]] = {
    "cache_policy": ["", "Sparse", "paged", 0, True, ["sparse"]],
    "keep_ratio": [*NOT_A_REAL, 0, 0.0, -0.5, 1.0000001, 2],
    "kernel_size": [*NOT_AN_INTEGER, 0, -1, -3, 2, 4],
    "delay_steps": [*NOT_AN_INTEGER, -1],
    "saliency": ["", "Paper", "none", 1, True, ["paper"]],
    "granularity": ["", "tokens", "none", 1, True, ["page"]],
    "eviction_delay": [*NOT_AN_INTEGER, -1, 65537],
    "refresh_interval": [*NOT_AN_INTEGER, 0, -1, 65537],
    "suffix_window": [*NOT_AN_INTEGER, -1, 16777217],
    "block_length": [*NOT_AN_INTEGER, 0, -32],
    "steps": [*NOT_AN_INTEGER, 0, -1],
    "remasking": ["", "confidence", "Entropy", 0, True, ["entropy"]],
    "threshold": [*NOT_A_REAL, 0, 0.0, -0.1, 1.1],
    "factor": [*NOT_A_REAL, 0, 0.0, -1],
    "default_response_length": [*NOT_AN_INTEGER, 0, -1],
    "attention_backend": ["", "cpu", "FLASH_ATTN", "none", 0, True, ["triton"]],
    "alg_temp": [*NOT_A_REAL, -0.1],
    "cfg_scale": [*NOT_A_REAL, -1],
    "canvas": ["", "1 2", True, 3, 0.5, [], (), {}, [0.5], [3, True], [3, "4"], [None], [[3]]],
    "trace": [*NOT_AN_INTEGER, -1, 3],
}

#: The part of each error message that says what is allowed, as in the README's table.
ALLOWED = {
    "cache_policy": "one of none, prefix, dual, sparse",
    "keep_ratio": "a number with 0 < r <= 1",
    "kernel_size": "an odd integer from 1 to 65535",
    "delay_steps": "an integer from 0 to 65536",
    "saliency": "one of paper, attention, window",
    "granularity": "one of token, page",
    "eviction_delay": "an integer from 0 to 65536",
    "refresh_interval": "an integer from 1 to 65536",
    "suffix_window": "an integer from 0 to 16777216, or null",
    "block_length": "an integer from 1 to 16777216",
    "steps": "an integer from 1 to 65536, or null",
    "remasking": "one of low_confidence, random, maskgit_plus, topk_margin, entropy, origin, "
    "or null",
    "threshold": "a number with 0 < t <= 1, or null",
    "factor": "a number > 0, or null",
    "default_response_length": "an integer >= 1",
    "attention_backend": "one of auto, triton, flash_attn, xformers, portable",
    "alg_temp": "0, or a number from 1e-9 to 1e9",
    "cfg_scale": "a number with 0 <= w <= 1000",
    "canvas": "a list of token ids, not empty",
    "trace": "0, 1 or 2",
}


def engine(**values: Any) -> EngineSettings:
    return EngineSettings.from_additional_config({CONFIG_KEY: values})


def request(engine_values: dict[str, Any] | None = None, **values: Any) -> DecodingSettings:
    return request_settings(
        engine(**engine_values or {}), LLADA, {REQUEST_PREFIX + k: v for k, v in values.items()}
    )


def in_scope(name: str, scope: str) -> bool:
    return FIELDS[name].scope in ("both", scope)


GOOD_PAIRS = [(n, v) for n, values in GOOD.items() for v in values]
BAD_PAIRS = [(n, v) for n, values in BAD.items() for v in values]
ENGINE_ONLY = ["default_response_length", "attention_backend"]
REQUEST_ONLY = ["alg_temp", "cfg_scale", "canvas", "trace"]


def test_the_tables_of_this_file_have_every_field() -> None:
    assert GOOD.keys() == BAD.keys() == ALLOWED.keys() == FIELDS.keys()
    assert sorted(NAMES + INTEGERS + REALS + LISTS) == sorted(FIELDS)
    assert sorted(NULLABLE) == sorted(n for n, f in FIELDS.items() if f.nullable)
    assert [n for n, f in FIELDS.items() if f.scope == "engine"] == ENGINE_ONLY
    assert [n for n, f in FIELDS.items() if f.scope == "request"] == REQUEST_ONLY


def test_defaults_are_those_of_the_public_interface() -> None:
    defaults = engine()
    assert defaults.default_response_length == 256
    assert defaults.attention_backend == "auto"
    assert defaults.decoding == DecodingSettings(
        cache_policy="sparse",
        keep_ratio=0.5,
        kernel_size=3,
        delay_steps=1,
        saliency="paper",
        granularity="token",
        eviction_delay=0,
        refresh_interval=1,
        suffix_window=None,
        block_length=32,
        steps=None,
        remasking=None,
        threshold=None,
        factor=None,
        alg_temp=0.0,
        cfg_scale=0.0,
        canvas=None,
    )
    assert EngineSettings.from_additional_config({}) == defaults
    assert EngineSettings.from_additional_config({"other_plugin": 1}) == defaults


@pytest.mark.parametrize(("name", "value"), GOOD_PAIRS)
def test_good_values_of_the_engine(name: str, value: Any) -> None:
    if not in_scope(name, "engine"):
        with pytest.raises(ValueError, match=f"unknown setting {name}; allowed: "):
            engine(**{name: value})
        return
    settings = engine(**{name: value})
    got = getattr(settings if name in ENGINE_ONLY else settings.decoding, name)
    assert got == value
    assert isinstance(got, float) == (name in REALS)


@pytest.mark.parametrize(("name", "value"), GOOD_PAIRS)
def test_good_values_of_a_request(name: str, value: Any) -> None:
    if not in_scope(name, "request"):
        with pytest.raises(ValueError, match=f"unknown setting diffusion_{name}; allowed: "):
            request(**{name: value})
        return
    got = getattr(request(**{name: value}), name)
    assert got == value
    assert isinstance(got, float) == (name in REALS)


@pytest.mark.parametrize("scope", ["engine", "request"])
@pytest.mark.parametrize(("name", "value"), BAD_PAIRS)
def test_bad_values_are_refused_by_name(scope: str, name: str, value: Any) -> None:
    if not in_scope(name, scope):
        return
    with pytest.raises(ValueError) as error:
        (engine if scope == "engine" else request)(**{name: value})
    prefix = REQUEST_PREFIX if scope == "request" else ""
    assert str(error.value) == f"{prefix}{name} must be {ALLOWED[name]}, got {value!r}"


@pytest.mark.parametrize("name", REALS)
def test_integers_beyond_floats_are_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"diffusion_{name} must be"):
        request(**{name: 10**400})


@pytest.mark.parametrize("null", [None, "none"])
@pytest.mark.parametrize("name", NULLABLE)
def test_null_of_a_request_undoes_the_engine(name: str, null: Any) -> None:
    other = {
        "suffix_window": 8,
        "steps": 16,
        "remasking": "random",
        "threshold": 0.5,
        "factor": 2.0,
    }[name]
    settings = request({name: other}, **{name: null})
    assert getattr(settings, name) == (LLADA.default_remasking if name == "remasking" else None)
    assert getattr(request({name: other}), name) == other


@pytest.mark.parametrize("name", [n for n in FIELDS if n not in NULLABLE and n not in ENGINE_ONLY])
def test_null_is_refused_where_it_means_nothing(name: str) -> None:
    with pytest.raises(ValueError, match=f"diffusion_{name} must be .*, got None"):
        request(**{name: None})
    if name == "cache_policy":
        assert request(cache_policy="none").cache_policy == "none"
    else:
        with pytest.raises(ValueError, match=f"diffusion_{name} must be .*, got 'none'"):
            request(**{name: "none"})


@pytest.mark.parametrize("name", ["cache_polcy", "", "diffusion_steps", "temperature"])
def test_unknown_names_of_the_engine(name: str) -> None:
    with pytest.raises(ValueError, match=f"unknown setting {name}; allowed: cache_policy, ") as e:
        engine(**{name: 1})
    assert "default_response_length" in str(e.value)
    assert "cfg_scale" not in str(e.value)


@pytest.mark.parametrize("key", ["diffusion_step", "diffusion_", "diffusion_diffusion_steps"])
def test_unknown_names_of_a_request(key: str) -> None:
    with pytest.raises(ValueError, match=f"unknown setting {key}; allowed: diffusion_cache_") as e:
        request_settings(engine(), LLADA, {key: 1})
    assert "diffusion_cfg_scale" in str(e.value)
    assert "default_response_length" not in str(e.value)


@pytest.mark.parametrize("key", ["steps", "threshold", "Diffusion_steps", "kv_transfer_params"])
def test_names_without_the_prefix_are_refused(key: str) -> None:
    message = f"^'{key}' is not a parameter of this model; allowed: diffusion_cache_policy, "
    with pytest.raises(ValueError, match=message):
        request_settings(engine(), LLADA, {key: 1})


@pytest.mark.parametrize("given", ["x", [1], 5])
def test_parameters_must_be_an_object(given: Any) -> None:
    with pytest.raises(ValueError, match=r"vllm_xargs must be an object, got "):
        request_settings(engine(), LLADA, given)


def test_what_vllms_front_end_reads_is_left_to_it() -> None:
    given = {"session_id": "one", "diffusion_keep_ratio": 0.25}
    assert request_settings(engine(), LLADA, given).keep_ratio == 0.25


@pytest.mark.parametrize("config", [None, [], "sparse", 3])
def test_additional_config_must_be_a_mapping(config: Any) -> None:
    with pytest.raises(ValueError, match="additional_config must be a mapping"):
        EngineSettings.from_additional_config(config)
    with pytest.raises(ValueError, match=r"additional_config\['sparse_dllm'\] must be a mapping"):
        EngineSettings.from_additional_config({CONFIG_KEY: config})


BESIDE = [name for name in FIELDS if name not in REQUEST_ONLY]


@pytest.mark.parametrize("key", [*BESIDE, "diffusion_steps", "sparse-dllm", "Sparse_dLLM"])
def test_settings_that_lie_beside_their_key_are_refused(key: str) -> None:
    message = rf"^additional_config\['{key}'\] has no effect: settings go into .*sparse_dllm"
    with pytest.raises(ValueError, match=message):
        EngineSettings.from_additional_config({key: 1, CONFIG_KEY: {}})


@pytest.mark.parametrize("key", [*REQUEST_ONLY, "sparse", "dllm", 7])
def test_what_else_lies_there_is_for_others(key: Any) -> None:
    assert EngineSettings.from_additional_config({key: 1}) == EngineSettings()


@BOTH
def test_the_rule_defaults_to_the_models_own(traits: Any) -> None:
    assert request_settings(engine(), traits, None).remasking == traits.default_remasking
    assert request_settings(engine(), traits, {}).remasking == traits.default_remasking
    asked = request_settings(engine(remasking="topk_margin"), traits, {})
    assert asked.remasking == "topk_margin"


def test_threshold_and_factor_exclude_each_other() -> None:
    message = "^threshold and factor exclude each other, got 0.9 and 2.0; set one of them to null"
    with pytest.raises(ValueError, match=message):
        engine(threshold=0.9, factor=2)
    for engine_values, values in (
        ({}, {"threshold": 0.9, "factor": 2}),
        ({"threshold": 0.9}, {"factor": 2}),
        ({"factor": 2}, {"threshold": 0.9}),
    ):
        with pytest.raises(ValueError, match="^diffusion_threshold and diffusion_factor exclude"):
            request(engine_values, **values)
    assert request({"threshold": 0.9}, factor=2, threshold="none").factor == 2


@pytest.mark.parametrize(
    "values", [{"threshold": 0.9}, {"factor": 1.0}, {"remasking": "origin"}], ids=str
)
def test_alg_temp_excludes(values: dict[str, Any]) -> None:
    for engine_values, own in (({}, values), (values, {})):
        with pytest.raises(ValueError, match="diffusion_alg_temp must be 0 with .*, got 0.5"):
            request(engine_values, alg_temp=0.5, **own)
        assert request(engine_values, alg_temp=0, **own).alg_temp == 0


def test_guidance_is_for_llada() -> None:
    assert request(cfg_scale=1).num_sequences == 2
    assert request(cfg_scale=0).num_sequences == request().num_sequences == 1
    message = "^diffusion_cfg_scale must be 0 for Dream models, got 1.5"
    with pytest.raises(ValueError, match=message):
        request_settings(engine(), DREAM, {"diffusion_cfg_scale": 1.5})
    assert request_settings(engine(), DREAM, {"diffusion_cfg_scale": 0}).cfg_scale == 0


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**6), 10**6),
    st.floats(),
    st.sampled_from([*CACHE_POLICIES, *REMASKING_RULES, *GRANULARITIES, "", "0.5"]),
    st.lists(st.integers(), max_size=2),
)


@given(st.dictionaries(st.sampled_from(sorted(FIELDS)), ANYTHING, max_size=5))
def test_a_request_is_merged_or_refused_with_its_name(values: dict[str, Any]) -> None:
    try:
        settings = request(**values)
    except ValueError as error:
        assert any(f"diffusion_{name}" in str(error) for name in values)
        return
    for name in FIELDS:
        if name in ENGINE_ONLY:
            continue
        expected = getattr(engine().decoding, name)
        if name in values:
            null = name in NULLABLE and values[name] in (None, "none")
            expected = None if null else values[name]
            expected = tuple(expected) if isinstance(expected, list) else expected
        if name == "remasking" and expected is None:
            expected = "low_confidence"
        assert getattr(settings, name) == expected


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_numbers_are_finite_and_in_range(value: float) -> None:
    for name, inside in {
        "keep_ratio": 0 < value <= 1,
        "threshold": 0 < value <= 1,
        "factor": 0 < value < math.inf,
        "alg_temp": value == 0 or 1e-9 <= value <= 1e9,
        "cfg_scale": 0 <= value <= 1000,
    }.items():
        if inside:
            assert getattr(request(**{name: value}), name) == value
        else:
            with pytest.raises(ValueError, match=f"diffusion_{name} must be"):
                request(**{name: value})


def test_opencompass_pins_what_a_server_may_have_set() -> None:
    """Otherwise the benchmark of the published method would measure a server's own settings."""
    path = Path(__file__).parents[2] / "examples" / "opencompass" / "served.py"
    (call,) = (
        node.value
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "paper"
    )
    assert isinstance(call, ast.Call)
    extra = {str(one.arg): ast.literal_eval(one.value) for one in call.keywords}
    both = {REQUEST_PREFIX + name for name, field in FIELDS.items() if field.scope == "both"}
    # Each configuration adds the unmasking rule.
    assert extra.keys() == both - {f"{REQUEST_PREFIX}remasking"}
    others = {"cache_policy": "dual", "saliency": "window", "factor": 2.0, "suffix_window": 4}
    settings = request_settings(engine(**others), LLADA, extra)
    assert settings == request_settings(engine(), LLADA, {})

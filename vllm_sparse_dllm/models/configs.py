# SPDX-License-Identifier: Apache-2.0
"""Configurations of the public checkpoints, read without remote code.

The classes keep the field names of the checkpoints' ``config.json`` and map vLLM's names onto
them. `model_traits` returns what the decoding code needs from a configuration.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from vllm_sparse_dllm.denoise.sampling import CategoricalSampler, GumbelSampler
from vllm_sparse_dllm.denoise.timetable import EvenSchedule, LinearTimeSchedule
from vllm_sparse_dllm.denoise.traits import ModelTraits

LLADA_ARCHITECTURE = "LLaDAModelLM"
DREAM_ARCHITECTURE = "DreamModel"


class _RotaryConfig(PreTrainedConfig):
    """A configuration whose rotary base has two names, which always agree.

    Checkpoints call it ``rope_theta``; transformers 5 keeps it in ``rope_parameters``, of which
    ``rope_scaling`` is an alias. A ``config.json`` or an override can use any of these names.
    """

    def __init__(self, rope_theta: float, **kwargs: Any) -> None:
        parameters = kwargs.pop("rope_parameters", None)
        scaling = kwargs.pop("rope_scaling", None)
        if isinstance(parameters, dict) and isinstance(scaling, dict):
            scaling = {**parameters, **scaling}
        self._rope_theta = rope_theta
        self.rope_parameters = scaling or parameters
        super().__init__(**kwargs)
        # For an override of `rope_parameters` that names no base.
        self._rope_theta = self.rope_theta

    @property
    def rope_theta(self) -> float:
        parameters = self.rope_parameters
        given = parameters.get("rope_theta") if isinstance(parameters, dict) else None
        return self._rope_theta if given is None else given

    @rope_theta.setter
    def rope_theta(self, value: float) -> None:
        self._rope_theta = value
        self.rope_parameters = {**(self.rope_parameters or {}), "rope_theta": value}


class LLaDAConfig(_RotaryConfig):
    """LLaDA-8B Base / Instruct and LLaDA-1.5 (``model_type: llada``).

    LLaDA-MoE uses the same ``model_type``; it is distinguished by ``architectures``.
    """

    model_type = "llada"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "num_hidden_layers": "n_layers",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
    }

    def __init__(
        self,
        d_model: int = 4096,
        n_heads: int = 32,
        n_kv_heads: int | None = None,
        n_layers: int = 32,
        mlp_hidden_size: int | None = None,
        mlp_ratio: int = 4,
        vocab_size: int = 126464,
        embedding_size: int | None = None,
        max_sequence_length: int = 4096,
        rope: bool = True,
        rope_theta: float = 500000.0,
        rope_full_precision: bool = True,
        rms_norm_eps: float = 1e-5,
        layer_norm_type: str = "rms",
        layer_norm_with_affine: bool = True,
        activation_type: str = "silu",
        block_type: str = "llama",
        block_group_size: int = 1,
        include_bias: bool = False,
        include_qkv_bias: bool | None = False,
        bias_for_layer_norm: bool | None = False,
        attention_layer_norm: bool = False,
        multi_query_attention: bool | None = None,
        alibi: bool = False,
        clip_qkv: float | None = None,
        input_emb_norm: bool = False,
        scale_logits: bool = False,
        weight_tying: bool = False,
        mask_token_id: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.d_model = d_model
        self.n_heads = n_heads
        if n_kv_heads is None:
            n_kv_heads = 1 if multi_query_attention else n_heads
        self.n_kv_heads = n_kv_heads
        self.n_layers = n_layers
        self.mlp_ratio = mlp_ratio
        self.mlp_hidden_size = mlp_ratio * d_model if mlp_hidden_size is None else mlp_hidden_size
        self.vocab_size = vocab_size
        # Rows of the embedding table; more than the vocabulary where it is padded.
        self.embedding_size = vocab_size if embedding_size is None else embedding_size
        self.max_sequence_length = max_sequence_length
        self.rope = rope
        self.rope_full_precision = rope_full_precision
        self.rms_norm_eps = rms_norm_eps
        self.layer_norm_type = layer_norm_type
        self.layer_norm_with_affine = layer_norm_with_affine
        self.activation_type = activation_type
        self.block_type = block_type
        self.block_group_size = block_group_size
        self.include_bias = include_bias
        self.include_qkv_bias = include_qkv_bias
        self.bias_for_layer_norm = bias_for_layer_norm
        self.attention_layer_norm = attention_layer_norm
        self.multi_query_attention = multi_query_attention
        self.alibi = alibi
        self.clip_qkv = clip_qkv
        self.input_emb_norm = input_emb_norm
        self.scale_logits = scale_logits
        self.weight_tying = weight_tying
        self.mask_token_id = mask_token_id
        kwargs.setdefault("tie_word_embeddings", weight_tying)
        kwargs.update(eos_token_id=eos_token_id, pad_token_id=pad_token_id)
        super().__init__(rope_theta, **kwargs)


class DreamConfig(_RotaryConfig):
    """Dream-v0 Base / Instruct 7B and Dream-Coder (``model_type: Dream``)."""

    model_type = "Dream"

    def __init__(
        self,
        vocab_size: int = 152064,
        hidden_size: int = 3584,
        intermediate_size: int = 18944,
        num_hidden_layers: int = 28,
        num_attention_heads: int = 28,
        num_key_value_heads: int | None = 4,
        hidden_act: str = "silu",
        max_position_embeddings: int = 131072,
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 1000000.0,
        use_sliding_window: bool = False,
        sliding_window: int | None = None,
        tie_word_embeddings: bool = False,
        mask_token_id: int | None = None,
        pad_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = (
            num_attention_heads if num_key_value_heads is None else num_key_value_heads
        )
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.use_sliding_window = use_sliding_window
        # vLLM takes a `sliding_window` that is set as one in use.
        self.sliding_window = sliding_window if use_sliding_window else None
        self.mask_token_id = mask_token_id
        # Read where tokenizer_config.json names no class.
        kwargs["tokenizer_class"] = kwargs.get("tokenizer_class") or "DreamTokenizer"
        kwargs.update(tie_word_embeddings=tie_word_embeddings, pad_token_id=pad_token_id)
        super().__init__(rope_theta, **kwargs)


def _require(config: PreTrainedConfig, name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        choices = " or ".join(repr(v) for v in allowed)
        raise ValueError(
            f"config.json of this {config.model_type} checkpoint sets {name}={value!r}, "
            f"which is not supported; it must be {choices}"
        )


def _require_sizes(config: PreTrainedConfig, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"config.json sets {name}={value!r}; it must be an integer >= 1")


def check_llada_config(config: LLaDAConfig) -> None:
    """Reject a configuration that this package's LLaDA model does not support.

    Raises:
        ValueError: Naming the field, its value and what is supported.
    """
    for name, allowed in {
        "block_type": ("llama",),
        "block_group_size": (1,),
        "rope": (True,),
        "alibi": (False,),
        "layer_norm_type": ("rms",),
        "layer_norm_with_affine": (True,),
        "activation_type": ("silu", "swiglu"),
        "include_bias": (False,),
        "bias_for_layer_norm": (False, None),
        "attention_layer_norm": (False,),
        "clip_qkv": (None,),
        "input_emb_norm": (False,),
        "scale_logits": (False,),
    }.items():
        _require(config, name, getattr(config, name), allowed)
    sizes = ("d_model", "n_heads", "n_kv_heads", "n_layers", "mlp_hidden_size", "vocab_size")
    _require_sizes(config, *sizes)
    _check_common(config)


def check_dream_config(config: DreamConfig) -> None:
    """Reject a configuration that this package's Dream model does not support.

    Raises:
        ValueError: Naming the field, its value and what is supported.
    """
    _require(config, "hidden_act", config.hidden_act, ("silu",))
    _require(config, "use_sliding_window", config.use_sliding_window, (False,))
    _require_sizes(
        config,
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "num_hidden_layers",
        "intermediate_size",
        "vocab_size",
    )
    _check_common(config)


def _check_rotary(config: _RotaryConfig) -> None:
    """Refuse rotary positions that are scaled, partial, or different from layer to layer."""
    parameters = config.rope_parameters or {}
    plain = isinstance(parameters, dict) and not any(
        isinstance(value, dict) for value in parameters.values()
    )
    kind = parameters.get("rope_type", parameters.get("type", "default")) if plain else None
    if kind != "default" or parameters.get("partial_rotary_factor") not in (None, 1):
        raise ValueError(
            f"this {config.model_type} checkpoint, or an override, sets rope_parameters "
            f"(rope_scaling) to {parameters!r}, which is not supported; rope_type must be "
            "'default', with no partial_rotary_factor"
        )
    base = config.rope_theta
    if isinstance(base, bool) or not isinstance(base, int | float) or not 0 < base < math.inf:
        raise ValueError(f"config.json sets rope_theta={base!r}; it must be a number above 0")


def _check_common(config: _RotaryConfig) -> None:
    _check_rotary(config)
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"config.json: hidden size {config.hidden_size} must be a multiple of the "
            f"{config.num_attention_heads} attention heads"
        )
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"config.json: {config.num_attention_heads} attention heads must be a multiple of "
            f"the {config.num_key_value_heads} key/value heads"
        )
    rows = getattr(config, "embedding_size", config.vocab_size)
    if rows < config.vocab_size:
        raise ValueError(
            f"config.json: embedding_size={rows} must be at least vocab_size={config.vocab_size}"
        )
    mask = config.mask_token_id
    if not isinstance(mask, int) or not 0 <= mask < config.vocab_size:
        raise ValueError(
            f"config.json sets mask_token_id={mask!r}; it must be a token id below "
            f"vocab_size={config.vocab_size}"
        )


def model_traits(config: PreTrainedConfig) -> ModelTraits:
    """Return what the decoding code has to know about a checkpoint."""
    if isinstance(config, DreamConfig):
        assert config.mask_token_id is not None
        return ModelTraits(
            family="Dream",
            mask_token_id=config.mask_token_id,
            default_remasking="entropy",
            schedule=LinearTimeSchedule(),
            sampler=CategoricalSampler(),
            shifts_logits=True,
            supports_guidance=False,
        )
    return ModelTraits(
        family="LLaDA",
        mask_token_id=config.mask_token_id,
        default_remasking="low_confidence",
        schedule=EvenSchedule(),
        sampler=GumbelSampler(),
        shifts_logits=False,
        supports_guidance=True,
    )


def check_config(config: PreTrainedConfig) -> None:
    """Reject a configuration that this package's models do not support.

    Raises:
        ValueError: Naming the field, its value and what is supported.
    """
    if isinstance(config, DreamConfig):
        check_dream_config(config)
    elif isinstance(config, LLaDAConfig):
        check_llada_config(config)
    else:
        raise ValueError(
            f"the configuration of a diffusion model must be LLaDA's or Dream's, got "
            f"{type(config).__name__}; leave trust_remote_code off"
        )

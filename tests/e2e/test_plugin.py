# SPDX-License-Identifier: Apache-2.0
"""The plugin in vLLM: other models are unaffected, and bad input is refused at start."""

from __future__ import annotations

import gc
import gzip
import json
import os
import pickle
import shutil
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.engine.arg_utils import EngineArgs

from tests.e2e.server import clean_environment, run_program, tiny_llada
from tests.engines import generate, running_engine, sampling, scheduler_of
from tests.reference import generate as reference
from tests.reference import load, write_checkpoint
from vllm_sparse_dllm.kernels import native
from vllm_sparse_dllm.models import cpu_products

SMALL: dict[str, Any] = {"d_model": 64, "layers": 2, "heads": 2, "mlp": 96, "vocab": 128}
PROMPT = [7, 3, 20, 21, 9, 50, 11]
PROMPTS = [[5, 9, 33, 2], [17, 40, 3, 3, 8, 61], [90]]


@pytest.fixture(scope="module")
def llada(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("llada"), "llada", **SMALL)


@pytest.fixture(scope="module")
def dream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("dream"), "dream", **SMALL)


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Path], Path]:
    """Return a function that copies a checkpoint, so that a test can damage it."""
    return lambda source: Path(shutil.copytree(source, tmp_path / "checkpoint"))


def config_of(model: Path, **options: Any) -> Any:
    """Return vLLM's configuration of a model, made as at an engine's start."""
    args = EngineArgs(str(model), skip_tokenizer_init=True, dtype="float32", **options)
    return args.create_engine_config()


def edit_config(model: Path, **fields: Any) -> None:
    """Change fields of config.json; ``...`` removes one."""
    path = model / "config.json"
    config = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


# (a) and (b): the plugin is not loaded, or runs beside other models.


def test_plugin_stays_out_when_not_listed() -> None:
    """Without the plugin, vLLM and transformers do not know the model, and say so."""
    code = """
import sys
from vllm.engine.arg_utils import EngineArgs
try:
    EngineArgs(sys.argv[1]).create_engine_config()
except Exception as error:
    print("refused:", *str(error).split())
assert "vllm_sparse_dllm" not in sys.modules
"""
    environment = clean_environment(VLLM_PLUGINS="none_such")
    output = run_program([sys.executable, "-c", code, str(tiny_llada())], environment=environment)
    (refusal,) = [line for line in output.splitlines() if line.startswith("refused: ")]
    assert "llada" in refusal and "does not recognize" in refusal


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama, with all ids in use and no generation config of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=128,
        max_position_embeddings=512,
        initializer_range=0.4,
    )
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(path)
    return path


ORDINARY = {"enforce_eager": True, "max_num_batched_tokens": 512}
_ORDINARY_PROGRAM = """
import json, sys
from tests.engines import generate, running_engine, sampling
model, options, prompts = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
with running_engine(model, **options) as llm:
    defaults = llm.get_default_sampling_params()
    print(json.dumps({
        "tokens": generate(llm, prompts, [sampling(24)] * len(prompts)),
        "temperature": defaults.temperature,
        "max_tokens": defaults.max_tokens,
    }))
assert "vllm_sparse_dllm.plugin" not in sys.modules
"""


def test_ordinary_models_are_untouched(ordinary: Path, llada: Path) -> None:
    """An ordinary model, a diffusion model and the ordinary one again, in one process.

    The ordinary one gives the tokens, and has the defaults, of a vLLM without the plugin.
    """
    arguments = (str(ordinary), json.dumps(ORDINARY), json.dumps(PROMPTS))
    output = run_program(
        [sys.executable, "-c", _ORDINARY_PROGRAM, *arguments],
        environment=clean_environment(VLLM_PLUGINS="none_such"),
    )
    (line,) = [line for line in output.splitlines() if line.startswith('{"tokens"')]
    without = json.loads(line)
    assert (without["temperature"], without["max_tokens"]) == (1.0, 16)

    def with_plugin() -> dict[str, Any]:
        with running_engine(str(ordinary), **ORDINARY) as llm:
            scheduler = llm.llm_engine.engine_core.engine_core.scheduler
            assert "vllm_sparse_dllm" not in type(scheduler).__module__
            # Admission checks requests of diffusion models only.
            foreign = sampling(8, min_p=0.1, presence_penalty=0.5, diffusion_steps=-1)
            assert len(generate(llm, PROMPTS[:1], [foreign])[0]) == 8
            defaults = llm.get_default_sampling_params()
            return {
                "tokens": generate(llm, PROMPTS, [sampling(24)] * len(PROMPTS)),
                "temperature": defaults.temperature,
                "max_tokens": defaults.max_tokens,
            }

    assert with_plugin() == without
    with running_engine(str(llada)) as llm:
        expected = reference(load(llada), PROMPT, 16)
        assert generate(llm, [PROMPT], [sampling(16)]) == [expected]
        defaults = llm.get_default_sampling_params()
        assert (defaults.temperature, defaults.max_tokens) == (0.0, 256)
    assert with_plugin() == without


# (c) Engine settings.

BAD_ENGINE_SETTINGS = [
    ("cache_policy", "lru"),
    ("cache_policy", None),
    ("keep_ratio", 0),
    ("keep_ratio", 1.5),
    ("keep_ratio", "half"),
    ("kernel_size", 2),
    ("kernel_size", 0),
    ("delay_steps", -1),
    ("delay_steps", 1.5),
    ("granularity", "line"),
    ("saliency", "best"),
    ("block_length", 0),
    ("block_length", "32"),
    ("block_length", True),
    ("steps", 0),
    ("remasking", "best"),
    ("threshold", 0),
    ("threshold", 1.1),
    ("factor", 0),
    ("default_response_length", 0),
    ("default_response_length", None),
    ("alg_temp", 0.5),
    ("cfg_scale", 1.0),
    ("diffusion_steps", 4),
    ("cash_policy", "dual"),
]


@pytest.mark.parametrize(("name", "value"), BAD_ENGINE_SETTINGS)
def test_bad_engine_setting_is_an_error_at_start(llada: Path, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        config_of(llada, additional_config={"sparse_dllm": {name: value}})


def test_settings_that_exclude_each_other(llada: Path) -> None:
    settings = {"threshold": 0.5, "factor": 1.0}
    with pytest.raises(ValueError, match="threshold and factor"):
        config_of(llada, additional_config={"sparse_dllm": settings})


def test_settings_must_be_a_mapping(llada: Path) -> None:
    with pytest.raises(ValueError, match="sparse_dllm"):
        config_of(llada, additional_config={"sparse_dllm": ["steps"]})


def test_an_odd_switch_of_kernels_is_refused(llada: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.VARIABLE, "false")
    with pytest.raises(ValueError, match=f"{native.VARIABLE} must be 0 or 1, got 'false'"):
        config_of(llada)


# (d) What a config.json may say.


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("alibi", True),
        ("rope", False),
        ("block_type", "sequential"),
        ("block_group_size", 2),
        ("layer_norm_type", "default"),
        ("layer_norm_with_affine", False),
        ("activation_type", "gelu"),
        ("include_bias", True),
        ("bias_for_layer_norm", True),
        ("attention_layer_norm", True),
        ("clip_qkv", 8.0),
        ("input_emb_norm", True),
        ("scale_logits", True),
        ("mask_token_id", None),
        ("mask_token_id", ...),
        ("mask_token_id", 128),
        ("mask_token_id", -1),
        ("embedding_size", 100),
    ],
)
def test_unsupported_llada_config(
    llada: Path, copy: Callable[[Path], Path], name: str, value: Any
) -> None:
    model = copy(llada)
    edit_config(model, **{name: value})
    with pytest.raises(ValueError, match=rf"config\.json.*\b{name}="):
        config_of(model)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"use_sliding_window": True, "sliding_window": 64}, "use_sliding_window"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"mask_token_id": None}, "mask_token_id"),
        ({"mask_token_id": 4096}, "mask_token_id"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unsupported_dream_config(
    dream: Path, copy: Callable[[Path], Path], fields: dict[str, Any], named: str
) -> None:
    model = copy(dream)
    edit_config(model, **fields)
    with pytest.raises(ValueError, match=rf"config\.json.*\b{named}="):
        config_of(model)


def test_sliding_window_that_is_off_is_no_obstacle(
    dream: Path, copy: Callable[[Path], Path]
) -> None:
    """Public Dream checkpoints name a window and switch it off."""
    model = copy(dream)
    edit_config(model, use_sliding_window=False, sliding_window=131072)
    assert config_of(model).model_config.get_sliding_window() is None


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_an_override_without_a_base(tmp_path: Path, family: str) -> None:
    model = write_checkpoint(tmp_path, family, **SMALL)
    edit_config(model, rope_theta=..., rope_parameters={"rope_type": "default", "rope_theta": 77.0})
    config = config_of(model, hf_overrides={"rope_parameters": {"rope_type": "default"}})
    assert config.model_config.hf_config.rope_theta == 77.0


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_scaling_under_its_old_name(tmp_path: Path, family: str) -> None:
    model = write_checkpoint(tmp_path, family, **SMALL)
    edit_config(model, rope_scaling={"type": "linear", "factor": 2.0})
    with pytest.raises(ValueError, match=r"sets rope_parameters \(rope_scaling\) to .*linear"):
        config_of(model)


LINEAR = {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize("overridden", [False, True])
@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize(
    ("fields", "base"),
    [
        ({"rope_theta": 1234.5}, 1234.5),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 4e6}}, 4e6),
        ({"rope_scaling": {"rope_type": "default", "rope_theta": 4e6}}, 4e6),
        ({"rope_parameters": {"rope_type": "default"}}, None),
        ({"rope_scaling": None}, None),
        ({"rope_parameters": {"rope_type": "default"}, "rope_scaling": LINEAR}, "rope_parameters"),
        ({"rope_parameters": LINEAR}, "rope_parameters"),
        ({"rope_scaling": LINEAR}, "rope_parameters"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_parameters"),
        ({"rope_parameters": {**LINEAR, "rope_type": "yarn", "rope_theta": 5e6}}, "rope"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial"),
        ({"rope_theta": -1}, "rope_theta"),
    ],
)
def test_rotary_positions(
    tmp_path: Path, family: str, fields: dict[str, Any], base: Any, overridden: bool
) -> None:
    """The rotary base is found under each name and in each place; other settings are refused."""
    model = write_checkpoint(tmp_path, family, **SMALL)
    theta = json.loads((model / "config.json").read_text())["rope_theta"]
    if not overridden:
        # As transformers 5 writes it.
        replaced = {"rope_theta": ...} if "rope_theta" in str(fields) else {}
        edit_config(model, **{**replaced, **fields})
    options = {"hf_overrides": fields} if overridden else {}
    if isinstance(base, str):
        with pytest.raises(ValueError, match=base):
            config_of(model, **options)
        return
    config = config_of(model, **options)
    assert config.model_config.hf_config.rope_theta == (base or theta)
    assert config.model_config.max_model_len == 4096
    again = pickle.loads(pickle.dumps(config.model_config.hf_config))
    assert again.rope_theta == (base or theta)


def test_uneven_heads(llada: Path, copy: Callable[[Path], Path]) -> None:
    model = copy(llada)
    edit_config(model, n_kv_heads=3)
    with pytest.raises(ValueError, match="2 attention heads .* 3 key/value heads"):
        config_of(model)


def test_a_moe_checkpoint_is_not_taken_for_llada(llada: Path, copy: Callable[[Path], Path]) -> None:
    """A MoE checkpoint has the same ``model_type``, but vLLM refuses its architecture."""
    model = copy(llada)
    edit_config(model, architectures=["LLaDAMoEModelLM"])
    with pytest.raises(ValueError, match="LLaDAMoEModelLM"):
        config_of(model)


# (e) Spoilt checkpoints.


@contextmanager
def failing_engine() -> Iterator[None]:
    """Clean up after an engine whose start fails."""
    try:
        yield
    finally:
        cleanup_dist_env_and_memory()


def spoil(model: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of a checkpoint."""
    path = model / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def _cut(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name: tensors[name][:-8].contiguous()})


def _remove(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)


def _add(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name: torch.zeros(4)})


def _grow(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name: torch.cat([tensors[name]] * 2)})


def _config(**fields: Any) -> Callable[[Path], None]:
    return lambda model: edit_config(model, **fields)


def _tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    return lambda model: spoil(model, change)


def _truncate(size: int) -> Callable[[Path], None]:
    """Truncate the file to ``size`` bytes; if negative, remove so many bytes from its end."""

    def change(model: Path) -> None:
        path = model / "model.safetensors"
        with path.open("r+b") as file:
            file.truncate(size if size >= 0 else path.stat().st_size + size)

    return change


def _pickled(model: Path) -> None:
    """Replace the file by a `torch.save` file, of which the second half is missing."""
    path = model / "pytorch_model.bin"
    torch.save(load_file(model / "model.safetensors"), path)
    (model / "model.safetensors").unlink()
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


OUTER, BLOCK = "model.transformer.", "model.transformer.blocks.1."
SPOILT: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut q_proj": (
        _tensors(_cut(BLOCK + "q_proj.weight")),
        r"tensor model\.transformer\.blocks\.1\.q_proj\.weight .*shape \(56, 64\).*\(64, 64\)",
    ),
    "cut attn_out": (
        _tensors(_cut(BLOCK + "attn_out.weight")),
        r"blocks\.1\.attn_out\.weight .*\(56, 64\).*\(64, 64\)",
    ),
    "cut wte": (_tensors(_cut(OUTER + "wte.weight")), r"wte\.weight .*\(120, 64\).*\(128, 64\)"),
    "cut ln_f": (_tensors(_cut(OUTER + "ln_f.weight")), r"ln_f\.weight .*\(56,\).*\(64,\)"),
    "large k_proj": (
        _tensors(_grow(BLOCK + "k_proj.weight")),
        r"k_proj\.weight .*\(128, 64\).*\(64, 64\)",
    ),
    "no k_proj": (
        _tensors(_remove(BLOCK + "k_proj.weight")),
        r"lacks layers\.1\.self_attn\.qkv_proj\.weight \(k\)",
    ),
    "no ff_out": (
        _tensors(_remove(BLOCK + "ff_out.weight")),
        r"lacks layers\.1\.mlp\.down_proj\.weight",
    ),
    "no head": (_tensors(_remove(OUTER + "ff_out.weight")), r"lacks lm_head\.weight"),
    "extra bias": (
        _tensors(_add(BLOCK + "q_proj.bias")),
        r"blocks\.1\.q_proj\.bias that this model has not",
    ),
    "extra wpe": (_tensors(_add(OUTER + "wpe.weight")), r"wpe\.weight that this model has not"),
    "extra layer": (
        _tensors(_add("model.transformer.blocks.2.ff_norm.weight")),
        r"blocks\.2\..*this model has not",
    ),
    "fewer layers": (_config(n_layers=1), r"blocks\.1\..*this model has not"),
    "more layers": (_config(n_layers=3), r"lacks layers\.2\."),
    "narrower": (_config(mlp_hidden_size=64), r"ff_\w+\.weight .*96.*64"),
    "wider": (_config(mlp_hidden_size=128), r"ff_\w+\.weight .*96.*128"),
    "fewer keys": (_config(n_kv_heads=1), r"[kv]_proj\.weight .*\(64, 64\).*\(32, 64\)"),
    "smaller": (_config(d_model=32), r"tensor .*\(64,.*\(32,"),
    "larger vocabulary": (_config(vocab_size=256, embedding_size=256), r"\(128, 64\).*\(256, 64\)"),
    "tied head": (
        _config(weight_tying=True),
        r"ties the head.*ff_out\.weight.*wte\.weight.*differ",
    ),
    "no layers": (_config(n_layers=0), r"config\.json sets n_layers=0"),
    "no heads": (_config(n_heads=0), r"config\.json sets n_heads=0"),
    "truncated": (_truncate(-100), r"/model\.safetensors is truncated or damaged"),
    "truncated header": (_truncate(50), r"/model\.safetensors is truncated or damaged"),
    "empty file": (_truncate(0), r"/model\.safetensors is truncated or damaged"),
    "truncated pickle": (_pickled, r"/pytorch_model\.bin is truncated or damaged"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_spoilt_checkpoint(llada: Path, copy: Callable[[Path], Path], name: str) -> None:
    change, message = SPOILT[name]
    model = copy(llada)
    change(model)
    with (
        failing_engine(),
        pytest.raises(ValueError, match=message),
        running_engine(str(model)),
    ):
        pass


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path, "llada", shards=3, **SMALL)
    path = sorted(model.glob("*.safetensors"))[1]
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 100)
    with (
        failing_engine(),
        pytest.raises(ValueError, match=rf"file \S*/{path.name} is truncated"),
        running_engine(str(model)),
    ):
        pass


# (f) Ways to load.


def test_dummy_weights(llada: Path, copy: Callable[[Path], Path]) -> None:
    """Dummy weights need no file of weights."""
    model = copy(llada)
    (model / "model.safetensors").unlink()
    with running_engine(str(model), load_format="dummy") as llm:
        assert len(generate(llm, [PROMPT], [sampling(8)])[0]) == 8


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_sharded_checkpoint(tmp_path: Path, family: str) -> None:
    """Tensors are in three files; the configuration's ``auto_map`` names code that is missing."""
    model = write_checkpoint(tmp_path, family, shards=3, **SMALL)
    assert len(list(model.glob("*.safetensors"))) == 3
    assert "auto_map" in json.loads((model / "config.json").read_text())
    expected = reference(load(model), PROMPT, 16)
    with running_engine(str(model)) as llm:
        assert generate(llm, [PROMPT], [sampling(16)]) == [expected]


@pytest.fixture(params=["products in half", "products in float32"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The processor normally decides between the two ways to multiply; all can run both."""
    wanted = request.param == "products in float32"
    wants = f"{cpu_products.__name__}.{cpu_products.wants_float32_products.__name__}"
    monkeypatch.setattr(wants, lambda dtype: wanted)
    return str(request.param)


def methods_of(llm: LLM) -> list[str]:
    """Return the names of the classes that multiply in a model of an engine in this process."""
    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    methods = (getattr(module, "quant_method", None) for module in model.modules())
    return sorted({type(method).__name__ for method in methods if method is not None})


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_bfloat16(tmp_path: Path, family: str, products: str) -> None:
    """The checkpoint's own dtype is used; all policies run, and give the same tokens again."""
    model = write_checkpoint(tmp_path, family, dtype=torch.bfloat16, **SMALL)
    params = [
        sampling(24, diffusion_cache_policy=policy)
        for policy in ("none", "prefix", "dual", "sparse")
    ]
    with running_engine(str(model), dtype="auto") as llm:
        assert llm.llm_engine.vllm_config.model_config.dtype == torch.bfloat16
        expected = {
            "products in half": [
                "LookupMethod",
                "UnquantizedEmbeddingMethod",
                "UnquantizedLinearMethod",
            ],
            "products in float32": ["Float32HeadMethod", "Float32LinearMethod", "LookupMethod"],
        }
        assert methods_of(llm) == expected[products]
        first = generate(llm, [PROMPT] * 4, params)
        assert [len(tokens) for tokens in first] == [24] * 4
        assert generate(llm, [PROMPT] * 4, params) == first


def tie(model: Path) -> None:
    """Tie a checkpoint's head to its embedding; its file still has both tensors."""
    tensors = load_file(model / "model.safetensors")
    for head, embedding, field in (
        ("model.transformer.ff_out.weight", "model.transformer.wte.weight", "weight_tying"),
        ("lm_head.weight", "model.embed_tokens.weight", "tie_word_embeddings"),
    ):
        if head in tensors:
            tensors[head] = tensors[embedding].clone()
            edit_config(model, **{field: True})
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("family", "dtype", "products"),
    [
        ("llada", "float32", "products in half"),
        ("dream", "bfloat16", "products in half"),
        ("dream", "bfloat16", "products in float32"),
    ],
    indirect=["products"],
)
def test_weights_are_loaded_anew(
    tmp_path: Path, family: str, dtype: str, products: str, tied: bool
) -> None:
    """Weights are replaced in place by those of the checkpoint that is named."""
    paths = [write_checkpoint(tmp_path / str(n), family, **SMALL, seed=n) for n in range(2)]
    expected = []
    for path in paths:
        if tied:
            tie(path)
        with running_engine(str(path), dtype=dtype) as llm:
            expected += generate(llm, [PROMPT], [sampling(12)])
    if dtype == "float32":
        assert expected == [reference(load(path), PROMPT, 12) for path in paths]
    assert expected[0] != expected[1]
    with running_engine(str(paths[0]), dtype=dtype) as llm:
        for number in (0, 1, 0):
            llm.collective_rpc("reload_weights", kwargs={"weights_path": str(paths[number])})
            assert generate(llm, [PROMPT], [sampling(12)]) == [expected[number]]


def test_packed_weights_are_loaded_from_checkpoints_only(llada: Path) -> None:
    message = "is_checkpoint_format must be True on a CPU, got False"
    with running_engine(str(llada)) as llm, pytest.raises(ValueError, match=message):
        llm.collective_rpc("reload_weights", kwargs={"is_checkpoint_format": False})


def test_memory_is_free_when_an_engine_has_ended(llada: Path) -> None:
    """Memory is freed even while the `LLM` object still exists."""
    with running_engine(str(llada)) as llm:
        generate(llm, [PROMPT], [sampling(4)])
        runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        held = [runner.model, runner.model.rotary, runner.backend, *runner.kv_caches]
        held += [runner.model.layers[0].self_attn]
        references = [weakref.ref(one) for one in held]
        del held, runner
        llm.llm_engine.engine_core.shutdown()
        gc.collect()
        assert [one() for one in references] == [None] * len(references)


def test_a_profile_has_the_steps(llada: Path, tmp_path: Path) -> None:
    """vLLM's profiler sees the steps, and stops after ``max_iterations`` of them."""
    options = {
        "profiler": "torch",
        "torch_profiler_dir": str(tmp_path),
        "torch_profiler_with_stack": False,
        "max_iterations": 3,
    }
    with running_engine(str(llada), profiler_config=options) as llm:
        llm.start_profile()
        expected = [reference(load(llada), PROMPT, 12)]
        assert generate(llm, [PROMPT], [sampling(12)]) == expected
        llm.stop_profile()
    (trace,) = tmp_path.glob("*.trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = [event.get("name", "") for event in events]
    steps = [name for name in names if name.startswith("execute_")]
    assert 0 < len(steps) <= 3


def test_config_class_is_ours_without_remote_code(llada: Path, dream: Path) -> None:
    for model in (llada, dream):
        config = config_of(model)
        assert not config.model_config.trust_remote_code
        assert type(config.model_config.hf_config).__module__ == "vllm_sparse_dllm.models.configs"


# (g) Dream's tokenizer.

SPECIALS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|object_ref_start|>", "<|object_ref_end|>", "<|beginoftext|>", "<|mask|>"),
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = [
    "Hello, world! It's 1234 o'clock.",
    "  two  spaces\n\n\tand a tab \n",
    "naïve café, 数据, emoji 🙂, e\u0301 combined",
    "<|im_start|>user\nhello<|im_end|>\n<|mask|><|mask|><|endoftext|>",
    "",
]


@pytest.fixture(scope="module")
def dream_with_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Dream checkpoint with tokenizer files like those of public ones.

    There is no tokenizer.json, but the parts of a byte-level BPE, and a configuration that names a
    class in remote code.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    path = tmp_path_factory.mktemp("dream-tokenizer")
    trainer = trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.train_from_iterator(["hello world, it is user and assistant", *TEXTS] * 3, trainer)
    bpe.model.save(str(path))
    first = len(json.loads((path / "vocab.json").read_text()))
    added = {name: first + number for number, name in enumerate(SPECIALS)}

    write_checkpoint(path, "dream", **{**SMALL, "vocab": first + len(SPECIALS) + 5})
    edit_config(
        path,
        mask_token_id=added["<|mask|>"],
        eos_token_id=added["<|endoftext|>"],
        pad_token_id=added["<|endoftext|>"],
        bos_token_id=added["<|beginoftext|>"],
    )
    (path / "generation_config.json").unlink()
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    (path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "add_bos_token": False,
                "add_prefix_space": False,
                "added_tokens_decoder": {
                    str(number): {"content": name, **flags, "special": True}
                    for name, number in added.items()
                },
                "additional_special_tokens": ["<|beginoftext|>", "<|mask|>"],
                "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
                "bos_token": "<|beginoftext|>",
                "chat_template": CHAT_TEMPLATE,
                "clean_up_tokenization_spaces": False,
                "eos_token": "<|endoftext|>",
                "errors": "replace",
                "mask_token": "<|mask|>",
                "model_max_length": 4096,
                "pad_token": "<|endoftext|>",
                "split_special_tokens": False,
                "tokenizer_class": "DreamTokenizer",
                "unk_token": None,
            }
        )
    )
    (path / "added_tokens.json").write_text(json.dumps(added))
    (path / "special_tokens_map.json").write_text(
        json.dumps(
            {
                "bos_token": "<|beginoftext|>",
                "eos_token": "<|endoftext|>",
                "mask_token": "<|mask|>",
                "pad_token": "<|endoftext|>",
            }
        )
    )
    return path


def byte_level_bpe(path: Path) -> Any:
    """Return the tokenizer that Dream's files describe, put together by hand."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
    from tokenizers import pre_tokenizers as pre

    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    files = str(path / "vocab.json"), str(path / "merges.txt")
    tokenizer = Tokenizer(models.BPE.from_file(*files))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre.Sequence(
        [pre.Split(Regex(words), "isolated"), pre.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in SPECIALS]
    )
    return tokenizer


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize("named", [True, False])
def test_dream_tokenizer(
    dream_with_tokenizer: Path, copy: Callable[[Path], Path], trusted: bool, named: bool
) -> None:
    """The tokenizer loads in vLLM without remote code, and encodes and decodes as Qwen2's does."""
    from vllm.tokenizers import get_tokenizer

    path = copy(dream_with_tokenizer)
    (path / "tokenization_dream.py").write_text("raise RuntimeError('remote code has run')")
    if not named:
        file = path / "tokenizer_config.json"
        settings = json.loads(file.read_text())
        del settings["tokenizer_class"], settings["auto_map"]
        file.write_text(json.dumps(settings))
    assert not (path / "tokenizer.json").exists()
    tokenizer = get_tokenizer(str(path), trust_remote_code=trusted)
    assert tokenizer.is_fast
    expected = byte_level_bpe(path)
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == expected.encode(text).ids
        assert ids == tokenizer.encode(text), "a Dream tokenizer adds nothing"
        composed = text.replace("e\u0301", "é")
        assert tokenizer.decode(ids, skip_special_tokens=False) == composed
    config = json.loads((path / "config.json").read_text())
    assert tokenizer.mask_token_id == config["mask_token_id"]
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == config["eos_token_id"]
    assert tokenizer.bos_token_id == config["bos_token_id"]
    first = expected.token_to_id(SPECIALS[0])
    for number, name in enumerate(SPECIALS, first):
        assert tokenizer.convert_tokens_to_ids(name) == number
        assert tokenizer.encode(name) == [number]
    assert len(tokenizer) == expected.get_vocab_size()
    hidden = tokenizer.decode(tokenizer.encode("a<|mask|>b<|endoftext|>"), skip_special_tokens=True)
    assert hidden == "ab"


def test_dream_chats(dream_with_tokenizer: Path) -> None:
    """Chats use the checkpoint's chat template, and answers have text."""
    path = dream_with_tokenizer
    expected = byte_level_bpe(path)
    prompt = "<|im_start|>user\nhello world<|im_end|>\n<|im_start|>assistant\n"
    with running_engine(str(path), skip_tokenizer_init=False) as llm:
        params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
        messages = [{"role": "user", "content": "hello world"}]
        output = llm.chat(messages, params, use_tqdm=False)[0]
        assert output.prompt_token_ids == expected.encode(prompt).ids
        tokens = list(output.outputs[0].token_ids)
        assert tokens == reference(load(path), output.prompt_token_ids, 12)
        again = llm.generate(prompt, params, use_tqdm=False)[0].outputs[0]
        assert list(again.token_ids) == tokens
        assert again.text == output.outputs[0].text


# (h) What diffusion models cannot do in vLLM.


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size"),
        ({"enable_lora": True}, "enable_lora"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            "speculative_config",
        ),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype"),
        ({"kv_cache_dtype": "bfloat16"}, "kv_cache_dtype"),
        ({"kv_offloading_size": 1.0}, "kv_offloading_size"),
        ({"cpu_offload_gb": 1.0}, "cpu_offload_gb"),
        ({"weight_transfer_config": {"backend": "ipc"}}, "weight_transfer_config"),
        ({"offload_group_size": 2}, "offload_group_size"),
        ({"runner": "pooling"}, "runner"),
        ({"attention_backend": "FLASH_ATTN"}, "attention_backend must be auto"),
        ({"attention_config": {"flash_attn_version": 2}}, "attention_config.flash_attn_version"),
        (
            {"additional_config": {"sparse_dllm": {"attention_backend": "triton"}}},
            "attention_backend triton cannot be used here",
        ),
        ({"logprobs_mode": "processed_logprobs"}, "logprobs_mode"),
        ({"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "scheduler_cls"),
        (
            {"diffusion_config": {"canvas_length": 64}},
            r"diffusion_config must be None .*; settings go into additional_config\[\"sparse_dllm",
        ),
        (
            {"ec_transfer_config": {"ec_connector": "ECExampleConnector", "ec_role": "ec_both"}},
            "ec_transfer_config must be None ",
        ),
        (
            {"worker_cls": "vllm.v1.worker.cpu_worker.CPUWorker"},
            "worker_cls must be auto or a subclass of .*, got vllm.v1.worker.cpu_worker.CPUWorker",
        ),
        ({"enable_mfu_metrics": True}, "enable_mfu_metrics must be False "),
        (
            {"tensor_parallel_size": 2, "distributed_executor_backend": "external_launcher"},
            "distributed_executor_backend must be mp, ray or uni .* on 2 ranks, got 'external_l",
        ),
        (
            {"max_num_batched_tokens": 512, "max_num_scheduled_tokens": 600},
            "max_num_scheduled_tokens must be at most max_num_batched_tokens=512, .* got 600",
        ),
        ({"watermark": 0.1}, r"watermark must be 0\.0 .* got 0\.1: an admitted request"),
        ({"long_prefill_token_threshold": 64}, "long_prefill_token_threshold must be 0 "),
        ({"prefill_schedule_interval": 4}, "prefill_schedule_interval must be 1 "),
        ({"scheduler_reserve_full_isl": False}, "scheduler_reserve_full_isl must be True "),
        (
            {
                "kv_transfer_config": {
                    "kv_connector": "ExampleConnector",
                    "kv_role": "kv_both",
                }
            },
            "kv_transfer_config",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unsupported_engine_options(llada: Path, options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        config_of(llada, **options)


def test_the_front_end_that_checks_no_request_is_refused(
    llada: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(ValueError, match="VLLM_USE_RUST_FRONTEND must be False .* got True: req"):
        config_of(llada)


def test_defaults_need_no_flag(llada: Path) -> None:
    """Scheduler, worker and switches follow from the checkpoint alone."""
    config = config_of(llada)
    assert config.scheduler_config.scheduler_cls.endswith("DiffusionScheduler")
    assert "vllm_sparse_dllm" in config.parallel_config.worker_cls
    assert not config.scheduler_config.enable_chunked_prefill
    assert not config.scheduler_config.async_scheduling
    assert not config.cache_config.enable_prefix_caching


def test_options_that_are_switched_off_are_named(
    llada: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where vLLM's defaults have them off; they are in many templates, so they are no error."""
    warnings: list[str] = []
    monkeypatch.setattr(
        "vllm_sparse_dllm.engine.config.logger.warning",
        lambda message, *args: warnings.append(message % args),
    )
    config_of(llada, max_model_len=512, async_scheduling=False)
    config_of(llada, max_model_len=512, enable_prefix_caching=True)
    assert not warnings
    options = {"async_scheduling": True, "prefix_caching_hash_algo": "sha256_cbor"}
    config = config_of(llada, max_model_len=512, **options)
    [warning] = warnings
    assert warning.endswith("async_scheduling=True, prefix_caching_hash_algo='sha256_cbor'")
    assert not config.scheduler_config.async_scheduling
    assert not config.cache_config.enable_prefix_caching


# (i) and (j): budgets of tokens and pages.


def test_default_token_budget_holds_the_context(llada: Path, copy: Callable[[Path], Path]) -> None:
    model = copy(llada)
    edit_config(model, max_sequence_length=50_000)
    scheduler = config_of(model).scheduler_config
    assert scheduler.max_num_batched_tokens >= 50_000
    given = config_of(model, max_num_batched_tokens=60_000).scheduler_config
    assert given.max_num_batched_tokens == 60_000


def test_requests_beyond_the_users_token_budget_are_refused(llada: Path) -> None:
    with running_engine(str(llada), max_num_batched_tokens=100) as llm:
        assert llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens == 100
        fits = [7] * 60
        expected = reference(load(llada), fits, 40)
        assert generate(llm, [fits], [sampling(40)]) == [expected]
        with pytest.raises(ValueError, match="101 tokens.*max_num_batched_tokens=100"):
            generate(llm, [[7] * 61], [sampling(40)])
        with pytest.raises(ValueError, match="cfg_scale.*max_num_batched_tokens=100"):
            generate(llm, [[7] * 20], [sampling(40, diffusion_cfg_scale=1.0)])
        assert generate(llm, [fits, fits], [sampling(40)] * 2) == [expected] * 2


def test_the_option_that_limits_a_step_is_named(
    llada: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(
        "vllm_sparse_dllm.engine.config.logger.warning",
        lambda message, *args: warnings.append(message % args),
    )
    with running_engine(str(llada), max_model_len=512, max_num_scheduled_tokens=100) as llm:
        with pytest.raises(ValueError, match="=100; lower .* or raise max_num_scheduled_tokens "):
            generate(llm, [[7] * 61], [sampling(40)])
        assert generate(llm, [[7] * 60], [sampling(40)]) == [reference(load(llada), [7] * 60, 40)]
    [warning] = warnings
    assert warning.startswith("max_num_scheduled_tokens=100 is below the context length 512")


#: float32, 2 layers, 2 heads of 32: bytes of one page of 32 slots.
PAGE_BYTES = 2 * 32 * 2 * 32 * 4 * 2


def test_requests_and_the_page_pool(llada: Path) -> None:
    """A request that never fits is refused; one that does not fit yet waits, and completes."""
    pool = 12
    size = (pool + 1) * PAGE_BYTES
    dual = {"diffusion_cache_policy": "dual"}
    with running_engine(str(llada), kv_cache_memory_bytes=size, max_model_len=512) as llm:
        scheduler = scheduler_of(llm)
        blocks = scheduler.kv_cache_manager.block_pool
        assert blocks.get_num_free_blocks() == pool
        with pytest.raises(ValueError, match=rf"needs {pool + 1} cache pages.*has {pool}\b"):
            generate(llm, [[7] * 361], [sampling(32, **dual)])
        assert blocks.get_num_free_blocks() == pool

        whole = [[9] * 352, [8] * 352]
        model = load(llada)
        expected = [reference(model, prompt, 32, cache_policy="dual") for prompt in whole]
        engine = llm.llm_engine
        for number, prompt in enumerate(whole):
            given = {"prompt_token_ids": prompt}
            engine.add_request(str(number), given, sampling(32, **dual))
        finished: dict[str, list[int]] = {}
        together = set()
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    finished[output.request_id] = list(output.outputs[0].token_ids)
            together.add((len(scheduler.running), len(scheduler.waiting)))
        assert (1, 1) in together
        assert max(running for running, _ in together) == 1
        assert [finished["0"], finished["1"]] == expected
        assert blocks.get_num_free_blocks() == pool


@pytest.mark.parametrize(("policy", "slots"), [("dual", 416), ("sparse", 801)])
def test_the_longest_context_that_fits_the_pool(llada: Path, policy: str, slots: int) -> None:
    """``--max-model-len -1`` lowers the context to what one request can have under the policy."""
    options = {
        "kv_cache_memory_bytes": 14 * PAGE_BYTES,
        "additional_config": {"sparse_dllm": {"cache_policy": policy}},
    }
    with running_engine(str(llada), max_model_len=-1, **options) as llm:
        assert llm.llm_engine.model_config.max_model_len == slots
        prompt = [7] * (slots - 40)
        expected = reference(load(llada), prompt, 40, cache_policy=policy)
        assert generate(llm, [prompt], [sampling(40)]) == [expected]
    with (
        pytest.raises(ValueError, match=rf"estimated maximum model length is {slots}\b"),
        running_engine(str(llada), max_model_len=1000, **options),
    ):
        raise AssertionError("it should not start")


def test_environment_of_the_tests_is_one_process() -> None:
    """Tests that look into an engine rely on it."""
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"

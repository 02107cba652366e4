# SPDX-License-Identifier: Apache-2.0
"""The commands of docs/deployment.md and the Kubernetes files are valid; they are not run."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from vllm.benchmarks.serve import add_cli_args
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tests.e2e.server import clean_environment, run_program
from tests.scripts import EXAMPLES, load
from vllm_sparse_dllm.models.configs import LLaDAConfig

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
KUBERNETES = EXAMPLES / "kubernetes"


ray_batch, ray_serve = load(EXAMPLES, "ray_batch", "ray_serve")
SCALING = dict(zip(("run", "measure"), load(EXAMPLES / "scaling", "run", "measure"), strict=True))


def commands() -> list[list[str]]:
    """Return the words of each command on the page."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removesuffix("&"))
            # Leave out lines that only set a variable or wait.
            if words != ["wait"] and without_environment(words):
                found.append(words)
    return found


def without_environment(words: list[str]) -> list[str]:
    """Return a command without the environment variables in front of it."""
    return [word for word in words if not re.match(r"[A-Z_]+=", word)]


def documents(name: str) -> list[dict[str, Any]]:
    """Return the documents of a Kubernetes file."""
    return list(yaml.safe_load_all((KUBERNETES / name).read_text(encoding="utf-8")))


def check_batch(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check a command line of ``ray_batch.py``, with an existing file as its input."""
    given = tmp_path / "input.jsonl"
    given.touch()
    monkeypatch.setattr(sys, "argv", ["ray_batch.py", str(given), *arguments[1:]])
    options = ray_batch.parse_arguments()
    assert options.replicas >= 1


@pytest.mark.parametrize("words", commands(), ids=lambda words: " ".join(words)[:60])
def test_command(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = without_environment(words)
    if words[:2] == ["vllm", "serve"]:
        parsed = ray_serve.vllm_arguments(words[2:])
        assert parsed.model == "GSAI-ML/LLaDA-8B-Instruct"
        # vLLM refuses more than the checkpoint's own context.
        assert (parsed.max_model_len or 0) <= LLaDAConfig().max_sequence_length
    elif words[:3] == ["vllm", "bench", "serve"]:
        parser = FlexibleArgumentParser()
        add_cli_args(parser)
        assert parser.parse_args(words[3:]).num_prompts == 512
    elif words[:2] == ["ray", "start"]:
        from ray.scripts.scripts import start

        start.make_context("ray start", words[2:])
    elif words[:2] == ["python", "examples/ray_serve.py"]:
        _, settings = ray_serve.parse_arguments(words[2:])
        ray_serve.application(settings.model_dump())
        assert settings.max_replicas == 16
    elif words[:2] == ["python", "examples/ray_batch.py"]:
        check_batch(words[2:], tmp_path, monkeypatch)
    else:
        assert words[0] == "python", words
        script = ROOT / words[1]
        assert script.parent.name == "scaling"
        SCALING[script.stem].parse_arguments(words[2:])


def test_there_are_commands_of_each_kind() -> None:
    programs = {" ".join(without_environment(words)[:2]) for words in commands()}
    assert {"vllm serve", "vllm bench", "ray start", "python examples/ray_batch.py"} <= programs
    assert len(commands()) >= 12


def test_serve_yaml() -> None:
    deployment, service = documents("serve.yaml")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["vllm", "serve"]
    parsed = ray_serve.vllm_arguments(container["args"])
    engines = parsed.data_parallel_size * parsed.tensor_parallel_size
    assert container["resources"]["limits"]["nvidia.com/gpu"] == engines
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"] == labels
    _check_volumes(deployment["spec"]["template"]["spec"])


def test_ray_service_yaml() -> None:
    (document,) = documents("ray-service.yaml")
    (application,) = yaml.safe_load(document["spec"]["serveConfigV2"])["applications"]
    module, _, name = application["import_path"].partition(":")
    assert (module, name) == ("ray_serve", "application")
    ray_serve.application(application["args"])
    workers = _check_cluster(document["spec"]["rayClusterConfig"])
    assert application["args"]["max_replicas"] == workers["maxReplicas"]


def test_the_application_is_built_on_a_head_without_a_gpu() -> None:
    """ray-service.yaml relies on it. Needs its own process: vLLM keeps the platform it found."""
    program = (
        "import vllm.platforms as platforms; platforms.builtin_platform_plugins.clear(); "
        "import ray_serve; ray_serve.application({'vllm': ['a/model', '--max-model-len=4096']}); "
        "assert platforms.current_platform.is_unspecified()"
    )
    path = os.pathsep.join([str(EXAMPLES), str(ROOT)])
    run_program([sys.executable, "-c", program], environment=clean_environment(PYTHONPATH=path))


def test_ray_batch_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (document,) = documents("ray-batch.yaml")
    python, script, *arguments = shlex.split(document["spec"]["entrypoint"])
    assert (python, Path(script).name) == ("python", "ray_batch.py")
    check_batch(arguments, tmp_path, monkeypatch)
    workers = _check_cluster(document["spec"]["rayClusterSpec"])
    replicas = arguments[arguments.index("--replicas") + 1]
    assert int(replicas) == workers["replicas"]


def test_the_image_has_the_ray_of_the_clusters() -> None:
    (version,) = re.findall(
        r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE
    )
    image = (KUBERNETES / "Dockerfile").read_text(encoding="utf-8")
    assert re.findall(r"\bray==(\S+)", image) == [version]


def _check_cluster(cluster: dict[str, Any]) -> dict[str, Any]:
    """Check what KubeRay clusters have in common; return the only group of workers."""
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert f"ray=={cluster['rayVersion']}\n" in constraints
    (workers,) = cluster["workerGroupSpecs"]
    assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]
    for group in (cluster["headGroupSpec"], workers):
        _check_volumes(group["template"]["spec"])
        # KubeRay accepts only strings here.
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    return workers


def _check_volumes(pod: dict[str, Any]) -> None:
    """Check that a pod has the volumes that its containers mount."""
    volumes = {volume["name"] for volume in pod.get("volumes", [])}
    for container in pod["containers"]:
        assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes


@pytest.mark.parametrize(
    ("args", "field"),
    [
        ({"min_replicas": -1}, "min_replicas"),
        ({"max_replicas": 0}, "max_replicas"),
        ({"min_replicas": 3}, "max_replicas"),
        ({"num_gpus": float("inf")}, "num_gpus"),
        ({"replicas": 2}, "replicas"),
        ({"target_ongoing_requests": 0}, "target_ongoing_requests"),
    ],
)
def test_settings_of_the_deployment_are_checked(args: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=field):
        ray_serve.application(args)


def test_unknown_flags_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ray_serve.application({"vllm": ["model", "--tensor-paralel-sise", "2"]})
    assert "--tensor-paralel-sise" in capsys.readouterr().err


def test_the_default_model() -> None:
    """The embedded model is served if none is named."""
    parsed = ray_serve.vllm_arguments([])
    assert Path(parsed.model).name == "tiny-llada"

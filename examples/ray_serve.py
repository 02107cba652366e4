# SPDX-License-Identifier: Apache-2.0
"""The OpenAI API on Ray Serve, with as many replicas of the engine as the load requires.

``python examples/ray_serve.py [options] MODEL [options of vllm serve]``. Each replica contains
vLLM's own server, with its routes, validation and responses, so it accepts every request that
``vllm serve`` accepts. Ray Serve spreads requests over the replicas, starts and stops replicas as
load rises and falls, and replaces a replica whose engine has failed.

In a Serve configuration (also for KubeRay) the import path is ``ray_serve:application`` and
``args`` are the fields of `Settings`.

Ray's own LLM deployments are not used: their router parses requests with its own types, which lag
behind vLLM's, and they ask Ray for a GPU for every worker.
"""

from __future__ import annotations

import argparse
import signal
import sys
from contextlib import AsyncExitStack
from types import SimpleNamespace
from typing import Any

from pydantic import BaseModel, Field, ValidationError, ValidationInfo, field_validator
from ray import serve
from ray.serve.config import AutoscalingConfig
from ray_cluster import REPLICA_ENVIRONMENT, connect

#: Seconds between health checks of a replica. Serve stops a replica after three failed checks;
#: until then a dead engine attracts requests, because it answers fastest.
HEALTH_CHECK_PERIOD_S = 1


class Settings(BaseModel, extra="forbid", allow_inf_nan=False, validate_default=True):
    """Settings of the deployment.

    Attributes:
        vllm: Arguments of ``vllm serve``, model first; options for its own socket (``--host``,
            ``--port``, ...) have no effect here. Empty: the embedded model.
        min_replicas: Minimum number of replicas; with 0, the first request waits for a start.
        max_replicas: Maximum number of replicas.
        target_ongoing_requests: Running and waiting requests per replica that Serve aims at.
        max_ongoing_requests: Requests that a replica accepts; further ones wait outside it.
        upscale_delay_s: Seconds of too much load before a replica is added.
        downscale_delay_s: Seconds of too little load before a replica is removed.
        num_cpus: Cores per replica.
        num_gpus: GPUs per replica, one for each of its tensor-parallel ranks.
    """

    vllm: list[str] = []
    min_replicas: int = Field(1, ge=0)
    max_replicas: int = Field(2, ge=1)
    target_ongoing_requests: float = Field(16, gt=0)
    max_ongoing_requests: int = Field(256, ge=1)
    upscale_delay_s: float = Field(10, ge=0)
    downscale_delay_s: float = Field(300, ge=0)
    num_cpus: float = Field(1, ge=0)
    num_gpus: float = Field(0, ge=0)

    @field_validator("max_replicas")
    @classmethod
    def _no_fewer_than_the_least(cls, most: int, info: ValidationInfo) -> int:
        least = info.data.get("min_replicas", 0)
        if most < least:
            raise ValueError(f"must be at least min_replicas, {least}")
        return most


def vllm_arguments(arguments: list[str]) -> argparse.Namespace:
    """Return the parsed arguments of a ``vllm serve`` command line.

    Raises:
        SystemExit: If vLLM's parser rejects the command line.
    """
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_sparse_dllm.assets import embedded_model

    parser = make_arg_parser(FlexibleArgumentParser(prog="vllm serve"))
    parsed = parser.parse_args(arguments or [embedded_model()])
    if parsed.model_tag is not None:
        parsed.model = parsed.model_tag
    validate_parsed_serve_args(parsed)
    return parsed


@serve.deployment(name="vllm")
@serve.ingress()
class OpenAIServer:
    """A replica: an engine behind vLLM's HTTP application."""

    async def __init__(self, arguments: list[str]) -> None:
        from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client

        self._arguments = vllm_arguments(arguments)
        self._cleanup = AsyncExitStack()
        self._engine = await self._cleanup.enter_async_context(
            build_async_engine_client(self._arguments)
        )

    async def __serve_build_asgi_app__(self) -> Any:
        """Return the application that Serve sends requests to; called after `__init__`."""
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app

        tasks = await self._engine.get_supported_tasks()
        app = build_app(self._arguments, tasks, self._engine.model_config)
        await init_app_state(self._engine, app.state, self._arguments, tasks)
        # When the engine is dead, vLLM stops the server that it finds here. In a replica there is
        # none; Serve learns of the failure from `check_health`.
        app.state.server = SimpleNamespace()
        return app

    async def check_health(self) -> None:
        """Raise if the engine is dead; Serve then replaces the replica."""
        await self._engine.check_health()

    async def __del__(self) -> None:
        await self._cleanup.aclose()


def application(args: dict[str, Any]) -> serve.Application:
    """Return the application for the ``args`` of a Serve configuration, the fields of `Settings`.

    Raises:
        ValueError: If a field is unknown or has a value that is not allowed.
    """
    from vllm.platforms import current_platform

    settings = Settings(**args)
    # A head node without a GPU cannot parse vLLM's arguments, since vLLM first needs a device.
    # The replicas parse them in any case.
    if not current_platform.is_unspecified():
        vllm_arguments(settings.vllm)
    return OpenAIServer.options(
        autoscaling_config=AutoscalingConfig(
            min_replicas=settings.min_replicas,
            max_replicas=settings.max_replicas,
            target_ongoing_requests=settings.target_ongoing_requests,
            upscale_delay_s=settings.upscale_delay_s,
            downscale_delay_s=settings.downscale_delay_s,
        ),
        max_ongoing_requests=settings.max_ongoing_requests,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        ray_actor_options={
            "num_cpus": settings.num_cpus,
            "num_gpus": settings.num_gpus,
            "runtime_env": {"env_vars": REPLICA_ENVIRONMENT},
        },
    ).bind(settings.vllm)


def parse_arguments(arguments: list[str]) -> tuple[argparse.Namespace, Settings]:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="All else is for vllm serve, model first.",
        allow_abbrev=False,
    )
    parser.add_argument("--serve-host", default="127.0.0.1", help="default: %(default)s")
    parser.add_argument("--serve-port", type=int, default=8000, help="default: %(default)s")
    for name, field in Settings.model_fields.items():
        if name != "vllm":
            flag = f"--{name.replace('_', '-')}"
            parser.add_argument(flag, default=field.default, help="default: %(default)s")
    own, rest = parser.parse_known_args(arguments)
    given = {name: value for name, value in vars(own).items() if name in Settings.model_fields}
    try:
        return own, Settings(vllm=rest, **given)
    except ValidationError as error:
        first = error.errors()[0]
        flag = str(first["loc"][0]).replace("_", "-")
        parser.error(f"--{flag}: {first['msg']}, got {first['input']!r}")


def main() -> None:
    own, settings = parse_arguments(sys.argv[1:])
    deployed = application(settings.model_dump())
    connect()
    # Shut down as on Ctrl-C; Ray's default on SIGTERM is to abort.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    serve.start(http_options={"host": own.serve_host, "port": own.serve_port})
    serve.run(deployed, route_prefix="/", blocking=True)


if __name__ == "__main__":
    main()

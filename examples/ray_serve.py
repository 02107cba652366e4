# SPDX-License-Identifier: Apache-2.0
"""The OpenAI API on Ray Serve, with as many replicas of the engine as there is work for.

``python examples/ray_serve.py [options] MODEL [options of vllm serve]``. Each replica has vLLM's
own server in it, routes, checks and answers included, so a request may have whatever it may have
with ``vllm serve``. Ray Serve spreads requests over the replicas, starts and ends them as load
comes and goes, and replaces one whose engine has failed.

In a configuration of Serve's (KubeRay's too) the import path is ``ray_serve:application``, its
``args`` the fields of `Settings`.

Ray's own LLM deployments are not used: they take requests apart in a router of their own, whose
types lag behind vLLM's, and ask Ray for a GPU for every worker.
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

#: Seconds between the checks of a replica. Serve ends one that failed three of them; until then a
#: dead engine draws requests, since it answers fastest.
HEALTH_CHECK_PERIOD_S = 1


class Settings(BaseModel, extra="forbid", allow_inf_nan=False, validate_default=True):
    """Settings of the deployment.

    Attributes:
        vllm: Command line of ``vllm serve``, model first; what concerns its own socket
            (``--host``, ``--port``, ...) has no effect here. Empty: the embedded model.
        min_replicas: Replicas that are always there; 0 lets the first request wait for a start.
        max_replicas: And at most so many.
        target_ongoing_requests: Requests of a replica, running and waiting, that Serve aims at.
        max_ongoing_requests: Requests that a replica takes; others wait outside it.
        upscale_delay_s: Seconds of too much load before a replica is added.
        downscale_delay_s: Seconds of too little before one is taken away.
        num_cpus: Cores of a replica.
        num_gpus: GPUs of a replica: one for each of its tensor-parallel ranks.
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
    """Return what vLLM makes of a command line of ``vllm serve``.

    Raises:
        SystemExit: If it is none.
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
    """A replica: an engine, and vLLM's HTTP application before it."""

    async def __init__(self, arguments: list[str]) -> None:
        from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client

        self._arguments = vllm_arguments(arguments)
        self._cleanup = AsyncExitStack()
        self._engine = await self._cleanup.enter_async_context(
            build_async_engine_client(self._arguments)
        )

    async def __serve_build_asgi_app__(self) -> Any:
        """Return the application that Serve sends requests to, after `__init__`."""
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app

        tasks = await self._engine.get_supported_tasks()
        app = build_app(self._arguments, tasks, self._engine.model_config)
        await init_app_state(self._engine, app.state, self._arguments, tasks)
        # vLLM tells the server it started to stop when the engine is dead. There is none here:
        # Serve learns of that in `check_health`.
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
    # A head without a GPU cannot read them: vLLM asks for a device first. The replicas do.
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
    # As Ctrl-C; Ray's own way is to abort.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    serve.start(http_options={"host": own.serve_host, "port": own.serve_port})
    serve.run(deployed, route_prefix="/", blocking=True)


if __name__ == "__main__":
    main()

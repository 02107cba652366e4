# SPDX-License-Identifier: Apache-2.0
"""Metrics and a log line of a diffusion engine, in addition to vLLM's own.

vLLM's `vllm.stat_logger_plugins` entry points are not used: one such plugin enables statistics for
every model, even with ``--disable-log-stats``, and `LLM` does not load them. So `install` wraps the
constructor of `StatLoggerManager`, and only the front end of a diffusion model calls it.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from prometheus_client import Counter, Gauge
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.metrics.loggers import AggregateStatLoggerBase, StatLoggerManager
from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats

from vllm_sparse_dllm.engine.config import DiffusionModelConfig, pages_of_an_engine
from vllm_sparse_dllm.engine.figures import FAILURE_CAUSES, FIGURES, QUEUE_CAUSES
from vllm_sparse_dllm.frontend.wrapping import wrap

# A child of vLLM's logger, so that it logs at the level set for vLLM.
logger = init_logger("vllm." + __name__)


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: On ``/metrics``; Prometheus adds ``_total`` to a counter's.
        kind: ``counter`` or ``gauge``.
        text: Description, as on ``/metrics``.
        causes: Values of the label ``cause``; empty without the label.
    """

    name: str
    kind: str
    text: str
    causes: tuple[str, ...] = ()

    @property
    def sample(self) -> str:
        """The metric's name in a query."""
        return self.name + "_total" if self.kind == "counter" else self.name


def _counter(name: str, text: str, causes: tuple[str, ...] = ()) -> Metric:
    return Metric("vllm:diffusion_" + name, "counter", text, causes)


def _gauge(name: str, text: str) -> Metric:
    return Metric("vllm:diffusion_" + name, "gauge", text)


# `vllm bench serve` reads the first three. It subtracts one step per block, which in vLLM's own
# diffusion models commits the canvas, so each finished block counts as one more step here.
METRICS: tuple[Metric, ...] = (
    _counter("num_denoising_steps", "Full passes, block steps, and one for each finished block."),
    _counter("num_canvas_positions", "Positions of the current block, for each of those steps."),
    _counter("num_committed_tokens", "Tokens committed, delivered or not."),
    _counter("full_passes", "Steps of a request that ran all its positions."),
    _counter("refreshes", "Full passes that filled a cache."),
    _counter("block_steps", "Steps of a request that ran against its cache."),
    _counter("finished_blocks", "Blocks without a mask left."),
    _counter("kept_positions", "Positions each layer kept, summed over refreshes."),
    _counter("evicted_positions", "Positions each layer did not keep, summed over refreshes."),
    _counter(
        "queued_request_steps",
        "Waiting requests, summed over steps, by what the first of them waits for.",
        QUEUE_CAUSES,
    ),
    _counter("request_failures", "Requests that ended without an answer.", FAILURE_CAUSES),
    _gauge("pages_held", "Pages of the cache that requests hold."),
    _gauge("pages", "Pages of the cache."),
)


def _increments(figures: dict[str, Any]) -> dict[str, int]:
    """Return the increment of each counter without causes."""
    steps = figures["steps"]
    runs = steps["full_passes"] + steps["block_steps"]
    values = {
        "num_denoising_steps": runs + steps["blocks"],
        "num_canvas_positions": steps["positions"] + steps["finished_positions"],
        "num_committed_tokens": steps["committed"],
        "full_passes": steps["full_passes"],
        "refreshes": steps["refreshes"],
        "block_steps": steps["block_steps"],
        "finished_blocks": steps["blocks"],
        "kept_positions": steps["kept"],
        "evicted_positions": steps["evicted"],
    }
    return {"vllm:diffusion_" + name: value for name, value in values.items()}


class _Interval:
    """What one engine did since the last log line."""

    def __init__(self) -> None:
        self.steps: dict[str, int] = {}
        self.queued: dict[str, int] = {}

    def add(self, figures: dict[str, Any]) -> None:
        for totals, new in ((self.steps, figures["steps"]), (self.queued, figures["queued"])):
            for name, number in new.items():
                totals[name] = totals.get(name, 0) + number


class DiffusionStatLogger(AggregateStatLoggerBase):
    """Publishes the engines' figures to Prometheus and logs them at vLLM's interval.

    Args:
        vllm_config: The configuration of a diffusion model.
        engine_indexes: The engines whose figures it publishes.
        logs: Whether to print log lines.
    """

    def __init__(
        self, vllm_config: VllmConfig, engine_indexes: list[int], logs: bool = True
    ) -> None:
        self.vllm_config = vllm_config
        self._logs = logs
        self._intervals = {index: _Interval() for index in engine_indexes}
        self._pages = dict.fromkeys(engine_indexes, (0, 0))
        # Keyed by (metric, engine, cause); all exist from the start, so that queries find them.
        self._series: dict[tuple[str, int, str], Any] = {}
        model_name = vllm_config.model_config.served_model_name
        for metric in METRICS:
            labels = ["model_name", "engine", *(["cause"] if metric.causes else [])]
            family: Any
            if metric.kind == "counter":
                family = Counter(metric.name, metric.text, labels)
            else:
                # With several API servers, the most recently set value is the current one.
                family = Gauge(metric.name, metric.text, labels, multiprocess_mode="mostrecent")
            for index in engine_indexes:
                for cause in metric.causes or ("",):
                    values = [model_name, str(index), *([cause] if cause else [])]
                    self._series[metric.name, index, cause] = family.labels(*values)

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,
        engine_idx: int = 0,
    ) -> None:
        if scheduler_stats is None or not scheduler_stats.kv_connector_stats:
            return
        figures = scheduler_stats.kv_connector_stats.get(FIGURES)
        if figures is None:
            return
        # vLLM's own loggers run next and would take these for a KV connector's statistics.
        scheduler_stats.kv_connector_stats = None
        for name, number in _increments(figures).items():
            if number:
                self._series[name, engine_idx, ""].inc(number)
        self._add_by_cause("queued_request_steps", engine_idx, figures["queued"])
        self._add_by_cause("request_failures", engine_idx, figures["failures"])
        self._series["vllm:diffusion_pages_held", engine_idx, ""].set(figures["pages_held"])
        self._series["vllm:diffusion_pages", engine_idx, ""].set(figures["pages"])
        self._intervals[engine_idx].add(figures)
        self._pages[engine_idx] = (figures["pages_held"], figures["pages"])

    def _add_by_cause(self, name: str, engine_idx: int, numbers: dict[str, int]) -> None:
        for cause, number in numbers.items():
            self._series["vllm:diffusion_" + name, engine_idx, cause].inc(number)

    def record_refusal(self) -> None:
        """Count a request that admission refused, under the first engine as none has seen it."""
        self._add_by_cause("request_failures", min(self._intervals), {"refused": 1})

    def log_engine_initialized(self) -> None:
        pages = pages_of_an_engine(self.vllm_config)
        if pages is not None:
            for index in self._intervals:
                self._series["vllm:diffusion_pages", index, ""].set(pages)

    def log(self) -> None:
        for index, interval in self._intervals.items():
            self._intervals[index] = _Interval()
            steps = interval.steps
            runs = steps.get("full_passes", 0) + steps.get("block_steps", 0)
            if not self._logs or runs == 0:
                continue
            held, pages = self._pages[index]
            queued = [f"{cause} {number}" for cause, number in interval.queued.items()]
            logger.info(
                "Engine %03d: Diffusion: %.2f tokens committed a step, block steps: %d, "
                "full passes: %d (refreshes: %d), pages held: %d of %d%s",
                index,
                steps["committed"] / runs,
                steps["block_steps"],
                steps["full_passes"],
                steps["refreshes"],
                held,
                pages,
                ", request-steps waited for " + ", ".join(queued) if queued else "",
            )


#: The logger of this process's front end, which counts refusals.
_front_end: DiffusionStatLogger | None = None


def record_refusal(vllm_config: VllmConfig) -> None:
    """Count a request that the admission of a front end refused."""
    if _front_end is not None and _front_end.vllm_config is vllm_config:
        _front_end.record_refusal()


def install() -> None:
    """Add the logger to the front ends of diffusion models; may be called repeatedly."""
    signature = inspect.signature(StatLoggerManager.__init__)
    read = ("vllm_config", "enable_default_loggers", "client_count")

    @wrap(StatLoggerManager, "__init__", named=read)
    def add_logger(original: Any, self: StatLoggerManager, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        vllm_config = given.arguments["vllm_config"]
        if not isinstance(vllm_config.model_config, DiffusionModelConfig):
            return
        # Constructed after vLLM's own logger, whose constructor unregisters all metrics of an
        # earlier engine, but inserted before it, to receive the statistics first.
        logs = given.arguments["enable_default_loggers"] and given.arguments["client_count"] == 1
        own = DiffusionStatLogger(vllm_config, self.engine_indexes, logs=logs)
        self.stat_loggers.insert(0, own)
        global _front_end
        _front_end = own

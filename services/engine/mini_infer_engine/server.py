"""The engine process: builds the engine, then runs its loop until SIGTERM or SIGINT."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import structlog
from mini_infer.config import EngineConfig

from mini_infer_engine.gateway_sessions import GatewaySessions
from mini_infer_engine.inbox import Inbox
from mini_infer_engine.loop import EngineLoop
from mini_infer_engine.outbox import Outbox
from mini_infer_engine.pipeline import Runner
from mini_infer_engine.scheduler import Scheduler
from mini_infer_engine.served_model import ServedModel

if TYPE_CHECKING:
    from mini_infer_engine.loader import Progress

log = structlog.get_logger("engine")


def run(
    config: EngineConfig,
    address: str,
    on_ready: Callable[[], None] | None = None,
    loading: AbstractContextManager[Progress | None] | None = None,
) -> None:
    """Serves gateways until SIGTERM or SIGINT.

    Args:
        config: The engine to build.
        address: Where to listen for gateways, `ipc://`.
        on_ready: Called once gateways are answered.
        loading: Entered while the model is built; gives what takes the bytes loaded and in all.

    Raises:
        ConfigError: Where model, device or address cannot be used.
    """
    from mini_infer_engine.build import build_engine  # torch, not needed by the scripted engine

    # The gateway and the tokenizer need the cores as well.
    with loading or nullcontext() as on_progress:
        engine = build_engine(config, on_progress, small_model_threads=1)
    # What is there now stays: the collector need not look at it between steps.
    gc.collect()
    gc.freeze()
    log.info("KV cache", **engine.cache_size.summary(engine.served.max_model_len))
    serve(
        engine.served,
        engine.scheduler,
        engine.runner,
        address,
        on_ready,
        seconds_per_token=engine.seconds_per_token,
    )


def serve(
    served: ServedModel,
    scheduler: Scheduler,
    runner: Runner,
    address: str,
    on_ready: Callable[[], None] | None = None,
    *,
    seconds_per_token: float,
) -> None:
    """Runs the loop over given parts until SIGTERM or SIGINT.

    Args:
        served: The model as clients know it.
        scheduler: The queues, idle.
        runner: Whatever makes tokens.
        address: Where to listen for gateways, `ipc://`.
        on_ready: Called once gateways are answered.
        seconds_per_token: How long a token of a step takes, about.
    """
    epoch = time.time_ns()
    welcome = served.welcome(
        engine_id=f"engine-{os.getpid()}",
        epoch=epoch,
        num_blocks=scheduler.blocks.pool.num_blocks,
        block_size=scheduler.blocks.pool.block_size,
    )
    inbox, outbox = Inbox(), Outbox(epoch)
    sessions = GatewaySessions(address, welcome, inbox, outbox)
    loop = EngineLoop(
        served,
        scheduler,
        runner,
        inbox,
        outbox,
        epoch=epoch,
        seconds_per_token=seconds_per_token,
    )
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signal_number, lambda *_: loop.stop())
    sessions.start()
    log.info(
        "ready", model=served.name, address=address, kv_blocks=scheduler.blocks.pool.num_blocks
    )
    if on_ready:
        on_ready()
    loop.run()
    served.grammars.close()
    sessions.stop()
    outbox.close()

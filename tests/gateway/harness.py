"""What the gateway's tests share beside fixtures: child processes, gateways, requests under way."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc
import msgspec
import numpy as np
from gateway.stand_ins import ENGINE_WELCOME, StandInEngine, StandInTokenizer
from mini_infer import AsyncClient
from mini_infer.client import RequestFailed
from mini_infer.config import bundled_model
from mini_infer.logprobs import LogprobColumns
from mini_infer.messages import FinishCode, OpenText, Submit, TextDeltas
from mini_infer.resolved_sampling import ResolvedSampling
from mini_infer.v1 import generate_pb2
from mini_infer.v1.inference_service_pb2_grpc import InferenceServiceStub
from mini_infer_engine.scripted import ordinary_token_ids, scripted_token
from mini_infer_gateway.request import EncodedRequest, TextOptions
from mini_infer_gateway.server import Gateway
from tokenizer.chat_escapes import ESCAPES

_Test = TypeVar("_Test", bound=Callable[..., Any])
# Names of templates in `tokenizer.chat_escapes`, which `talkative_model` has as well.
BOMBS = (
    "class of a text",
    "append",
    "nested loops",
    "repeated text",
    "endless output",
)
_EVERYTHING = """{{ {'messages': messages, 'tools': tools, 'documents': documents,
'opened': add_generation_prompt, 'mood': mood | default('none')} | tojson }}"""
ORDINARY_IDS = ordinary_token_ids(bundled_model("demo"))


@dataclass
class Process:
    """A child process that serves on a ZeroMQ address."""

    address: str
    command: list[str]
    popen: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.popen = subprocess.Popen(self.command, stdout=subprocess.DEVNULL)

    def kill(self, signal_number: int = signal.SIGKILL) -> None:
        assert self.popen is not None
        os.kill(self.popen.pid, signal_number)
        self.popen.wait()


@dataclass
class RunningGateway:
    """A gateway in this process, and a client of it."""

    gateway: Gateway
    address: str
    client: AsyncClient

    @property
    def engine_link(self) -> Any:
        return self.gateway.peers.engine_links[0]

    @property
    def tokenizer_link(self) -> Any:
        return self.gateway.peers.tokenizer_links[0]


StartGateway = Callable[..., Awaitable[RunningGateway]]


def talkative_model(folder: Path) -> Path:
    """A folder with the demo's tokenizer, and templates that write out what they are given."""
    demo, model = bundled_model("demo"), folder / "model"
    named = model / "additional_chat_templates"
    named.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo / name, model)
    (model / "chat_template.jinja").write_text(_EVERYTHING)
    (named / "tool_use.jinja").write_text("TOOLS {{ tools | tojson }}")
    (named / "plain.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    for name in BOMBS:
        (named / f"{name}.jinja").write_text(ESCAPES[name])
    return model


def tokenizer_process(folder: Path, model: Path | None = None) -> Process:
    return _process("mini_infer_tokenizer", f"ipc://{folder}/tokenizer", model=model)


def scripted_engine_process(folder: Path, name: str, **options: float) -> Process:
    address = f"ipc://{folder}/{name}"
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    return _process("mini_infer_engine.scripted", address, *flags)


def _process(module: str, address: str, *flags: str, model: Path | None = None) -> Process:
    arguments = ["--model", str(model or bundled_model("demo")), "--address", address, *flags]
    return Process(address, [sys.executable, "-m", module, *arguments])


def failure(task: asyncio.Task[Any]) -> RequestFailed:
    error = task.exception()
    assert isinstance(error, RequestFailed)
    return error


async def begin(
    served: RunningGateway, engine: StandInEngine, **options: Any
) -> tuple[Any, asyncio.Task[str], int]:
    """A request whose first token is delivered: stream, reading task, stream number."""
    options.setdefault("ids_only", True)
    stream = served.client.generate([5], **options)
    reading = asyncio.create_task(stream.text())
    submit = await engine.next(Submit)
    await engine.step(submit.stream, 0, [5])
    while not stream.token_ids:
        await asyncio.sleep(0.005)
    return stream, reading, submit.stream


async def opened(
    served: RunningGateway, engine: StandInEngine, tokenizer: StandInTokenizer, **options: Any
) -> tuple[Any, asyncio.Task[str], int]:
    """A request that engine and tokenizer know: stream, reading task, stream number."""
    stream = served.client.generate([5], **options)
    reading = asyncio.create_task(stream.text())
    submit = await engine.next(Submit)
    assert (await tokenizer.next(OpenText)).stream == submit.stream
    return stream, reading, submit.stream


def deltas(number: int, consumed: int, released: int, text: str, stop: int = -1) -> TextDeltas:
    """The tokenizer's answer about one stream."""
    return TextDeltas([number], [consumed], [released], [text], [stop])


def exercises(*fields: str) -> Callable[[_Test], _Test]:
    """Notes which fields a test shows the effect of, for `test_fields.py` to read."""
    return lambda test: test


async def submitted(
    served: RunningGateway, engine: StandInEngine, prompt: Any, **options: Any
) -> Submit:
    """What the engine gets for a request, which then ends."""
    reading = asyncio.create_task(served.client.generate(prompt, **options).text())
    submit = await engine.next(Submit)
    await engine.step(submit.stream, 0, [5], FinishCode.LENGTH)
    await reading
    return submit


def thoughts(start: int, token_ids: Sequence[int], num_top: int) -> LogprobColumns:
    """Log-probabilities that are those of one token at one position and of no other.

    Args:
        start: Position of the first token.
        token_ids: The tokens.
        num_top: Likeliest tokens of each.
    """
    positions = np.arange(start, start + len(token_ids))
    places = np.arange(num_top)
    ids = np.array(token_ids, dtype=np.int64)
    return LogprobColumns.from_arrays(
        -positions - 0.5,
        1 + ids,
        ids[:, None] + places,
        -positions[:, None] - places / 4,
    )


def encoded_request(**fields: Any) -> EncodedRequest:
    """A request whose text ends at "stop"."""
    options = TextOptions(
        stop=("stop",),
        skip_special_tokens=True,
        include_stop_str_in_output=False,
        min_tokens=0,
        ids_only=False,
    )
    defaults: dict[str, Any] = {
        "prompt_ids": [5],
        "sampling": ResolvedSampling(0.0, 0, 1.0, 0, 64),
        "num_choices": 1,
        "text_options": options,
        "stream_interval": 1,
        "priority": 0,
        "cache_salt": "",
        "deadline": None,
    }
    return EncodedRequest(**{**defaults, **fields})


async def until_idle(served: RunningGateway) -> None:
    while served.gateway.admission.num_active or served.tokenizer_link.num_streams:
        await asyncio.sleep(0.005)
    assert served.engine_link.num_streams == 0


async def generate(
    served: RunningGateway, **fields: Any
) -> tuple[list[generate_pb2.GenerateResponse], dict[str, str]]:
    """All messages of a call, and its trailing metadata."""
    async with grpc.aio.insecure_channel(served.address) as channel:
        call = InferenceServiceStub(channel).Generate(generate_pb2.GenerateRequest(**fields))
        messages = [message async for message in call]
        return messages, {key: value for key, value in await call.trailing_metadata()}


def expected_ids(seed: int, num_tokens: int) -> list[int]:
    """The output of the scripted engine."""
    return [scripted_token(seed, position, ORDINARY_IDS) for position in range(num_tokens)]


@asynccontextmanager
async def nobody_reads(
    folder: Path, tokenizer_address: str, start_gateway: StartGateway, *, num_choices: int = 1
) -> AsyncIterator[tuple[RunningGateway, StandInEngine, Any]]:
    """A gateway, an engine with room for any output, and a call whose client does not read."""
    welcome = msgspec.structs.replace(ENGINE_WELCOME, max_model_len=10**7)
    engine = StandInEngine(f"ipc://{folder}/engine", welcome)
    served = await start_gateway(f"ipc://{folder}/engine", tokenizer_address, write_stall_s=0.3)
    # A small window, so that little is enough to fill it.
    options = (("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0))
    async with grpc.aio.insecure_channel(served.address, options) as channel:
        request = generate_pb2.GenerateRequest(
            token_ids=generate_pb2.TokenIds(ids=[5]),
            sampling=generate_pb2.SamplingOptions(n=num_choices),
            output=generate_pb2.OutputOptions(ids_only=True),
        )
        yield served, engine, InferenceServiceStub(channel).Generate(request)
    await engine.close()

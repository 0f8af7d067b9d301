"""The methods of `mini_infer.v1.InferenceService`: gRPC on one side, the gateway on the other."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc
import mini_infer
import structlog
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from mini_infer.config import GatewayConfig
from mini_infer.errors import ErrorReason, FieldViolation, InvalidRequestError, MiniInferError
from mini_infer.v1 import inference_service_pb2 as pb2
from mini_infer.v1.generate_pb2 import GenerateRequest
from mini_infer.v1.inference_service_pb2_grpc import InferenceServiceServicer

from mini_infer_gateway import status, wire
from mini_infer_gateway.admission import Admission
from mini_infer_gateway.client_stream import Context
from mini_infer_gateway.generate import GenerateCall
from mini_infer_gateway.peers import Peers
from mini_infer_gateway.request_log import RequestLine
from mini_infer_gateway.validation import check_abort, check_detokenize, check_tokenize

_log = structlog.get_logger()
_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


def _rpc(
    method: Callable[[InferenceService, _Request, Any], Awaitable[_Response]],
) -> Callable[[InferenceService, _Request, Any], Awaitable[_Response]]:
    """Turns what a method raises into the call's status, and a request that is an error."""

    @functools.wraps(method)
    async def call(
        self: InferenceService, request: _Request | MiniInferError, context: Any
    ) -> _Response:
        try:
            if isinstance(request, MiniInferError):
                raise request
            return await method(self, request, context)
        except MiniInferError as error:
            await status.abort(context, error)
        except grpc.aio.BaseError:
            # The connection is gone, and with it whoever could be told: a cancellation.
            raise asyncio.CancelledError from None
        except Exception:
            _log.exception("call failed", method=method.__name__)
            failed = MiniInferError(ErrorReason.INTERNAL_ERROR, "the server failed; see its log")
            await status.abort(context, failed)

    return call


def _reader(kind: type[Message]) -> Callable[[bytes], Message | MiniInferError]:
    """A deserializer whose failure is a value: gRPC gives a status without details for others."""

    def read(content: bytes) -> Message | MiniInferError:
        try:
            return kind.FromString(content)
        except DecodeError:
            expected = f"expected a {kind.DESCRIPTOR.full_name} whose strings are UTF-8"
            return InvalidRequestError([FieldViolation("request", f"{expected}, got other bytes")])

    return read


class InferenceService(InferenceServiceServicer):
    """Serves the methods."""

    def __init__(self, config: GatewayConfig, peers: Peers, admission: Admission) -> None:
        """Takes its collaborators."""
        self._config = config
        self._peers = peers
        self._admission = admission
        self._started_at = time.monotonic()
        self._generate = GenerateCall(
            peers,
            admission,
            max_prompt_bytes=config.max_prompt_bytes,
            write_stall_s=config.write_stall_s,
        )

    def handlers(self) -> grpc.GenericRpcHandler[Any, Any]:
        """What a server needs to know of the methods."""
        service = pb2.DESCRIPTOR.services_by_name["InferenceService"]
        handlers = {}
        for method in service.methods:
            make = (
                grpc.unary_stream_rpc_method_handler
                if method.server_streaming
                else grpc.unary_unary_rpc_method_handler
            )
            handlers[method.name] = make(
                getattr(self, method.name),
                request_deserializer=_reader(GetMessageClass(method.input_type)),
                response_serializer=GetMessageClass(method.output_type).SerializeToString,
            )
        return grpc.method_handlers_generic_handler(service.full_name, handlers)

    @_rpc
    async def Generate(self, request: GenerateRequest, context: Context) -> None:
        """Continues a prompt and streams the output as it is made."""
        with RequestLine(context.time_remaining()) as line:
            await self._generate.run(request, context, line)

    @_rpc
    async def Tokenize(self, request: pb2.TokenizeRequest, context: object) -> pb2.TokenizeResponse:
        """Turns text or a conversation into token ids."""
        source = check_tokenize(request, self._config.max_prompt_bytes)
        return pb2.TokenizeResponse(token_ids=await self._peers.tokenizer().encode(source))

    @_rpc
    async def Detokenize(
        self, request: pb2.DetokenizeRequest, context: object
    ) -> pb2.DetokenizeResponse:
        """Turns token ids into text."""
        token_ids, skip_special = check_detokenize(request, self._peers.model().engine)
        text = await self._peers.tokenizer().decode(token_ids, skip_special_tokens=skip_special)
        return pb2.DetokenizeResponse(text=text)

    @_rpc
    async def GetModelInfo(
        self, request: pb2.GetModelInfoRequest, context: object
    ) -> pb2.GetModelInfoResponse:
        """Tells which model is served and what it can do."""
        model = self._peers.model()
        return wire.model_info(model.engine, has_chat_template=model.tokenizer.has_chat_template)

    @_rpc
    async def GetServerInfo(
        self, request: pb2.GetServerInfoRequest, context: object
    ) -> pb2.GetServerInfoResponse:
        """Tells the state of the server; answers at any time."""
        return wire.server_info(
            version=mini_infer.__version__,
            uptime_s=time.monotonic() - self._started_at,
            num_active_requests=self._admission.num_active,
            draining=self._admission.is_draining,
            engines=[(link.welcome, link.beat) for link in self._peers.engine_links],
        )

    @_rpc
    async def Abort(self, request: pb2.AbortRequest, context: object) -> pb2.AbortResponse:
        """Ends a running Generate call."""
        self._admission.abort(check_abort(request))
        return pb2.AbortResponse()

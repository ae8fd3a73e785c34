"""grpc.health.v1: Check and Watch. Written out here, for it is one string and one number; knows no model.

The whole server is the empty name, as is the inference service's own.
"""

import asyncio
from typing import Any

import grpc
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

from app.errors import NotFound, RequestError
from app.grpc.codec import parse
from app.grpc.status import ending
from app.lifecycle import Lifecycle

NAME = "grpc.health.v1.Health"
SERVING, NOT_SERVING, SERVICE_UNKNOWN = 1, 2, 3


def _request_class() -> Any:
    """HealthCheckRequest, in a pool of its own: a program may have the same from another package."""
    file = FileDescriptorProto(name="health.proto", package="grpc.health.v1", syntax="proto3")
    service = file.message_type.add(name="HealthCheckRequest").field.add(name="service", number=1)
    service.type, service.label = FieldDescriptorProto.TYPE_STRING, FieldDescriptorProto.LABEL_OPTIONAL
    pool = DescriptorPool()
    pool.Add(file)
    return GetMessageClass(pool.FindMessageTypeByName("grpc.health.v1.HealthCheckRequest"))


HealthCheckRequest = _request_class()


def response(status: int) -> bytes:
    """HealthCheckResponse: field 1, a number."""
    return bytes([1 << 3, status])


class Health:
    """Of one server. services: names that are asked for beside the empty one."""

    def __init__(self, lifecycle: Lifecycle, services: tuple[str, ...]) -> None:
        self._lifecycle = lifecycle
        self._services = ("", *services)
        self._changed = asyncio.Event()
        lifecycle.on_change.append(self._tell)

    def handlers(self) -> dict[str, Any]:
        """gRPC's handlers by method."""
        return {
            f"/{NAME}/Check": grpc.unary_unary_rpc_method_handler(self.check),
            f"/{NAME}/Watch": grpc.unary_stream_rpc_method_handler(self.watch),
        }

    async def check(self, raw: bytes, context: Any) -> bytes:
        """The status now; NOT_FOUND for an unknown service."""
        try:
            status = self._status(parse(HealthCheckRequest, raw).service)
            if status == SERVICE_UNKNOWN:
                raise NotFound("unknown service")
            return response(status)
        except RequestError as error:
            refused = error
        await context.abort(*ending(refused))
        raise AssertionError("aborting raises")

    async def watch(self, raw: bytes, context: Any) -> None:
        """The status now and whenever it changes, until the server refuses new requests."""
        try:
            service = parse(HealthCheckRequest, raw).service
        except RequestError as error:
            await context.abort(*ending(error))
        told = 0
        while True:
            changed = self._changed
            status = self._status(service)
            if status != told:
                await context.write(response(status))
                told = status
            if self._lifecycle.refusing:
                return
            if changed is self._changed:
                await changed.wait()

    def _status(self, service: str) -> int:
        if service not in self._services:
            return SERVICE_UNKNOWN
        return SERVING if self._lifecycle.ready else NOT_SERVING

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

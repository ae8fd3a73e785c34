"""What a request costs over gRPC beside HTTP: `python -m loadtest.benchmark.over_grpc`. One server with a model that
costs nothing, asked in turn over both; the CPU time that it spent on each answer.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path

import grpc.aio
import msgspec

from app.grpc.protocol.open_inference_pb2 import ModelInferRequest
from loadtest.benchmark import free_model
from loadtest.benchmark.load import closed
from loadtest.benchmark.server import HOST, Running, free_port, service, serving
from loadtest.payloads import Payload

TEXT = "a calm and ordinary morning"
METHOD = "/inference.GRPCInferenceService/ModelInfer"
ROUNDS = 5
CHANNELS = 4
WARM_UP_SHARE = 0.2


def over_http() -> dict[str, Payload]:
    """One text, as /predict and as the protocol's JSON."""
    data = {"name": "text", "shape": [1], "datatype": "BYTES", "data": [TEXT]}
    return {
        "HTTP /predict": Payload("/predict", msgspec.json.encode({"text": TEXT})),
        "HTTP /v2, JSON": Payload("/v2/models/free/infer", msgspec.json.encode({"inputs": [data]})),
    }


def over_grpc() -> dict[str, bytes]:
    """The same text, typed and raw."""
    typed, raw = (
        ModelInferRequest(model_name="free", inputs=[{"name": "text", "datatype": "BYTES", "shape": [1]}])
        for _ in range(2)
    )
    typed.inputs[0].contents.bytes_contents.append(TEXT.encode())
    raw.raw_input_contents.append(len(TEXT).to_bytes(4, "little") + TEXT.encode())
    return {"gRPC, typed": typed.SerializeToString(), "gRPC, raw": raw.SerializeToString()}


async def load(running: Running, port: int, request: bytes, clients: int, seconds: float) -> float:
    """As `closed`, over gRPC: CPU milliseconds of the server for each answer."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(f"{HOST}:{port}", options=options) for _ in range(CHANNELS)]
    answers, end = 0, time.monotonic() + seconds

    async def client(number: int) -> None:
        nonlocal answers
        infer = channels[number % CHANNELS].unary_unary(METHOD)
        while time.monotonic() < end:
            await infer(request)
            answers += 1

    tasks = [asyncio.create_task(client(number)) for number in range(clients)]
    await asyncio.sleep(seconds * WARM_UP_SHARE)
    before, cpu = answers, sum(running.cpu_seconds())
    await asyncio.gather(*tasks)
    spent = sum(running.cpu_seconds()) - cpu
    for channel in channels:
        await channel.close()
    return spent / (answers - before) * 1e3


def main() -> None:
    """Prints medians of ROUNDS turns."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.benchmark.over_grpc",
        description=__doc__,
        epilog="example: python -m loadtest.benchmark.over_grpc --clients 64",
    )
    parser.add_argument("--clients", type=int, default=16, help="each sends its next request when the last is answered")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each load")
    args = parser.parse_args()
    port = free_port()
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        artifact = free_model.write(Path(folder))
        # No connection is renewed meanwhile.
        command = service(artifact, grpc_port=port, grpc_max_connection_age_seconds=3600, max_queue_wait_ms=60_000)
        with serving(command) as running:
            for _ in range(ROUNDS):
                for name, payload in over_http().items():
                    summary = closed(running, [payload], args.clients, args.seconds)
                    found.setdefault(name, []).append(summary["server_cpu_ms_per_request"])
                for name, request in over_grpc().items():
                    spent = asyncio.run(load(running, port, request, args.clients, args.seconds))
                    found.setdefault(name, []).append(spent)
    first = statistics.median(next(iter(found.values())))
    for name, spents in found.items():
        spent = statistics.median(spents)
        print(f"{name:<16}{spent * 1e3:>7.0f} us of CPU a request {spent / first:>6.2f} x")


if __name__ == "__main__":
    main()

"""A replica to compare the simulator with: `python -m tests.tools.standin --servers 4 --seconds 0.08`.

Some requests at once, each takes its time asleep, so that many fit on a machine with few CPUs. Prints its port when it
listens.
"""

import argparse
import asyncio
import random

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"


async def read_request(reader: asyncio.StreamReader) -> bytes:
    """One whole request. Raises IncompleteReadError at the end of the connection."""
    head = await reader.readuntil(b"\r\n\r\n")
    lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    return head + await reader.readexactly(int(lengths[0][15:]) if lengths else 0)


async def serve(servers: int, seconds: float) -> None:
    """Serves until killed. Service times are spread evenly between half and one and a half of `seconds`."""
    free = asyncio.Semaphore(servers)

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                await read_request(reader)
                async with free:
                    await asyncio.sleep(seconds * random.uniform(0.5, 1.5))
                writer.write(ANSWER)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--servers", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=0.08)
    args = parser.parse_args()
    asyncio.run(serve(args.servers, args.seconds))

"""Servers as others run them, for the tests: with other settings, and behind what companies put in front."""

from harness.settings import find_cli
from lab import Guard, Server, free_port, port_is_free

import asyncio
import concurrent.futures
import contextlib
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import grpc
import pytest

Refuse = Callable[[str, Mapping[str, str]], tuple[grpc.StatusCode, str] | bytes | None]


@contextlib.contextmanager
def given_server(folder: Path, namespace: str = "evaluation", **settings: str) -> Iterator[Server]:
    """A dev server with its own defaults but for `settings` (dynamic configuration, "." written as "__")."""
    cli = find_cli()
    assert cli
    folder = folder / "given"  # which goes with the server; what else stands beside it stays
    folder.mkdir()
    guard = Guard(folder)
    dynamic = {name.replace("__", "."): value for name, value in settings.items()}
    server = Server(cli, guard, folder / "server.log", settings=dynamic, namespace=namespace)
    try:
        asyncio.run(server.start())
        yield server
    finally:
        server.kill()
        guard.close()


class Gateway(grpc.GenericRpcHandler):
    """A real gRPC server that passes calls on to another one, except those that `refuse` answers.

    `refuse` is given the call's path and its metadata. It returns a status with a text, an answer, or None.
    """

    def __init__(self, address: str, refuse: Refuse) -> None:
        self._upstream, self._refuse = grpc.insecure_channel(address), refuse

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[bytes, bytes]":
        def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
            sent = {key: str(value) for key, value in context.invocation_metadata()}
            refused = self._refuse(str(handler_call_details.method), sent)
            if isinstance(refused, bytes):
                return refused
            if refused:
                context.abort(*refused)
            passed = tuple((key, value) for key, value in sent.items() if not key.startswith(("user-agent", "grpc-")))
            method = str(handler_call_details.method)
            call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = self._upstream.unary_unary(method)
            try:
                answered, report = call.with_call(
                    request, metadata=passed, timeout=min(context.time_remaining() or 70, 70)
                )
            except grpc.RpcError as error:  # which is the call, too, says grpcio
                failed = cast(grpc.Call, error)
                context.set_trailing_metadata(tuple(failed.trailing_metadata() or ()))
                context.abort(failed.code(), failed.details() or "")
            context.set_trailing_metadata(tuple(report.trailing_metadata() or ()))
            return bytes(answered)

        return grpc.unary_unary_rpc_method_handler(answer)


@contextlib.contextmanager
def gateway(address: str, refuse: Refuse) -> Iterator[str]:
    """A Gateway in front of the server at `address`. Yields its own address."""
    front = grpc.server(
        concurrent.futures.ThreadPoolExecutor(200),
        handlers=[Gateway(address, refuse)],
        options=[("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)],
    )
    port = front.add_insecure_port("127.0.0.1:0")
    front.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        front.stop(None)


@dataclass
class ConnectProxy:
    """A proxy as companies have them. `asked` are the request lines it was given, with their authorization."""

    address: str
    asked: list[tuple[str, str]] = field(default_factory=list)


@contextlib.contextmanager
def connect_proxy(routes: Mapping[str, str]) -> Iterator[ConnectProxy]:
    """A proxy that knows the way to `routes`, name to address, by CONNECT, and refuses everything else."""
    seen: list[tuple[str, str]] = []

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode(errors="replace").splitlines()
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
        seen.append((head[0], headers.get("proxy-authorization", "")))
        method, name, *_ = head[0].split()
        if method != "CONNECT" or name not in routes:
            writer.write(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            writer.close()
            return
        host, port = routes[name].split(":")
        there_reader, there_writer = await asyncio.open_connection(host, int(port))
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        await asyncio.gather(pump(reader, there_writer), pump(there_reader, writer))

    loop = asyncio.new_event_loop()
    listener = loop.run_until_complete(asyncio.start_server(accept, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield ConnectProxy(f"127.0.0.1:{listener.sockets[0].getsockname()[1]}", seen)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)


@contextlib.contextmanager
def nginx(address: str, folder: Path, more: str = "") -> Iterator[str]:
    """nginx with its default settings in front of a server, as `grpc_pass` has it. Yields its address."""
    program = shutil.which("nginx") or "/usr/sbin/nginx"
    if not Path(program).exists():
        pytest.skip("nginx is not installed")
    port = free_port()
    temporary = " ".join(
        f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"daemon off; pid {folder}/nginx.pid; error_log {folder}/nginx.log; worker_processes 1;\n"
        f"events {{}}\nhttp {{ access_log off; {temporary}\n"
        f"server {{ listen 127.0.0.1:{port} http2; location / {{ grpc_pass grpc://{address}; }} {more} }} }}\n"
    )
    process = subprocess.Popen([program, "-c", f"{folder}/nginx.conf"], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 20
        while port_is_free(port):
            assert process.poll() is None, (folder / "nginx.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)

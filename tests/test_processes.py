"""Nothing is left behind: no server, no worker, no folder, however a run ends."""

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from helpers import ROOT, environment, run, tiny

pytestmark = pytest.mark.all

TAG = "EVALUATION_UNDER_TEST"


def tagged(tag: str) -> list[str]:
    """The command lines of all living processes that were started under `tag`."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(TAG) == tag and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except psutil.Error:  # it ended meanwhile, or is not ours
            continue
    return found


def wait_for(condition: Callable[[], object], what: str, seconds: float = 40) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


class Running:
    """The tiny script's last item, with a private server, three workers and a fresh nursery up."""

    def __init__(self, tmp_path: Path) -> None:
        self.tag = uuid.uuid4().hex
        ledger = tmp_path / "alive"
        self.process = subprocess.Popen(
            [sys.executable, str(tiny(tmp_path)), "TT-07"],
            env=environment(**{TAG: self.tag, "TINY": str(ledger), "TMPDIR": str(tmp_path)}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
        )
        wait_for(lambda: ledger.exists() and ledger.read_text().endswith("\n"), "the item is running")
        self.folder = Path(ledger.read_text().splitlines()[0]).parent
        self.alive = tagged(self.tag)

    def end(self, number: int) -> tuple[int, str, str]:
        """Send a signal and wait. Returns (exit status, stdout, stderr)."""
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_everything(tmp_path: Path, number: signal.Signals) -> None:
    running = Running(tmp_path)
    assert len([line for line in running.alive if "server start-dev" in line]) == 2
    assert len([line for line in running.alive if "--nursery" in line]) == 4
    code, _, err = running.end(number)
    assert code == 128 + number
    assert "Traceback" not in err
    assert f"{number.name}: stopped" in err
    assert tagged(running.tag) == []
    assert not running.folder.exists()


def test_a_second_signal_changes_nothing(tmp_path: Path) -> None:
    running = Running(tmp_path)
    running.process.send_signal(signal.SIGINT)
    code, _, err = running.end(signal.SIGINT)
    assert code == 130
    assert "Traceback" not in err
    assert tagged(running.tag) == []


def test_even_sigkill_leaves_nothing(tmp_path: Path) -> None:
    running = Running(tmp_path)
    code, _, _ = running.end(signal.SIGKILL)
    assert code == -signal.SIGKILL
    wait_for(lambda: tagged(running.tag) == [], "the guard has ended every process", 20)
    wait_for(lambda: not running.folder.exists(), "the guard has removed the folder", 20)


def by_python_itself(traceback: str) -> bool:
    """Whether a Ctrl-C came before the line of common.py that turns its traceback off had been reached."""
    text = (ROOT / "common.py").read_text(encoding="utf-8").splitlines()
    line = next(number for number, one in enumerate(text, 1) if "signal.signal(signal.SIGINT" in one)
    return "site-packages" not in traceback and all(
        int(reached) < line for reached in re.findall(r'common.py", line (\d+)', traceback)
    )


@pytest.mark.parametrize("delay", [0.05, 0.2, 0.4, 0.7, 1.0, 1.5])
def test_ctrl_c_at_any_moment(tmp_path: Path, delay: float) -> None:
    """From the first moment of the imports on: no traceback, and nothing left."""
    tag = uuid.uuid4().hex
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "01_ex_execution_semantics.py"), "EX-03"],
        env=environment(**{TAG: tag, "TMPDIR": str(tmp_path), "TEMPORAL_DOTENV": os.devnull}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT)
    assert "Traceback" not in err or by_python_itself(err), err
    wait_for(lambda: tagged(tag) == [], "everything has ended", 10)


def test_a_closed_pipe_ends_everything(tmp_path: Path) -> None:
    """As in `script | head -1`."""
    tag = uuid.uuid4().hex
    process = subprocess.Popen(
        [sys.executable, str(tiny(tmp_path)), "TT-01", "TT-02", "TT-03"],
        env=environment(**{TAG: tag, "TMPDIR": str(tmp_path)}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stdout.readline().startswith("TT")
    process.stdout.close()
    assert process.wait(60) == 128 + signal.SIGPIPE
    assert process.stderr
    assert process.stderr.read() == ""
    assert tagged(tag) == []


@pytest.mark.parametrize(("item", "code"), [("TT-01", 0), ("TT-03", 1), ("TT-04", 1), ("TT-05", 0), ("TT-99", 2)])
def test_a_run_that_ends_by_itself_leaves_nothing(tmp_path: Path, item: str, code: int) -> None:
    tag = uuid.uuid4().hex
    done = run(tiny(tmp_path), item, env={TAG: tag, "TMPDIR": str(tmp_path)})
    assert done.returncode == code
    assert tagged(tag) == []
    assert list(tmp_path.glob("temporal-example-*")) == []


def test_closed_standard_streams(tmp_path: Path) -> None:
    script = tiny(tmp_path)
    command = f'exec "{sys.executable}" "{script}" TT-01 --json "{tmp_path}/v.json" <&- >&- 2>&-'
    done = subprocess.run(["/bin/sh", "-c", command], env=environment(TMPDIR=str(tmp_path)), check=False, timeout=120)
    assert done.returncode == 0
    assert '"stars": 5' in (tmp_path / "v.json").read_text()


def test_keep_open_serves_the_ui_until_ctrl_c(tmp_path: Path) -> None:
    import urllib.request

    tag = uuid.uuid4().hex
    process = subprocess.Popen(
        [sys.executable, str(tiny(tmp_path)), "TT-01", "--keep-open"],
        env=environment(**{TAG: tag, "TMPDIR": str(tmp_path)}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout
        line = next(line for line in process.stdout if "Web UI at" in line)
        url = line.split("Web UI at ")[1].split(",")[0]
        page = urllib.request.urlopen(f"{url}/api/v1/namespaces/default/workflows", timeout=10).read().decode()
        assert "TT-01-" in page
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, "")
        assert tagged(tag) == []
    finally:
        process.kill()  # its guard ends the rest


def test_two_at_once(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    both = [
        subprocess.Popen([sys.executable, str(tiny(folder)), "TT-01"], env=environment(), stdout=subprocess.DEVNULL)
        for folder in folders
    ]
    assert [process.wait(120) for process in both] == [0, 0]

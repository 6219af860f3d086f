"""A line that says what is being done."""

import time

from rich.console import Console


class Progress:
    """One line that says what is being done: in place on a terminal, else a new line now and then."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status = console.status("") if console.is_terminal else None
        self._said, self._at = "", 0.0

    def show(self, text: str) -> None:
        if self._status:
            self._status.update(text)
            self._status.start()
        elif text.split(":")[0] != self._said or time.monotonic() > self._at + 30:
            self._said, self._at = text.split(":")[0], time.monotonic()
            self._console.print(text, soft_wrap=True)

    def close(self) -> None:
        if self._status:
            self._status.stop()

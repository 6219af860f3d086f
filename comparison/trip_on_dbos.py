# /// script
# requires-python = ">=3.11"
# dependencies = ["dbos>=3.4"]
# ///
"""The trip of DX-06 on DBOS, to be run beside it and counted: a library, and a SQLite file beside the program."""

import os
from typing import Protocol

from dbos import DBOS, DBOSConfig


class Provider(Protocol):
    """Whoever is booked with. Raises RuntimeError where nothing is left."""

    def book(self, what: str) -> None: ...

    def cancel(self, what: str) -> None: ...


# user code
@DBOS.dbos_class()
class Booking:
    provider: Provider

    @staticmethod
    @DBOS.step()
    def book(what: str) -> None:
        Booking.provider.book(what)

    @staticmethod
    @DBOS.step()
    def cancel(what: str) -> None:
        Booking.provider.cancel(what)


@DBOS.workflow()
def trip(services: list[str]) -> str:
    booked: list[str] = []
    try:
        for what in services:
            Booking.book(what)
            booked.append(what)
    except RuntimeError as error:
        for what in reversed(booked):
            Booking.cancel(what)
        return str(error)
    return "booked"


def book_a_trip(file: str, provider: Provider, services: list[str]) -> str:
    config: DBOSConfig = {"name": "trip", "system_database_url": f"sqlite:///{file}", "log_level": "ERROR"}
    DBOS(config=config)
    Booking.provider = provider
    DBOS.launch()
    return trip(services)


# end


class Printed:
    """It has no cars left."""

    def book(self, what: str) -> None:
        if what == "car":
            raise RuntimeError("no car left")
        print(f"book {what}")

    def cancel(self, what: str) -> None:
        print(f"cancel {what}")


if __name__ == "__main__":
    print(book_a_trip(os.environ.get("DBOS_FILE", "trip.sqlite"), Printed(), ["flight", "hotel", "car"]))
    DBOS.destroy()

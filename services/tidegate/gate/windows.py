"""When a budget's window begins and ends, in its own time zone. Pure: computed from a time that is given, never from a clock."""

from __future__ import annotations

import datetime
from functools import lru_cache
from typing import Final, Literal, NamedTuple
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

Unit = Literal["run", "hour", "day", "month", "total"]
HOUR_MS: Final = 3_600_000


class Window(NamedTuple):
    """From (inclusive) until (exclusive), Unix milliseconds; 0 and 0 for one that never turns."""

    from_ms: int
    until_ms: int

    def holds(self, at_ms: int) -> bool:
        """Tell whether a time lies in it."""
        return not self.until_ms or self.from_ms <= at_ms < self.until_ms


ALWAYS: Final = Window(0, 0)


def said_moment(at_ms: int) -> str:
    """Return Unix milliseconds for people, to the second, in UTC."""
    return datetime.datetime.fromtimestamp(at_ms / 1000, datetime.UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def zone_named(name: str) -> ZoneInfo:
    """Return a time zone. Raises ValueError if there is none of that name."""
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, OSError, ValueError):
        raise ValueError(f"there is no time zone {name!r}; names are such as Europe/Berlin or UTC") from None


def window_at(unit: Unit, time_zone: str, at_ms: int) -> Window:
    """Return the window that `at_ms` lies in. Days and months begin at midnight there, whatever length clocks make them."""
    if unit in ("run", "total"):
        return ALWAYS
    return _window_at(unit, time_zone, at_ms // 60_000)


@lru_cache(maxsize=4096)
def _window_at(unit: Unit, time_zone: str, at_minute: int) -> Window:
    zone = zone_named(time_zone)
    local = datetime.datetime.fromtimestamp(at_minute * 60, zone)
    if unit == "hour":
        begin_ms = (at_minute - local.minute) * 60_000
        return Window(begin_ms, begin_ms + HOUR_MS)
    begin = datetime.date(local.year, local.month, local.day if unit == "day" else 1)
    if unit == "day":
        end = begin + datetime.timedelta(days=1)
    else:
        end = datetime.date(begin.year + begin.month // 12, begin.month % 12 + 1, 1)
    return Window(_midnight_ms(begin, zone), _midnight_ms(end, zone))


def _midnight_ms(day: datetime.date, zone: ZoneInfo) -> int:
    return int(datetime.datetime(day.year, day.month, day.day, tzinfo=zone).timestamp()) * 1000

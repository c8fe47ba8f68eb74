"""When windows begin and end, with the clock changes of real places; and what tokens cost."""

from __future__ import annotations

import datetime
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.gate.windows import ALWAYS, Unit, window_at, zone_named
from tidegate.prices import price

HOUR = 3_600_000


def ms(text: str, zone: str = "UTC") -> int:
    return int(datetime.datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp() * 1000)


@pytest.mark.feature("P2")
@pytest.mark.parametrize(
    ("unit", "zone", "at", "begin", "end"),
    [
        ("hour", "UTC", "2026-03-05 10:59:59", "2026-03-05 10:00", "2026-03-05 11:00"),
        ("hour", "Asia/Kolkata", "2026-03-05 10:10:00", "2026-03-05 10:00", "2026-03-05 11:00"),
        ("day", "Europe/Berlin", "2026-03-29 12:00:00", "2026-03-29 00:00", "2026-03-30 00:00"),  # 23 hours
        ("day", "Europe/Berlin", "2026-10-25 12:00:00", "2026-10-25 00:00", "2026-10-26 00:00"),  # 25 hours
        ("day", "America/Los_Angeles", "2026-12-31 23:59:59", "2026-12-31 00:00", "2027-01-01 00:00"),
        ("month", "Pacific/Auckland", "2026-12-31 23:59:59", "2026-12-01 00:00", "2027-01-01 00:00"),
        ("month", "UTC", "2028-02-29 00:00:00", "2028-02-01 00:00", "2028-03-01 00:00"),
    ],
)
def test_windows_of_real_places(unit: Unit, zone: str, at: str, begin: str, end: str) -> None:
    assert window_at(unit, zone, ms(at, zone)) == (ms(begin, zone), ms(end, zone))


def test_lengths_of_days_and_what_never_turns() -> None:
    spring = window_at("day", "Europe/Berlin", ms("2026-03-29 12:00", "Europe/Berlin"))
    assert spring.until_ms - spring.from_ms == 23 * HOUR
    assert window_at("total", "UTC", 5) == window_at("run", "UTC", 5) == ALWAYS
    assert ALWAYS.holds(0)
    with pytest.raises(ValueError, match="no time zone"):
        zone_named("../etc/passwd")


@given(
    st.integers(0, 4_102_444_800_000),
    st.sampled_from(["hour", "day", "month"]),
    st.sampled_from(["UTC", "Europe/Berlin", "America/New_York", "Asia/Kathmandu", "Pacific/Apia"]),
)
def test_every_time_lies_in_its_window_and_windows_follow_each_other(at_ms: int, unit: Unit, zone: str) -> None:
    window = window_at(unit, zone, at_ms)
    assert window.holds(at_ms)
    assert window_at(unit, zone, window.from_ms) == window
    following = window_at(unit, zone, window.until_ms)
    assert following.from_ms == window.until_ms


@pytest.mark.feature("P2")
def test_prices_round_up_and_name_their_table() -> None:
    now_ms = ms("2026-06-01 00:00")
    found = price("openai", "gpt-4o", 1, 0, now_ms)
    assert found is not None
    assert found.micros == 3  # 2.5 micro-dollars a token
    assert found.basis.startswith("price:openai:gpt-4o@")
    assert price("openai", "no-such-model", 1, 1, now_ms) is None
    assert price("", "", 1, 1, now_ms) is None
    many = price("openai", "gpt-4o", 10**13, 1, now_ms)
    assert many is None  # nobody has so many: not priced rather than wrong
    graded, short = (
        price("google", "gemini-2.5-pro", 400_000, 0, now_ms),
        price("google", "gemini-2.5-pro", 1000, 0, now_ms),
    )
    assert graded is not None
    assert short is not None
    assert graded.micros > short.micros * 400  # long prompts cost more a token

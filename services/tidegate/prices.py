"""What tokens cost, by the price table of `genai-prices`. Pure for a given version of that package, which decisions name.

The scheduler prices what attempts have used when it logs their results, the gate what they may use when it sets money aside.

The table is the one that the package ships with; nothing is fetched. Prices may depend on the date: whoever asks gives it.
"""

from __future__ import annotations

import datetime
import importlib.metadata
from decimal import ROUND_CEILING, Decimal
from functools import cache, lru_cache
from typing import Any, Final, NamedTuple

from tidegate.domain.identity import MAX_MICROS

MS_PER_DAY: Final = 24 * 3_600_000
MAX_TOKENS: Final = 10**12


class Price(NamedTuple):
    """An amount of money in micro-dollars, rounded up, and what it rests on: `price:provider:model@version of the table`."""

    micros: int
    basis: str


def price(provider: str, model: str, input_tokens: int, output_tokens: int, now_ms: int) -> Price | None:
    """Return what so many tokens of a model cost on the day of `now_ms`; None if the table does not know the model.

    The first call of a process takes a fifth of a second. Never raises.
    """
    if not model or not (0 <= input_tokens <= MAX_TOKENS and 0 <= output_tokens <= MAX_TOKENS):
        return None
    return _price(provider, model, input_tokens, output_tokens, now_ms // MS_PER_DAY)


@lru_cache(maxsize=8192)  # what attempts may use is the same again and again
def _price(provider: str, model: str, input_tokens: int, output_tokens: int, day: int) -> Price | None:
    found = _model(provider, model, day)
    if found is None:
        return None
    if found.per_million is not None:
        per_input, per_output = found.per_million
        micros = per_input * input_tokens + per_output * output_tokens  # dollars a million tokens are micros a token
    else:
        micros = _graded(found, input_tokens, output_tokens)
    return Price(min(int(micros.to_integral_value(ROUND_CEILING)), MAX_MICROS), found.basis)


class _Model(NamedTuple):
    """A model's prices on a day. per_million: dollars for a million tokens in and out; None if they depend on how many."""

    prices: Any
    per_million: tuple[Decimal, Decimal] | None
    basis: str


@cache
def _version() -> str:
    return importlib.metadata.version("genai-prices")


@lru_cache(maxsize=1024)
def _model(provider: str, model: str, day: int) -> _Model | None:
    from genai_prices.data_snapshot import get_snapshot  # noqa: PLC0415 - 0.2 s that gates without prices need not wait

    try:
        at = datetime.datetime.fromtimestamp(day * MS_PER_DAY / 1000, datetime.UTC)
        owner, info = get_snapshot().find_provider_model(model, None, provider or None, None)
        prices = info.get_prices(at)
    except (LookupError, ValueError, OverflowError, OSError):  # no such model, or a time that no calendar has
        return None
    basis = f"price:{owner.id}:{info.id}@{_version()}"
    flat = [Decimal(0) if item is None else item for item in (prices.input_mtok, prices.output_mtok)]
    per_million = [item for item in flat if isinstance(item, Decimal)]
    return _Model(prices, (per_million[0], per_million[1]) if len(per_million) == 2 else None, basis)


def _graded(found: _Model, input_tokens: int, output_tokens: int) -> Decimal:
    from genai_prices import Usage  # noqa: PLC0415 - as above

    dollars = found.prices.calc_price(Usage(input_tokens=input_tokens, output_tokens=output_tokens))["total_price"]
    return Decimal(dollars) * 1_000_000

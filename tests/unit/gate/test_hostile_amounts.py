"""Whatever is declared, reported or learned: prices and estimates are amounts that a record can hold, and nothing raises."""

from __future__ import annotations

from typing import Any

import pytest
from genai_prices.data_snapshot import get_snapshot
from hypothesis import example, given
from hypothesis import strategies as st

from support.pure import Pair, chain, step
from tidegate.domain.identity import MAX_MICROS
from tidegate.domain.messages import Call
from tidegate.gate.budgets import AVERAGED_OVER, Estimate, estimate, learn
from tidegate.gate.state import Learned
from tidegate.prices import price

MOST = 2**63 - 1
KNOWN = [(provider.id, model.id) for provider in get_snapshot().providers for model in provider.models]
texts = st.text(max_size=40) | st.sampled_from(
    ["openai", "gpt-4o", "\x00", "a\nb", "*", "(", "[a-", "\ud800", "ﷺ" * 30]
)
models = st.tuples(texts, texts) | st.sampled_from(KNOWN)
amounts = st.integers(0, 10) | st.integers(0, MOST) | st.just(MOST)
times = st.integers(0, 4_000_000_000_000) | st.integers(0, MOST)
means = st.tuples(amounts, amounts, amounts, amounts, amounts)


@given(models, amounts, amounts, times)
@example(("openai", "gpt-4o"), 1, 1, MOST)
@example(("openai", "gpt-4o"), -1, 1, 0)
@example(("\ud800", "\ud800"), 1, 1, 0)
def test_a_price_is_an_amount_or_none(
    model: tuple[str, str], input_tokens: int, output_tokens: int, now_ms: int
) -> None:
    found = price(*model, input_tokens, output_tokens, now_ms)
    assert found is None or (type(found.micros) is int and 0 <= found.micros <= MAX_MICROS and found.basis)


@pytest.mark.parametrize("tokens", [0, 1, 200_001, 10**12])
def test_every_model_of_the_table_has_a_price_or_none(tokens: int) -> None:
    for provider, model in KNOWN:
        found = price(provider, model, tokens, tokens, 1_790_000_000_000)
        assert found is None or 0 <= found.micros <= MAX_MICROS, (provider, model)


@given(models, st.tuples(amounts, amounts, amounts, amounts), st.none() | means, times)
def test_an_estimate_is_made_of_amounts(
    model: tuple[str, str], declared: tuple[int, int, int, int], mean: tuple[int, ...] | None, now_ms: int
) -> None:
    call = Call(
        kind="tool",
        function="f",
        queue="q",
        arguments="{}",
        provider=model[0],
        model=model[1],
        idempotent=True,
        **dict(zip(("reserve_micros", "max_input_tokens", "max_output_tokens", "timeout_ms"), declared, strict=True)),
    )
    found = estimate(call, None if mean is None else Learned(3, mean), now_ms)
    assert isinstance(found, Estimate)
    assert all(type(amount) is int and 0 <= amount <= MOST for amount in found.amounts)


@given(st.lists(means, min_size=1, max_size=20), st.integers(1, AVERAGED_OVER))
def test_an_average_stays_between_what_was_used(used: list[tuple[int, ...]], count: int) -> None:
    learned = Learned(count, used[0])
    for one in used:
        learned = learn(learned, one)
    for at, mean in enumerate(learned.mean):
        assert min(one[at] for one in used) <= mean <= max(one[at] for one in used)
    assert 1 <= learned.count <= AVERAGED_OVER


@pytest.mark.feature("P2")
@pytest.mark.parametrize(
    "reported",
    [
        {"actual_micros": MOST},
        {"usage": {"input_tokens": MOST, "output_tokens": MOST}},
        {"usage": {"input_tokens": 10**12, "output_tokens": 1}},
        {"actual_micros": -1},
        {"usage": {"input_tokens": -1}},
    ],
)
def test_whatever_an_executor_reports_ends_the_reservation(reported: dict[str, Any]) -> None:
    pair = Pair(functions=("step:a",))
    pair.policy({"kind": "budget", "budget": "b", "version": "1", "limits": {"money_micros": 10**9}})
    pair.start("r", chain("a", a=step(provider="openai", model="gpt-4o", max_output_tokens=10)))
    task = pair.tasks.popleft()
    pair.answer(task, value=1, **reported)
    assert pair.run("r").status == "succeeded"
    bucket = next(iter(pair.ledger.buckets.values()))
    assert (bucket.open, bucket.reserved) == (0, (0, 0, 0, 0, 0))
    assert all(0 <= spent <= MOST for spent in bucket.spent)

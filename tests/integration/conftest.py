"""Whole systems for the tests of this folder: one that many share, and such as a test may break."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.lossy import LossyWay
from support.stack import WholeStack, assert_whole
from tidegate.embedded.kafka import EmbeddedKafka

# Longer than an executor's lease (10 s): begun before everything else, so that nobody waits for it.
LONG_S = 13.0
LONG_RUN = "longer-than-the-lease"


@pytest.fixture(scope="session")
def shared_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WholeStack]:
    """The stack for everything after which all processes must be as they were. Tests take `whole` instead."""
    with WholeStack(tmp_path_factory.mktemp("whole"), slots=12) as stack:
        stack.client.start("wait_here", LONG_S, run_id=LONG_RUN)
        stack.under_way.add(LONG_RUN)
        stack.until(LONG_RUN, "AttemptDispatched")
        yield stack


@pytest.fixture(scope="module")
def lossy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LossyWay]:
    """The only way to a broker of its own."""
    with LossyWay() as way:
        extra = {"advertised.listeners": f"PLAINTEXT://{way.address}"}
        kafka = EmbeddedKafka(tmp_path_factory.mktemp("lossy"), profile="quick", extra_config=extra)
        way.lead_to(lambda: kafka.bootstrap)
        with kafka:
            yield way
            way.lose_every = 0


@pytest.fixture
def whole(shared_stack: WholeStack) -> Iterator[WholeStack]:
    """The shared stack, checked after the test: see `assert_whole`."""
    yield shared_stack
    assert_whole(shared_stack, unfinished=shared_stack.under_way)


@pytest.fixture(scope="session")
def ask_policy(shared_stack: WholeStack, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Put a policy in force with the command line; returns the root of the accounts for which it asks about step `two`."""
    file = tmp_path_factory.mktemp("policy") / "ask.yaml"
    file.write_text(ASK_POLICY, encoding="utf-8")
    shared_stack.cli("policy", "apply", str(file))
    return "asked"


ASK_POLICY = """
policy: ask
version: "1"
rules:
  - name: ask-about-two
    when: account.startsWith('asked/') && step == 'two'
    then: require_approval
    reason: somebody must look
  - name: never-three
    when: account == 'asked/denied' && name == 'one'
    then: deny
    reason: not for this account
"""

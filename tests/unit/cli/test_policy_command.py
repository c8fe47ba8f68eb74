"""`tidegate policy`: what it says it did, no more than it did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from support.cluster import Cluster
from tidegate.cli import policy


def document(*names: str) -> dict[str, Any]:
    rules = [{"name": name, "when": "step == 'x'", "then": "deny", "reason": "no"} for name in names]
    return {"policy": "shop", "version": "1", "rules": rules}


@pytest.mark.parametrize(("names", "said"), [(("a",), "1 rule"), (("a", "b"), "2 rules")])
def test_publishing_and_removing_is_not_yet_deciding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], said: str
) -> None:
    broker = Cluster().broker
    monkeypatch.setattr(policy, "KafkaBroker", lambda _: broker)
    (tmp_path / "shop.yaml").write_text(yaml.safe_dump(document(*names)))
    applied = CliRunner().invoke(policy.app, ["apply", str(tmp_path / "shop.yaml")])
    assert applied.stdout == f"published shop@1: {said} (gates take it up within a second)\n"
    assert "shop" in CliRunner().invoke(policy.app, ["list"]).stdout
    removed = CliRunner().invoke(policy.app, ["remove", "shop"])
    assert removed.stdout == "removed shop (gates let go of it within a second)\n"
    assert "shop" not in CliRunner().invoke(policy.app, ["list"]).stdout


@pytest.mark.feature("P1")
def test_everything_that_is_wrong_with_cases_is_told_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "cases.yaml"
    file.write_text(
        "policies: [shop.yaml]\ncases:\n  - name: one\n    step: {tol: x}\n    expect: allow\n"
        "  - step: {tool: x}\n    expect: {effect: allowed}\n"
    )
    done = CliRunner().invoke(policy.app, ["test", str(file)])
    assert done.exit_code == 2
    said = [line.removeprefix(f"{file}:") for line in done.stderr.splitlines()]
    assert [line.partition(";")[0] for line in said] == [
        "4: cases.0.step: unknown: tol",
        "6: cases.1.name: Field required",
        "7: cases.1.expect.effect: Input should be 'allow', 'deny' or 'require_approval'",
        "7: cases.1.expect: Input should be 'allow', 'deny' or 'require_approval'",
    ]
    file.write_text("")
    assert "it holds 0 documents, not one" in CliRunner().invoke(policy.app, ["test", str(file)]).stderr

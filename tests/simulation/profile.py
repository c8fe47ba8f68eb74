"""What goes wrong, and how often: drawn from the seed, so that every seed is a different kind of bad day."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from tidegate.eventlog.settings import CheckpointSettings


@dataclass(frozen=True, slots=True)
class Profile:
    """Chances per edge and weights per step. A weight of 0 means never.

    crash, stop, fail: chance, at each edge (a call of the broker), that the process is killed there, stopped there while others
    go on, or that its writer's acknowledgements are lost. failpoint_passes: up to how many passes of a named failpoint it takes
    until a process dies there or is stopped; 0 for never. look_back: `epochs.FIRST_SPAN`; it must be more than what owners whose
    epoch is over can write one after another, here as in the real world.
    """

    crash: float
    stop: float
    fail: float
    failpoint_passes: int
    weights: dict[str, float]
    replicas: dict[str, int]
    lease_ms: int
    announce_every: int
    record_positions_every_s: float
    look_back: int
    task_partitions: int
    checkpoints: CheckpointSettings


FAULTS = {  # what the world can do between turns, with its weight when it happens at all
    "kill": 0.2,
    "freeze": 0.15,
    "suspend": 0.2,
    "drain": 0.3,
    "twin": 0.1,
    "hide_beats": 0.05,
    "unregister": 0.03,
    "cut_off": 0.15,
    "broker_away": 0.06,
    "expire": 0.1,
    "compact": 0.5,
    "retain": 0.4,
    "land": 0.5,
    "jump_clock": 0.3,
    "repeat_mail": 0.6,
    "rubbish": 0.3,
    "forge": 0.3,
    "damage_snapshots": 0.0,
}
WORK = {
    "turn": 100.0,
    "advance": 10.0,
    "long_advance": 0.15,
    "start_run": 1.8,
    "cancel": 0.2,
    "answer": 1.2,
    "signal": 0.8,
    "respond": 0.8,
    "pause_run": 0.3,
    "resume_run": 0.3,
    "control": 0.5,
    "repeat_request": 0.3,
    "bad_request": 0.4,
    "publish_workflow": 0.1,
    "publish_policy": 0.15,
    "publish_limit": 0.1,
    "publish_budget": 0.2,
    "top_up": 0.15,
    "publish_retry": 0.1,
}


def draw(rng: Random) -> Profile:
    """Return the profile of a seed: some kinds of faults are left out, so that others are not drowned by them."""
    weights = dict(WORK)
    for name, weight in FAULTS.items():
        weights[name] = weight * rng.choice((0.0, 1.0, 1.0, 3.0))
    weights["damage_snapshots"] = rng.choice((0.0, 0.0, 0.0, 0.3))
    weights["publish_policy"] *= rng.choice((0, 1, 1))
    weights["pause_run"] *= rng.choice((0, 1, 1))
    weights["control"] *= rng.choice((0, 1, 1))
    weights["publish_budget"] *= rng.choice((0, 1, 1))
    weights["publish_limit"] *= rng.choice((0, 1, 3))
    return Profile(
        crash=rng.choice((0.0, 0.0001, 0.0003, 0.001)),
        stop=rng.choice((0.0, 0.0001, 0.0005)),
        fail=rng.choice((0.0, 0.0, 0.001, 0.005)),
        failpoint_passes=rng.choice((0, 300, 1_000, 3_000)),
        weights=weights,
        replicas={
            "scheduler": rng.choice((1, 2, 2, 3)),
            "gate": rng.choice((1, 2, 2)),
            "admission": rng.choice((1, 2)),
            "projection": 1,
            "executor": rng.choice((1, 2, 3)),
        },
        lease_ms=rng.choice((2_500, 4_000)),
        announce_every=rng.choice((3, 10, 1_000)),
        record_positions_every_s=rng.choice((1.0, 20.0)),
        look_back=rng.choice((100, 1_000)),
        task_partitions=rng.choice((1, 2)),
        checkpoints=CheckpointSettings(
            every_entries=rng.choice((1, 5, 30, 10_000)),
            every_s=rng.choice((0.2, 2.0, 60.0)),
            units_per_turn=rng.choice((1, 3, 200)),
            rest_after_s=rng.choice((0.0, 1.0, 60.0)),
        ),
    )

"""The registry of processes (topic `instances`): registration, heartbeats, lease, farewell. Used by every service."""

from tidegate.registry.lease import Lease
from tidegate.registry.process import ProcessIdentity, boottime_s, this_process
from tidegate.registry.registration import (
    InstanceIdTakenError,
    Load,
    Registration,
    TaskFeed,
    mark_name,
    task_partition_of,
    task_topic,
)

__all__ = [
    "InstanceIdTakenError",
    "Lease",
    "Load",
    "ProcessIdentity",
    "Registration",
    "TaskFeed",
    "boottime_s",
    "mark_name",
    "task_partition_of",
    "task_topic",
    "this_process",
]

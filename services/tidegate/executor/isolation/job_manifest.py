"""The Job of one attempt, as Kubernetes takes it."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from tidegate.executor.isolation.errand import Errand
from tidegate.executor.isolation.process import RUNNER
from tidegate.executor.settings import ExecutorSettings
from tidegate.sdk.functions import Settings

LABEL: Final = "tidegate.dev/"
CONTAINER: Final = "function"
CLOCKS_APART_S: Final = 5.0  # the most that the clocks of nodes may differ by
END_S: Final = 10.0  # for a function that is over to be seen to be over
KEPT_S: Final = 600  # a Job that nobody deletes, because its executor is no more, is deleted so long after its end
UID: Final = 10001
_VALUE: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")


class Owner(NamedTuple):
    """Whose Jobs they are. namespace: of the executor's own pod: two installations may share a namespace for Jobs."""

    namespace: str
    instance_id: str

    def labels(self) -> dict[str, str]:
        """Return the labels by which an executor finds its own Jobs."""
        return {
            "app.kubernetes.io/managed-by": "tidegate",
            f"{LABEL}namespace": label_value(self.namespace),
            f"{LABEL}instance": label_value(self.instance_id),
        }

    def selector(self) -> str:
        """Return the selector of exactly these labels."""
        return ",".join(f"{key}={value}" for key, value in self.labels().items())


class Limits(NamedTuple):
    """The times of a Job, in seconds from its making, each counted from the same start allowance.

    enter_s: until then the function may be entered. given_up_s: not before then a Job that did not begin is given up, so that
    clocks which differ do not let it begin afterwards. over_s: everything is over, by Kubernetes' own hand if need be.
    """

    enter_s: float
    given_up_s: float
    over_s: float


def limits_of(errand: Errand, settings: ExecutorSettings) -> Limits:
    """Return the times of the Job of an errand."""
    enter_s = settings.job_start_s
    return Limits(enter_s, enter_s + CLOCKS_APART_S, enter_s + CLOCKS_APART_S + errand.timeout_ms / 1000 + END_S)


def label_value(text: str) -> str:
    """Return a text as a label may hold it: itself, or if it cannot, a digest of it."""
    return text if _VALUE.fullmatch(text) else hashlib.sha256(text.encode()).hexdigest()[:40]


def name_of(errand: Errand, incarnation: str) -> str:
    """Return the name of the Job of an attempt: the same however often we try to make it, and no other's."""
    one = "\n".join((incarnation, errand.context.run_id, errand.context.step_id, str(errand.context.attempt)))
    return f"tidegate-{hashlib.sha256(one.encode()).hexdigest()[:32]}"


def manifest(
    errand: Errand,
    function: Settings,
    settings: ExecutorSettings,
    owner: Owner,
    *,
    name: str,
    variables: Mapping[str, str],
) -> dict[str, Any]:
    """Return the Job: one pod, never a second one, restricted as Pod Security demands, with no rights at the API server."""
    context = errand.context
    labels = owner.labels() | {
        f"{LABEL}job": name,
        f"{LABEL}run": label_value(context.run_id),
        f"{LABEL}step": label_value(context.step_id),
        f"{LABEL}attempt": str(context.attempt),
    }
    annotations = {f"{LABEL}run-id": context.run_id, f"{LABEL}step-id": context.step_id}
    metadata = {"labels": labels, "annotations": annotations}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, **metadata},
        "spec": {
            "backoffLimit": 0,
            "completions": 1,
            "parallelism": 1,
            "podReplacementPolicy": "Failed",
            "activeDeadlineSeconds": math.ceil(limits_of(errand, settings).over_s),
            "ttlSecondsAfterFinished": KEPT_S,
            "template": {"metadata": metadata, "spec": _pod(function, settings, variables, errand.app)},
        },
    }


def _pod(function: Settings, settings: ExecutorSettings, variables: Mapping[str, str], app: str) -> dict[str, Any]:
    memory = f"{function.memory_mib or settings.job_memory_mib}Mi"
    environment = {
        "HOME": "/tmp",  # noqa: S108 - an emptyDir of the pod's own
        "TIDEGATE_EXECUTOR_APP": app,
        **settings.job_env,
        **variables,
    }
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 1,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": UID,
            "runAsGroup": UID,
            "fsGroup": UID,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        **settings.job_pod,
        "containers": [
            {
                "name": CONTAINER,
                "image": function.image or settings.job_image,
                "imagePullPolicy": settings.job_pull_policy,
                "command": ["python", "-m", RUNNER, "--job"],
                "env": [{"name": key, "value": value} for key, value in environment.items()],
                "envFrom": [{"secretRef": {"name": secret}} for secret in settings.job_env_secrets],
                "resources": {
                    "requests": {"cpu": f"{function.cpu_millis or settings.job_cpu_millis}m", "memory": memory},
                    "limits": {"memory": memory},
                },
                "securityContext": {
                    "allowPrivilegeEscalation": False,
                    "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]},
                },
                "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],  # noqa: S108 - as above
            }
        ],
        "volumes": [{"name": "tmp", "emptyDir": {}}],
    }

"""The Kubernetes API as we use it: requests with dictionaries in and out, by whatever the official client finds to log in with."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

REQUEST_TIMEOUT_S: Final = 15.0
MAX_ANSWER_BYTES: Final = 64 * 1024 * 1024
FORBIDDEN: Final = 403
NOT_FOUND: Final = 404
CONFLICT: Final = 409
MERGE_PATCH: Final = "application/merge-patch+json"
_NAMESPACE_FILE: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class ClusterApiError(RuntimeError):
    """The API server refused, or could not be asked. `status`: of HTTP; 0 if there was no answer."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class ClusterApi:
    """One API server. Thread-safe. Nothing is repeated here: who asks knows whether that is harmless."""

    def __init__(self) -> None:
        """Find the API server and the credentials: KUBECONFIG if it is set, else those of the pod, else of `~/.kube/config`.

        Raises ClusterApiError if there are none.
        """
        try:
            client: Any = importlib.import_module("kubernetes.client")  # an optional dependency
            config: Any = importlib.import_module("kubernetes.config")
        except ImportError:
            raise ClusterApiError(
                "the Kubernetes client is not installed: pip install 'tidegate[kubernetes]'"
            ) from None
        configuration = client.Configuration()
        configuration.retries = False
        try:
            if os.environ.get("KUBERNETES_SERVICE_HOST") and not os.environ.get("KUBECONFIG"):
                config.load_incluster_config(configuration)
            else:
                # Named, because the client looks at the variable only once.
                config.load_kube_config(os.environ.get("KUBECONFIG"), client_configuration=configuration)
        except (config.ConfigException, OSError) as error:
            raise ClusterApiError(f"no way to log in to a Kubernetes API server: {error}") from None
        self._client = client.ApiClient(configuration)

    def request(
        self, method: str, path: str, *, query: Mapping[str, str] | None = None, body: Any = None
    ) -> dict[str, Any]:
        """Return the API server's answer, an object. Blocks. Raises ClusterApiError."""
        answer: dict[str, Any] = json.loads(self.text(method, path, query=query, body=body) or "{}")
        return answer

    def text(self, method: str, path: str, *, query: Mapping[str, str] | None = None, body: Any = None) -> str:
        """Return the API server's answer as it is. Blocks. Raises ClusterApiError, also if there is too much of it."""
        headers = {"Accept": "application/json, */*"}
        if body is not None:
            headers["Content-Type"] = MERGE_PATCH if method == "PATCH" else "application/json"
        try:
            asked = self._client.param_serialize(
                method,
                path,
                query_params=list((query or {}).items()),
                header_params=headers,
                body=body,
                auth_settings=["BearerToken"],
            )
            response = self._client.call_api(*asked, _request_timeout=REQUEST_TIMEOUT_S)
            data: bytes = response.response.read(MAX_ANSWER_BYTES + 1)
            response.response.release_conn()
        except Exception as error:  # the client lets through what urllib3, ssl and its plug-ins for logging in raise
            raise ClusterApiError(f"{method} {path}: {type(error).__name__}: {error}") from error
        if len(data) > MAX_ANSWER_BYTES:
            raise ClusterApiError(f"{method} {path}: the answer is larger than {MAX_ANSWER_BYTES} bytes")
        text = data.decode("utf-8", "replace")
        if response.status >= 300:
            raise ClusterApiError(f"{method} {path}: {response.status} {_reason(text)}", response.status)
        return text

    async def ask(
        self, method: str, path: str, *, query: Mapping[str, str] | None = None, body: Any = None
    ) -> dict[str, Any]:
        """As `request`, without blocking the event loop."""
        return await asyncio.to_thread(self.request, method, path, query=query, body=body)

    async def ask_text(self, method: str, path: str, *, query: Mapping[str, str] | None = None) -> str:
        """As `text`, without blocking the event loop."""
        return await asyncio.to_thread(self.text, method, path, query=query)


def own_namespace() -> str:
    """Return the namespace of the pod that this process runs in; `default` outside of a pod."""
    try:
        return _NAMESPACE_FILE.read_text(encoding="utf-8").strip()
    except OSError:
        return "default"


def _reason(text: str) -> str:
    try:
        return str(json.loads(text)["message"])
    except (ValueError, LookupError, TypeError):
        return text[:500]

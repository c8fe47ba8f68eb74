"""For how long a development stack waits for its parts."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tidegate.embedded.stack import Patience, records_left

pytestmark = pytest.mark.feature("K1")


def test_it_waits_as_long_as_less_is_left_and_no_longer() -> None:
    patience = Patience(90, now_s=0)
    assert not patience.is_over(90)
    patience.note(1_000, 80)
    patience.note(400, 160)
    assert not patience.is_over(250)
    patience.note(400, 240)
    patience.note(None, 245)
    patience.note(700, 248)  # more was written meanwhile: that is no progress
    assert not patience.is_over(250)
    assert patience.is_over(251)


@contextmanager
def answering(status: int, body: bytes) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/ready" else 404)
            self.end_headers()
            self.wfile.write(body)

        log_message: Callable[..., None] = lambda *_: None

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "body", "left"),
    [(503, b'{"ready":false,"lag":12}', 12), (503, b'{"ready":false,"lag":null}', None), (404, b"nothing", None)],
)
def test_the_live_view_says_how_much_it_has_to_read(tmp_path: Path, status: int, body: bytes, left: int | None) -> None:
    with answering(status, body) as url:
        (tmp_path / "gateway.json").write_text(json.dumps({"url": url}))
        assert records_left(tmp_path) == left
    assert records_left(tmp_path) is None  # it is gone
    (tmp_path / "gateway.json").unlink()
    assert records_left(tmp_path) is None

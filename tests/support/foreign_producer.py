"""librdkafka as programs in other languages use it."""

from __future__ import annotations

import ctypes
import time
from pathlib import Path

import confluent_kafka
import pytest

PATIENCE_S = 30.0


class _Bytes(ctypes.Structure):
    _fields_ = (("pointer", ctypes.c_char_p), ("size", ctypes.c_size_t))


class _Header(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("value", ctypes.c_char_p), ("size", ctypes.c_ssize_t))


class _Any(ctypes.Union):
    _fields_ = (
        ("text", ctypes.c_char_p),
        ("number", ctypes.c_int32),
        ("bytes", _Bytes),
        ("header", _Header),
        ("room", ctypes.c_char * 64),
    )


class _Argument(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int), ("any", _Any))


class ForeignProducer:
    """librdkafka as programs in C use it, with what the Python package around it does not let through."""

    TOPIC, PARTITION, VALUE, KEY, HEADER = 1, 3, 4, 5, 9

    def __init__(self, bootstrap: str) -> None:
        beside = Path(confluent_kafka.__file__).parent.with_name("confluent_kafka.libs")
        found = next(beside.glob("librdkafka-*.so*"), None)
        if found is None:
            pytest.skip("the Python package does not bring its own librdkafka")
        self._c = ctypes.CDLL(str(found))
        for function in ("rd_kafka_conf_new", "rd_kafka_new", "rd_kafka_produceva"):
            getattr(self._c, function).restype = ctypes.c_void_p
        error = ctypes.create_string_buffer(512)
        config = ctypes.c_void_p(self._c.rd_kafka_conf_new())
        self._c.rd_kafka_conf_set(config, b"bootstrap.servers", bootstrap.encode(), error, 512)
        self._client = ctypes.c_void_p(self._c.rd_kafka_new(0, config, error, 512))
        assert self._client, error.value

    def produce(self, topic: bytes, header: bytes, header_value: bytes | None) -> None:
        arguments = (_Argument * 5)()
        for argument, kind in zip(
            arguments, (self.TOPIC, self.PARTITION, self.VALUE, self.KEY, self.HEADER), strict=True
        ):
            argument.kind = kind
        arguments[0].any.text = topic
        arguments[1].any.number = 0
        arguments[2].any.bytes = _Bytes(b"payload", 7)
        arguments[3].any.bytes = _Bytes(b"key", 3)
        arguments[4].any.header = _Header(header, header_value, len(header_value or b""))
        assert not self._c.rd_kafka_produceva(self._client, arguments, 5)

    def __enter__(self) -> ForeignProducer:
        return self

    def __exit__(self, *_: object) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while self._c.rd_kafka_outq_len(self._client):
            assert time.monotonic() < deadline, "not acknowledged"
            self._c.rd_kafka_flush(self._client, 100)
        self._c.rd_kafka_destroy(self._client)

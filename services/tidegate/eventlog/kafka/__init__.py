"""The log on Kafka: with `subscription.py` in here the only package that knows confluent-kafka."""

from tidegate.eventlog.kafka.broker import KafkaBroker

__all__ = ["KafkaBroker"]

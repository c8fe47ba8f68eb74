"""The log on Kafka: the only package that knows confluent-kafka."""

from tidegate.eventlog.kafka.broker import KafkaBroker

__all__ = ["KafkaBroker"]

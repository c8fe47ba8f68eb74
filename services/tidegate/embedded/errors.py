"""What goes wrong with the embedded broker, said so that a newcomer knows what to do next."""


class EmbeddedKafkaError(Exception):
    """The embedded Kafka cannot be prepared, started or kept running. The message says what to do."""


class JarsUnavailableError(EmbeddedKafkaError):
    """Some of Kafka's jars are neither cached nor to be fetched now."""


class JarsMismatchError(EmbeddedKafkaError):
    """A jar is not the one that this release of Tidegate was built with."""

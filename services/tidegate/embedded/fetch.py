"""Have all in the cache that starts of the embedded Kafka need: `python -m tidegate.embedded.fetch`, as images do.

The same as `tidegate kafka --fetch-only`, without the rest of Tidegate, so that an image can do it before that is there.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tidegate.embedded.errors import EmbeddedKafkaError
from tidegate.embedded.kafka import EmbeddedKafka

if __name__ == "__main__":
    try:
        EmbeddedKafka(Path()).fetch()
    except EmbeddedKafkaError as error:
        sys.exit(str(error))

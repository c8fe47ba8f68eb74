"""The Faust app, bent to our rules: declared topics only, our partitions, our socket, and tables whose rows know their age.

Faust's own promises are not relied on (see the room's README): offsets are acknowledged by hand, after the rows that
follow from them are, and what a changelog says is taken only if it is not older than what is known.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable, Iterable
from socket import socket
from typing import Any, Final, NamedTuple, Protocol, cast

import faust
import msgspec
import structlog
from aiohttp.web import SockSite
from faust.assignor.client_assignment import ClientMetadata
from faust.assignor.partition_assignor import PartitionAssignor
from faust.serializers import codecs
from faust.stores import memory
from faust.tables.manager import TableManager
from faust.types import TP, EventT, FutureMessage
from faust.web.drivers.aiohttp import Web

from tidegate.domain.identity import partition_of
from tidegate.eventlog.interface import EventLogError
from tidegate.eventlog.settings import KafkaSettings
from tidegate.gateway.figures import Tally, partition_of_tally
from tidegate.gateway.view import RunRow

ROW_CODEC: Final = "tidegate-run-row"
TALLY_CODEC: Final = "tidegate-tally"
RUN_EVENTS: Final = "run-events"
GATEWAY_RUNS: Final = "gateway-runs"
GATEWAY_FIGURES: Final = "gateway-figures"
TABLES: Final = (GATEWAY_RUNS, GATEWAY_FIGURES)
STANDBYS: Final = 1  # gateways that keep a copy of each partition beside the one that owns it
REQUEST_TIMEOUT_S: Final = 40.0

_log = structlog.get_logger()
# Each row that waits for the broker is a warning to Faust. That it waits for acknowledgements is what we do with every batch.
logging.getLogger("faust.transport.producer").setLevel(logging.ERROR)


class Row(Protocol):
    """What a table of the view holds: something that knows which of two of its kind is the older one."""

    def is_older_than(self, other: Any) -> bool: ...


class _RowCodec(codecs.Codec):
    """Rows as JSON. A row that this version cannot read counts as none."""

    def __init__(self, row_type: type[Row]) -> None:
        super().__init__()
        self._encoder = msgspec.json.Encoder()
        self._decoder = msgspec.json.Decoder(row_type)

    def _dumps(self, obj: Any) -> bytes:
        return self._encoder.encode(obj)

    def _loads(self, s: bytes) -> Any:
        try:
            return self._decoder.decode(s)
        except msgspec.MsgspecError as error:
            _log.error("row of the changelog skipped", error=str(error))
            return None


codecs.register(ROW_CODEC, _RowCodec(RunRow))
codecs.register(TALLY_CODEC, _RowCodec(Tally))


class KeptStore(memory.Store):  # type: ignore[type-arg] # its type parameters are Faust's own business
    """Rows in memory, and up to which offset of each partition of the changelog they are all here.

    Faust's own store in memory forgets what it has whenever the group gives out its partitions. This one answers as those on disk
    do, so that Faust reads on where it was: as the owner, and for partitions that we stand by for.
    """

    table: ViewTable

    def __post_init__(self) -> None:
        super().__post_init__()
        self.read_to: dict[int, int] = {}  # partition -> offset of the last record that we have, -1 for none

    def _clear(self) -> None:
        super()._clear()
        self.read_to.clear()

    def persisted_offset(self, tp: TP) -> int | None:
        """Return up to where Faust need not read; None if it is not known that we have anything."""
        return self.read_to.get(tp.partition)

    def set_persisted_offset(self, tp: TP, offset: int) -> None:
        """Note that the changelog has a record of ours. It says nothing of what others may have written before it."""
        if self.read_to.get(tp.partition) == offset - 1:
            self.read_to[tp.partition] = offset

    async def on_recovery_completed(self, active_tps: set[TP], standby_tps: set[TP]) -> None:
        """Forget what is neither ours nor one of those that we stand by for."""
        kept = {tp.partition for tp in active_tps | standby_tps}
        for key in [key for key in self.data if self.table.partition_of_key(key) not in kept]:
            del self.data[key]
        for partition in self.read_to.keys() - kept:
            del self.read_to[partition]


class ViewTable(faust.Table[str, Row]):
    """Rows by key, in memory and in a changelog whose partitions are those of `run-events`."""

    row_type: type[Row]
    partition_of_key: Callable[[str], int]
    unacknowledged: list[FutureMessage]
    changelog_records: int  # that Faust has read

    def __post_init__(self) -> None:
        super().__post_init__()
        self.unacknowledged = []
        self.changelog_records = 0

    def partition_for_key(self, key: Any) -> int:
        """Return the key's partition, whatever event is being handled (Faust would take that event's)."""
        return self.partition_of_key(key)

    def send_changelog(self, *args: Any, **options: Any) -> FutureMessage:
        """Send a change and remember it until somebody waits for all of them."""
        sent = super().send_changelog(*args, **options)
        self.unacknowledged.append(sent)
        return sent

    def _new_store_by_url(self, url: Any) -> KeptStore:
        return KeptStore(url, self.app, self, table_name=self.name, key_type=self.key_type)

    @property
    def store(self) -> KeptStore:
        """Return the rows as they are kept."""
        return cast(KeptStore, self.data)

    def apply_changelog_batch(self, batch: Iterable[EventT[Any]]) -> None:
        """Take what Faust has read of the changelog, as far as it comes without a gap; `changelog.py` reads the gaps."""
        topic = self.changelog_topic.get_topic_name()
        read_to = self.store.read_to
        for event in batch:
            message = event.message
            if message.topic != topic:
                continue  # what is left of a partition that is not ours any more, Faust hands to any table
            self.changelog_records += 1
            if read_to.get(message.partition) == message.offset - 1:
                self.take(cast(str, event.key), cast(Row | None, event.value), is_tombstone=message.value is None)
                read_to[message.partition] = message.offset

    def decoded(self, value: bytes) -> Row | None:
        """Return the row of a record of the changelog; None if this version cannot read it."""
        return cast(Row | None, codecs.get_codec(self.value_serializer).loads(value))

    def take(self, key: str, row: Row | None, *, is_tombstone: bool = False) -> None:
        """Take a row from the changelog, but none that is older than the one known, nor one that cannot be read.

        The last record of a key need not be the newest: a worker that had lost the partition may have written it.
        """
        rows = self.store.data
        if is_tombstone:
            rows.pop(key, None)
        elif row is not None:
            known = rows.get(key)
            if known is None or not row.is_older_than(known):
                rows[key] = row


class _OneSocketWeb(Web):
    """Serves on a socket that is bound already, so that its port is known before Faust tells it to others."""

    def _new_transport_tcp(self) -> SockSite:
        app = self.app
        assert isinstance(app, GatewayApp)  # noqa: S101 - only GatewayApp makes it
        return SockSite(self._runner, app.listening)


class RestartedAssignor(PartitionAssignor):
    """Faust's assignor for static members whose address may change.

    A static member that comes back gets its old assignment, and with it the address that it had before: Faust would stop
    at the contradiction. Other gateways learn of the new address when the group next gives out its partitions.
    """

    def on_assignment(self, assignment: Any) -> None:
        """Take an assignment, with our present address in it."""
        metadata = ClientMetadata.loads(self._decompress(assignment.user_data))
        old, new = metadata.url, str(self._url)
        if old != new:
            distribution = dict(metadata.changelog_distribution)
            if old in distribution:
                distribution[new] = distribution.pop(old)
            metadata = metadata.derive(url=new, changelog_distribution=distribution)
            user_data = self._compress(metadata.dumps())
            assignment = type(assignment)(assignment.version, assignment.assignment, user_data)
        super().on_assignment(assignment)


class PromptTables(TableManager):
    """Faust's table manager without the second that it sleeps at start."""

    async def on_start(self) -> None:
        """Announce the changelogs, so that the consumer can subscribe to everything at once."""
        await self._update_channels()
        await self.recovery.start()


class GatewayApp(faust.App):
    """A Faust app without folders, on a socket of ours."""

    listening: socket

    def _create_directories(self) -> None:
        """Make none: the store is in memory."""

    def _new_web(self) -> Web:
        return _OneSocketWeb(self)


def make_app(
    kafka: KafkaSettings, *, group: str, instance_id: str, listening: socket, advertised_url: str
) -> GatewayApp:
    """Return an app that consumes as static member `instance_id` of `group`. Raises EventLogError for what Faust cannot do."""
    heartbeat_s = kafka.heartbeat_interval_ms / 1000
    app = GatewayApp(
        kafka.topic_prefix + group,
        env_prefix="TIDEGATE_FAUST",  # nothing of ours: else Faust listens to variables such as WEB_PORT
        broker=";".join(f"kafka://{address.strip()}" for address in kafka.bootstrap.split(",")),
        broker_client_id=kafka.client_id,
        broker_credentials=_credentials(kafka),
        broker_session_timeout=kafka.session_timeout_ms / 1000,
        broker_heartbeat_interval=heartbeat_s,
        broker_request_timeout=max(REQUEST_TIMEOUT_S, kafka.session_timeout_ms / 1000),
        broker_commit_interval=1.0,
        consumer_group_instance_id=instance_id,
        consumer_auto_offset_reset="earliest",
        processing_guarantee="at_least_once",
        topic_allow_declare=False,
        topic_disable_leader=True,
        store="memory://",
        table_standby_replicas=STANDBYS,
        stream_wait_empty=False,
        web_enabled=True,
        web_host=listening.getsockname()[0],
        web_port=listening.getsockname()[1],
        canonical_url=advertised_url,
        web_stats_enabled=False,
        web_graph_enabled=False,
        web_router_enabled=False,
        web_tables_enabled=False,
        web_metrics_enabled=False,
        Table=ViewTable,
        TableManager=PromptTables,
        PartitionAssignor=RestartedAssignor,
        autodiscover=False,
    )
    app.listening = listening
    return app


class ViewTables(NamedTuple):
    """The tables of an app: rows of runs by run id, tallies by their keys."""

    runs: ViewTable
    figures: ViewTable


def make_tables(app: GatewayApp, prefix: str, partition_count: int) -> ViewTables:
    """Return the app's tables, whose changelogs are the declared topics."""

    def of_run(run_id: str) -> int:
        return partition_of(run_id, partition_count)

    return ViewTables(
        _make_table(app, prefix, GATEWAY_RUNS, partition_count, RunRow, ROW_CODEC, of_run),
        _make_table(app, prefix, GATEWAY_FIGURES, partition_count, Tally, TALLY_CODEC, partition_of_tally),
    )


def _make_table(
    app: GatewayApp,
    prefix: str,
    name: str,
    partition_count: int,
    row_type: type[Row],
    codec: str,
    partition_of_key: Callable[[str], int],
) -> ViewTable:
    changelog = app.topic(
        prefix + name,
        key_type=str,
        key_serializer="raw",
        value_serializer=codec,
        partitions=partition_count,
        internal=True,
        acks=False,
        allow_empty=True,
    )
    table = app.Table(name, key_type=str, changelog_topic=changelog, partitions=partition_count)
    assert isinstance(table, ViewTable)  # noqa: S101 - the class that the app was given
    table.key_serializer = "raw"
    table.value_serializer = codec
    table.row_type, table.partition_of_key = row_type, partition_of_key
    return table


def _credentials(kafka: KafkaSettings) -> Any:
    """Return Faust's form of how to be let in. Raises EventLogError for mechanisms that it has no support for."""
    context = _ssl_context(kafka) if kafka.security_protocol in {"ssl", "sasl_ssl"} else None
    if kafka.security_protocol in {"plaintext", "ssl"}:
        return None if context is None else faust.SSLCredentials(context)
    if kafka.sasl_mechanism not in {"PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"}:
        raise EventLogError(
            f"the gateway cannot authenticate with {kafka.sasl_mechanism}: set TIDEGATE_KAFKA_SASL_MECHANISM to PLAIN, "
            "SCRAM-SHA-256 or SCRAM-SHA-512 for it"
        )
    credentials = kafka.credentials()
    assert credentials is not None  # noqa: S101 - the settings refuse a mechanism without
    return faust.SASLCredentials(
        username=credentials.username,
        password=credentials.password.get_secret_value(),
        mechanism=kafka.sasl_mechanism,
        ssl_context=context,
    )


def _ssl_context(kafka: KafkaSettings) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=kafka.ssl_ca_location)
    if kafka.ssl_endpoint_identification_algorithm == "none":
        context.check_hostname = False
    if kafka.ssl_certificate_location:
        context.load_cert_chain(kafka.ssl_certificate_location, kafka.ssl_key_location, kafka.key_password())
    return context

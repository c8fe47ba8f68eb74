"""Which queries the read-only endpoint runs, as the engine formats them. With the engine: tests/integration."""

import pytest

from tidegate.projection.read_only import READONLY_CODE, RefusedError, check, check_format, refused_functions

REFUSED = refused_functions(
    ["file", "aiGenerate", "AIFilter", "catboostEvaluate", "showCertificate", "length", "airport", "arrayMap"],
    ["file", "url", "s3", "numbers", "values", "remote", "executable"],
)


@pytest.mark.parametrize(
    "query",
    [
        "SELECT 1",
        "SELECT count() FROM runs WHERE status = 'failed'",
        "(SELECT 1) UNION ALL (SELECT 2)",
        "WITH 1 AS x SELECT x",
        "SHOW TABLES",
        "DESCRIBE TABLE runs",
        "EXPLAIN SELECT 1",
        "EXISTS TABLE runs",
        "SELECT * FROM numbers(3)",
        "SELECT 'INTO OUTFILE x; file(', length(`a;b`)",
        "SELECT airport, url FROM runs",
        "SELECT 1 SETTINGS limit = 3",
        "SELECT * FROM (SELECT 1 AS SETTINGS)",
    ],
)
def test_reading_is_served(query: str) -> None:
    assert check(query, REFUSED) == ""


@pytest.mark.parametrize(
    "query",
    [
        "",
        "INSERT INTO runs FORMAT Values",
        "DROP TABLE runs",
        "SET readonly = 0",
        "USE system",
        "SYSTEM FLUSH LOGS",
        "KILL QUERY WHERE 1 ASYNC",
        "`SELECT` 1",
        "SELECT 1 INTO OUTFILE 'x'",
        "SELECT 1; DROP TABLE runs",
        "SELECT file('/etc/passwd')",
        "SELECT `file`('/etc/passwd')",
        "SELECT \"FILE\"('/etc/passwd')",
        "SELECT * APPLY(file) FROM (SELECT '/etc/passwd')",
        "SELECT arrayMap(file, ['/etc/passwd'])",
        "SELECT aiGenerate('x')",
        "SELECT aifilter('x')",
        "SELECT * FROM url('http://127.0.0.1/')",
        "SELECT * FROM executable ('x')",
        "DESCRIBE TABLE s3('x')",
        "EXPLAIN SELECT file('x')",
        "SELECT * FROM (SELECT 1 SETTINGS max_threads = 64)",
        "SELECT (SELECT 1 SETTINGS limit = 1, readonly = 0)",
        "SELECT * FROM system.stack_trace",
    ],
)
def test_everything_else_is_refused(query: str) -> None:
    with pytest.raises(RefusedError) as caught:
        check(query, REFUSED)

    assert caught.value.code == READONLY_CODE


@pytest.mark.parametrize(
    ("query", "asked"),
    [
        ("SELECT 1 FORMAT JSON", "JSON"),
        ("SELECT 1 SETTINGS limit = 3 FORMAT CSVWithNames", "CSVWithNames"),
        ("SELECT * FROM (SELECT 1 AS FORMAT FORMAT JSON)", ""),
        ("SELECT 'x FORMAT JSON'", ""),
        ("SELECT `FORMAT` JSON", ""),
    ],
)
def test_the_format_that_the_query_asks_for_is_found(query: str, asked: str) -> None:
    assert check(query, REFUSED) == asked


@pytest.mark.parametrize("name", ["DataFrame", "ArrowTable", "dataStore", "JSON; DROP", "a/b", "JSON\n"])
def test_formats_that_cannot_be_sent_are_refused(name: str) -> None:
    with pytest.raises(RefusedError):
        check_format(name)

"""How commands about runs and workflows end: exit codes for scripts, and problems as lines for people."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, NoReturn

import pydantic
import typer

from tidegate.cli.live_view import BadQuestionError, LiveViewError, NothingCountedError, UnknownRunError
from tidegate.cli.terminal import say
from tidegate.domain import states
from tidegate.domain.canonical import NotJsonError
from tidegate.domain.requests import RequestError
from tidegate.domain.workflow import DefinitionError
from tidegate.eventlog.interface import EventLogError
from tidegate.eventlog.settings import KafkaSettings
from tidegate.process import settings_problems
from tidegate.sdk.errors import AppError, PublishConflictError, RunNotFinishedError, RunNotFoundError

CLIENT_LINE_EVERY_S: Final = 15.0

EXIT_OK: Final = 0
EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_NO_ANSWER: Final = 3
EXIT_REFUSED: Final = 4
EXIT_CANCELLED: Final = 5
EXIT_NEEDS_HUMAN: Final = 6
EXIT_TIMEOUT: Final = 7

RUN_EXIT_CODES: Final = (
    "Exit codes: 0 done, or the run succeeded; 1 it failed; 2 wrong usage; 3 Kafka, the scheduler or the gateway does not "
    "answer; 4 refused, or there is no such run; 5 the run was cancelled; 6 it needs a human; 7 it was not over in time."
)
WORKFLOW_EXIT_CODES: Final = (
    "Exit codes: 0 done; 2 wrong usage, or a definition that cannot run; 3 Kafka does not answer; 4 refused because it is "
    "there with other content, or there is no such workflow."
)
_BY_STATUS: Final = {
    states.SUCCEEDED: EXIT_OK,
    states.FAILED: EXIT_FAILED,
    states.REFUSED: EXIT_REFUSED,
    states.CANCELLED: EXIT_CANCELLED,
}


def exit_code(status: str) -> int:
    """Return the exit code for how a run stands; EXIT_TIMEOUT if it goes on."""
    return _BY_STATUS.get(status, EXIT_TIMEOUT)


class _Sparing(logging.Handler):
    """Shows a line of the Kafka client now and then: who waits learns why, and is not flooded."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._shown_s = float("-inf")

    def emit(self, record: logging.LogRecord) -> None:
        """Print a line unless one was printed a moment ago."""
        if record.created - self._shown_s >= CLIENT_LINE_EVERY_S:
            self._shown_s = record.created
            say(f"Kafka client: {record.getMessage()}", err=True)


@contextmanager
def explained(command: str) -> Iterator[None]:
    """Turn what can go wrong into lines on standard error and the exit code that is promised for it."""
    logging.getLogger("tidegate.eventlog").handlers = [_Sparing()]
    try:
        yield
    except EventLogError as error:
        _fail(command, f"Kafka at {KafkaSettings().bootstrap}: {error}", EXIT_NO_ANSWER)
    except LiveViewError as error:
        _fail(command, str(error), EXIT_NO_ANSWER)
    except (UnknownRunError, NothingCountedError, RunNotFoundError, PublishConflictError) as error:
        _fail(command, str(error), EXIT_REFUSED)
    except RunNotFinishedError as error:
        _fail(command, str(error), EXIT_TIMEOUT)
    except pydantic.ValidationError as error:
        _fail(command, "\n".join(settings_problems(error)), EXIT_USAGE)
    except RequestError as error:
        _fail(command, error.reason, EXIT_USAGE)
    except (AppError, BadQuestionError, DefinitionError, NotJsonError) as error:
        _fail(command, str(error), EXIT_USAGE)


def usage(command: str, problem: str) -> NoReturn:
    """End with a problem that the user can mend on the command line."""
    _fail(command, problem, EXIT_USAGE)


def _fail(command: str, text: str, code: int) -> NoReturn:
    say(f"tidegate {command}: {text}", err=True)
    raise typer.Exit(code) from None

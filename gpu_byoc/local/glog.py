"""The look of the quickstart page's log lines: ``I0000 BYOC capability registered: ...``, on stderr, at once."""

from __future__ import annotations

import logging
import sys

from gpu_byoc import logs

_LETTERS = {logging.INFO: "I", logging.WARNING: "W", logging.ERROR: "E", logging.CRITICAL: "F"}


class GlogFormatter(logs.Redacting):
    """A letter for the level, then 0000 where glog has the date: the page prints it so. The page's own lines, which are
    information, stay as they are there; what goes wrong names its job. JSON has the job in each."""

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        whose = logs.unsaid(message) if record.levelno >= logging.WARNING else ""
        line = f"{_LETTERS.get(record.levelno, 'I')}0000 {message}{whose}"
        if record.exc_info:
            line = f"{line}\n{self.formatException(record.exc_info)}"
        return line


def to_stderr(verbosity: int, kind: str = "text") -> None:
    """Send every log record of this process to stderr. ``-v 6`` and more shows debug lines, as in go-livepeer.

    Raises:
        ConfigError: ``kind`` is neither ``text`` nor ``json``.
    """
    shape = GlogFormatter() if kind == "text" else logs.formatter(kind)
    handler = logging.StreamHandler(sys.stderr)  # flushes each record
    handler.setFormatter(shape)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("gpu_byoc").setLevel(logging.DEBUG if verbosity >= 6 else logging.INFO)
    # Three lines a job: look up only what the lines show (logging HOWTO, "Optimization").
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False

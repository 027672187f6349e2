"""Logging: plain lines on stderr, one format for every process.

    INFO 11-22 14:03:07 scheduler: preempted request 7 (block pool empty)

Libraries only ask for a logger (`get_logger`); the entry points of processes call `setup` once.
"""

import logging
import sys

_ROOT = "deepserve"


class _Line(logging.Formatter):
    """`LEVEL time [process] module: message`, the module without the package's name."""

    def __init__(self, process: str) -> None:
        super().__init__(datefmt="%m-%d %H:%M:%S")
        self._process = f"[{process}] " if process else ""

    def formatMessage(self, record: logging.LogRecord) -> str:
        where = record.name.removeprefix(_ROOT + ".")
        return f"{record.levelname} {self.formatTime(record, self.datefmt)} {self._process}{where}: {record.message}"

    def usesTime(self) -> bool:
        return True


def get_logger(name: str) -> logging.Logger:
    """The logger of a module: `log = get_logger(__name__)`. It writes nothing until a process has called `setup`."""
    logger = logging.getLogger(_ROOT)
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())
    return logging.getLogger(name if name == _ROOT or name.startswith(_ROOT + ".") else f"{_ROOT}.{name}")


def setup(level: str = "info", process: str = "") -> None:
    """Send DeepServe's log lines to stderr from this process on. A second call replaces the first.

    level: debug, info, warning or error. process: a short name such as `worker 3`, put into each line where
    several processes share a terminal. Other libraries' loggers are left alone. Raises ValueError on another level.
    """
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None or number == logging.NOTSET:
        raise ValueError(f"log level {level!r} is none. hint: debug, info, warning or error")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Line(process))
    logger = logging.getLogger(_ROOT)
    logger.handlers = [handler]
    logger.setLevel(number)
    logger.propagate = False

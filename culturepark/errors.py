"""The error tree. Each error tells the reader where, what happened and what to do next.

CulturePark     everything this project raises on purpose
|- ConfigError      the user's configuration or command line            exit 2
|- SeedError        a survey or seed file                               exit 2
|- EndpointError    a model endpoint, found at preflight or mid-run     exit 3
|  `- LaunchUnknownError  a service's job that may have been made or not
|- RunDirError      the run directory: held, foreign, broken, full      exit 4
|- Interrupted      stopped on request before the end; resume goes on   exit 5
`- TrainingError    a training that failed                              exit 6
"""

from __future__ import annotations


class CultureParkError(Exception):
    """Base of all errors meant for the reader.

    `where` names the key, file or row; `what` says what is wrong; `fix` says what to do next.
    """

    exit_code = 1

    def __init__(self, where: str, what: str, fix: str = "") -> None:
        self.where = where
        self.what = what
        self.fix = fix
        super().__init__(str(self))

    def __str__(self) -> str:
        head = f"{type(self).__name__}: {self.where}: {self.what}"
        return f"{head}\n{self.fix}" if self.fix else head

    def __reduce__(self) -> tuple[type[CultureParkError], tuple[str, str, str]]:
        # Exceptions cross process borders by their constructor's arguments.
        return type(self), (self.where, self.what, self.fix)


class ConfigError(CultureParkError):
    """A key, value or option that cannot be used."""

    exit_code = 2


class SeedError(CultureParkError):
    """A survey file or seed file that cannot be read as it stands."""

    exit_code = 2


class EndpointError(CultureParkError):
    """A model endpoint that cannot serve this run."""

    exit_code = 3


class LaunchUnknownError(EndpointError):
    """A job that a service may have made or not: its answer was lost, and the job is not found yet."""


class RunDirError(CultureParkError):
    """A run directory that is held by another process, belongs to another run, or is damaged."""

    exit_code = 4


class Interrupted(CultureParkError):
    """The run was stopped on request before its end. What was done is on disk."""

    exit_code = 5


class TrainingError(CultureParkError):
    """A training that ended without a model: killed, out of memory, refused, or failed of itself."""

    exit_code = 6

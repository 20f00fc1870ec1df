"""What a launcher (torchrun, deepspeed) says in the environment: which of how many processes this is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from megalens.config import ConfigError

_MEND = "unset RANK WORLD_SIZE LOCAL_RANK where they are left over in the shell, or start it with torchrun or deepspeed"


class Place(NamedTuple):
    """One of the processes that a launcher has started.

    Attributes:
        rank: among all.
        size: how many there are.
        local_rank: among those of this machine.
    """

    rank: int
    size: int
    local_rank: int


def launched() -> Place:
    """Which of how many processes this is; the only one where nothing is said.

    Raises:
        ConfigError: what the environment says is no number, or no launcher's.
    """
    place = Place(rank(), _number("WORLD_SIZE", 1), _number("LOCAL_RANK", 0))
    if place.rank >= place.size:
        raise ConfigError(f"RANK={place.rank} in the environment is not below WORLD_SIZE={place.size}; {_MEND}")
    absent = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if place.size > 1 and absent:
        raise ConfigError(f"WORLD_SIZE={place.size} stands in the environment without {' and '.join(absent)}; {_MEND}")
    return place


def rank() -> int:
    """Which of the processes this is, for those who only ask who prints.

    Raises:
        ConfigError: it is no number.
    """
    return _number("RANK", 0)


def launcher_age() -> float:
    """Seconds since this process's launcher was started: before any of its processes, and after all that was there when it was.

    0 for a process without one, and where the system does not tell.
    """
    if launched().size == 1:
        return 0.0
    try:
        started = int(Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, float(Path("/proc/uptime").read_text().split()[0]) - started)
    except (OSError, ValueError, IndexError):
        return 0.0


def _number(name: str, default: int) -> int:
    said = os.environ.get(name) or str(default)
    if not (said.isascii() and said.isdigit()) or len(said) > 9:
        raise ConfigError(f"{name}={said} in the environment is no number of a launcher's; {_MEND}")
    return int(said)

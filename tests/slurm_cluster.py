"""A real Slurm on loopback: one controller and some nodes on this machine, all of it in one folder, gone when the tests are over."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
SYSTEM_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin"])
FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")


def why_not() -> str | None:
    """Why there can be no Slurm here; None: there can."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=SYSTEM_PATH) is None]
    if missing:
        return f"{', '.join(missing)} not installed (Debian: apt-get install slurm-wlm munge)"
    return None if os.geteuid() == 0 else "slurmd needs root to start jobs"


class SlurmCluster:
    """A context manager; the nodes are called n1, n2, ...

    Args:
        folder: everything of it lies there.
        nodes: how many.
        cpus: of each node, as Slurm counts them (they are the same real ones).
    """

    def __init__(self, folder: Path, nodes: int = 2, cpus: int = 4):
        self.folder, self.names = folder, [f"n{i + 1}" for i in range(nodes)]
        self.munge_socket = str(folder / "munge.socket")
        self.daemons: dict[str, subprocess.Popen] = {}
        (folder / "state").mkdir(parents=True)
        (folder / "slurm.conf").write_text(self._settings(cpus))
        # Settings of a Slurm job in which the tests may run are not this cluster's.
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "MUNGE"))}
        self.environment |= {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": SYSTEM_PATH}

    def _settings(self, cpus: int) -> str:
        host, folder = socket.gethostname().split(".")[0], self.folder
        controller, *ports = _free_ports(1 + len(self.names))
        nodes = [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} State=UNKNOWN"
            for name, port in zip(self.names, ports, strict=True)
        ]
        settings = {
            "ClusterName": "loopback",
            "SlurmctldHost": f"{host}(127.0.0.1)",
            "SlurmctldPort": controller,
            "SlurmUser": "root",
            "AuthType": "auth/munge",
            "CredType": "cred/munge",
            "AuthInfo": f"socket={self.munge_socket},cred_expire=5",  # seconds; a requeued job waits that long
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "MpiDefault": "none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core",
            "SlurmdParameters": "config_overrides",
            "StateSaveLocation": folder / "state",
            "SlurmdSpoolDir": folder / "spool-%n",
            "SlurmdPidFile": folder / "slurmd-%n.pid",
            "SlurmctldPidFile": folder / "slurmctld.pid",
            "SlurmctldLogFile": folder / "slurmctld.log",
            "SlurmdLogFile": folder / "slurmd-%n.log",
            "SlurmdTimeout": 5,
            "SlurmctldTimeout": 5,
            "ReturnToService": 2,
            "SchedulerParameters": "sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0",
        }
        partition = f"PartitionName=all Nodes={','.join(self.names)} Default=YES MaxTime=INFINITE State=UP"
        return "\n".join([*(f"{key}={value}" for key, value in settings.items()), *nodes, partition]) + "\n"

    def __enter__(self) -> SlurmCluster:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        options = [f"--{what}-file={self.folder / f'munge.{what}'}" for what in ("key", "log", "pid", "seed")]
        try:
            self._start("munged", "--foreground", "--force", f"--socket={self.munge_socket}", *options)
            self.wait(lambda: os.path.exists(self.munge_socket), "munged")
            self._start("slurmctld", "-D")
            for name in self.names:
                self.start_node(name)
            self.wait(lambda: self.states() == dict.fromkeys(self.names, "idle"), "the nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        for name in self.names:
            self.kill_node(name)
        for daemon in reversed(self.daemons.values()):
            daemon.kill()
            daemon.wait()

    # ------------------------------------------------------------------------------------------------------------- nodes

    def start_node(self, name: str) -> None:
        """Start a node, as after a reboot."""
        self._start(f"slurmd {name}", "-D", "-N", name, SLURMD_NODENAME=name)  # by which its job steps are known too

    def kill_node(self, name: str) -> None:
        """The power goes off: slurmd, its job steps and everything they started, without a farewell."""
        daemon = self.daemons.pop(f"slurmd {name}", None)
        if daemon is None:
            return
        daemon.kill()
        daemon.wait()
        for pid in self._processes(name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _processes(self, name: str) -> list[int]:
        """The node's processes: each says in its environment which node of which cluster it is on."""
        mine = {f"SLURM_CONF={self.folder / 'slurm.conf'}".encode(), f"SLURMD_NODENAME={name}".encode()}
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):  # it has ended meanwhile
                    if mine <= set((entry / "environ").read_bytes().split(b"\0")):
                        found.append(int(entry.name))
        return found

    def states(self) -> dict[str, str]:
        """Node name -> state."""
        return dict(line.split() for line in self.call("sinfo", "-h", "-N", "-o", "%N %T").splitlines())

    # -------------------------------------------------------------------------------------------------------------- jobs

    def call(self, *command: str, cwd: Path | None = None, **environment: str) -> str:
        """A client command's output; fails with its error."""
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=self.environment | environment)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr or done.stdout}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What the controller knows of a job: JobState, Restarts, Dependency, ..."""
        return dict(re.findall(r"(\w+)=(\S*)", self.call("scontrol", "show", "job", number)))

    def wait_job(self, number: str, seconds: float = 240) -> dict[str, str]:
        """The job when it has ended."""
        self.wait(lambda: self.job(number)["JobState"] in FINAL, f"job {number}", seconds)
        return self.job(number)

    def _start(self, name: str, *arguments: str, **environment: str) -> None:
        program = shutil.which(name.split()[0], path=SYSTEM_PATH)
        with open(self.folder / f"{name.replace(' ', '-')}.out", "ab") as out:
            self.daemons[name] = subprocess.Popen([program, *arguments], env=self.environment | environment, stdout=out, stderr=out)

    def wait(self, condition, what: str, seconds: float = 30) -> None:
        """Until the condition holds; fails with the daemons' logs."""
        until = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > until:
                logs = {path.name: path.read_text(errors="replace")[-1500:] for path in self.folder.glob("*.out")}
                raise AssertionError(f"{what}: not there after {seconds:.0f} s; {logs}")
            time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports

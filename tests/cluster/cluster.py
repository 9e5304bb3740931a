"""A cluster of three nodes on this machine: sshd, munge and SLURM, in the namespaces that ``run.sh`` made."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
NODES = {f"node-{number}": f"127.0.0.{number + 1}" for number in (1, 2, 3)}
SLURM = """\
ClusterName=bed
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={folder}/munge.sock
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1
KillWait=8
MinJobAge=3600
ReturnToService=2
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
SSHD = """\
ListenAddress {address}
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
UsePAM no
AcceptEnv *
"""


class Finished(NamedTuple):
    """How a command ended; ``seconds`` are for the report, not for assertions."""

    code: int
    text: str
    seconds: float

    def errors(self) -> list[str]:
        """Lines of ours that say what is wrong, each once."""
        found = re.findall(r"(?:\[rank \d+\] )?error: (.*)", "\n".join(self._lines()))
        return sorted(set(found))

    def _lines(self) -> list[str]:
        return [line for line in self.text.splitlines() if not line.startswith(("srun: ", "slurmstepd: ", "sbatch: "))]


def launched(runs: Path) -> tuple[int, str]:
    """Ranks and launcher of the only run of a folder, as the run itself says."""
    (path,) = runs.glob("[!.]*/env.json")
    found = json.loads(path.read_text())
    return found["world_size"], found["launcher"]


def newest(runs: Path) -> int:
    """Step of the newest checkpoint of the only run of a folder; 0: there is none."""
    return max((int(path.name.removeprefix("step_")) for path in runs.glob("*/checkpoints/step_*")), default=0)


def trains(runs: Path) -> bool:
    """Whether the only run of a folder takes steps."""
    return any(path.stat().st_size for path in runs.glob("*/metrics.jsonl"))


def processes(*words: str) -> dict[int, list[str]]:
    """Processes at work, on all nodes, whose command line has all these words in one argument each, and it."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_text().split("\0")
            zombie = (path / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            continue
        if not zombie and all(any(word in part for part in command) for word in words):
            found[int(path.name)] = command
    return found


def parent(process: int) -> int:
    """The process that started it."""
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def host(process: int) -> str:
    """The node that a process is on."""
    command = ["nsenter", "-t", str(process), "--uts", "hostname"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def wait_for(what: Callable[[], bool], seconds: float = 60.0) -> None:
    """Poll until it is so."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.2)


@dataclass
class Cluster:
    """Its daemons are children of this namespace's first process and end with it."""

    folder: Path
    environment: dict[str, str]

    def start(
        self, *command: object, cwd: Path = ROOT, log: Path | None = None, **more: object
    ) -> subprocess.Popen[str]:
        """A command in a group of its own; its output goes to ``log``."""
        path, environment = log or self.folder / "log", {name: str(value) for name, value in more.items()}
        with path.open("w") as out:
            return subprocess.Popen(
                [str(part) for part in command], cwd=cwd, env={**self.environment, **environment},
                stdout=out, stderr=out, stdin=subprocess.DEVNULL, text=True, start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # A shell's background job ignores it.
            )  # fmt: skip

    def run(self, *command: object, cwd: Path = ROOT, timeout: float = 150.0, **more: object) -> Finished:
        """Run a command to its end; one that does not end is killed and fails the test."""
        began, log = time.monotonic(), self.folder / "log"
        process = self.start(*command, cwd=cwd, log=log, **more)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise AssertionError(f"did not end in {timeout:g} s: {log.read_text()[-3000:]}") from None
        finished = Finished(code, log.read_text(), time.monotonic() - began)
        sys.stdout.write(
            f"$ {' '.join(map(str, command))}\n{finished.text[-3000:]}\n= {code}, {finished.seconds:.1f} s\n"
        )
        return finished

    def show(self, job: str) -> Mapping[str, str]:
        """What SLURM knows of a job."""
        text = self.run("scontrol", "show", "job", job, "--oneliner").text
        return dict(part.split("=", 1) for part in text.split() if "=" in part)

    def submit(self, *arguments: object, cwd: Path, **more: object) -> str:
        """The number of a batch job."""
        finished = self.run("sbatch", "--parsable", *arguments, cwd=cwd, **more)
        assert finished.code == 0, finished.text
        return finished.text.split()[-1].split(";")[0]

    def hurry(self) -> bool:
        """Start jobs that were put back without SLURM's two minutes; False if none waits for them, or not yet."""
        shown = self.run("squeue", "--noheader", "--states=PENDING", "--format=%i %r").text.splitlines()
        waiting = [line.split()[0] for line in shown if line.endswith(" BeginTime")]
        if not waiting or "comp" in self.run("sinfo", "--noheader", "--format=%T").text:
            return False
        time.sleep(2)  # A node that still ends the attempt before would end the next one, too.
        for job in waiting:
            self.run("scontrol", "update", f"JobId={job}", "StartTime=now")
        return True

    def start_slurmd(self, name: str) -> None:
        """Let a node answer; also one whose daemon was killed."""
        subprocess.run([*_on(name), "slurmd", "-N", name], env=self.environment, cwd=self.folder, check=True)

    def ended(self, job: str) -> bool:
        return self.show(job)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED")


def build(folder: Path) -> Cluster:
    """Start the daemons."""
    folder.chmod(0o755)
    for address in NODES.values():  # Names are looked up only where there is an address beside 127.0.0.1.
        subprocess.run(["ip", "address", "add", f"{address}/8", "dev", "lo"], check=True)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    hosts = "".join(f"{address} {name}\n" for name, address in NODES.items())
    _put(Path("/etc/hosts"), folder / "hosts", Path("/etc/hosts").read_text() + hosts)
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin", "PYTHONPATH": str(ROOT)}
    environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    environment |= {"OMPI_MCA_oob_tcp_if_include": "lo", "OMPI_MCA_rmaps_base_oversubscribe": "1"}
    _ssh(folder, environment)
    _slurm(folder, environment)
    cluster = Cluster(folder, environment)
    for name in NODES:
        cluster.start_slurmd(name)
    wait_for(lambda: cluster.run("sinfo", "--noheader", "--format=%T").text.split() == ["idle"])
    return cluster


def _on(name: str) -> tuple[str, ...]:
    """What stands before a daemon, so that it and what it starts are on a machine of this name."""
    return ("unshare", "--uts", "sh", "-c", f'hostname {name}; exec "$@"', "sh")


def _put(target: Path, source: Path, text: str) -> None:
    """Show other text in a file of the system, within this namespace."""
    source.write_text(text)
    subprocess.run(["mount", "--bind", source, target], check=True)


def _ssh(folder: Path, environment: dict[str, str]) -> None:
    home = Path.home() / ".ssh"
    home.mkdir(mode=0o700, exist_ok=True)
    Path("/run/sshd").mkdir(exist_ok=True)
    own = folder / "ssh"
    own.mkdir(mode=0o700)
    subprocess.run(["mount", "--bind", own, home], check=True)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", own / "key"], check=True)
    (own / "config").write_text(f"Host *\nIdentityFile {own}/key\nStrictHostKeyChecking no\nLogLevel ERROR\n")
    for name, address in NODES.items():
        path = folder / f"sshd-{name}.conf"
        path.write_text(SSHD.format(address=address, folder=own))
        sshd = shutil.which("sshd", path=environment["PATH"]) or "sshd"
        subprocess.run([*_on(name), sshd, "-f", path], check=True)


def _slurm(folder: Path, environment: dict[str, str]) -> None:
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(64))
    key.chmod(0o400)
    files = {"key-file": "munge.key", "socket": "munge.sock", "pid-file": "pid", "log-file": "munge.log"}
    files["seed-file"] = "munge.seed"
    options = [f"--{name}={folder / file}" for name, file in files.items()]
    subprocess.run(["munged", "--force", "--origin=127.0.0.1", *options], env=environment, check=True)
    nodes = "".join(
        f"NodeName={name} NodeAddr={address} Port={7000 + number} CPUs=16 RealMemory=1000\n"
        for number, (name, address) in enumerate(NODES.items())
    )
    text = SLURM.format(host=os.uname().nodename, folder=folder)
    (folder / "slurm.conf").write_text(text.replace("PartitionName", f"{nodes}PartitionName"))
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    subprocess.run(["slurmctld"], env=environment, check=True)

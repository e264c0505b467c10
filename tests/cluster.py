"""A throw-away Slurm on this host, from Debian's packages: real daemons, up in a second or two, gone after the test.

Several slurmd share the host, each a node of its own with fake GPUs. Jobs tell the nodes apart by SLURMD_NODENAME, as
their hostname is the same. Everything listens on the loopback only, because nothing authenticates anybody.
"""

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

__all__ = ["Cluster", "start_cluster"]

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol", "setpriv")
PACKAGES = "apt-get install --no-install-recommends slurmctld slurmd slurm-client munge"
SEARCH_PATH = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
N_GPUS = 2
N_CPUS = 4
HOST = socket.gethostname().partition(".")[0]
DIE_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL")
"""No daemon outlives a test run that is killed."""


@dataclass
class Cluster:
    """Daemons that run under `root`. Partitions: `debug` (default), `low` (preempted with a grace time and the user
    signal), `abrupt` (preempted without either), `urgent` (preempts both)."""

    root: Path
    n_nodes: int
    ports: list[int]
    daemons: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    @property
    def nodes(self) -> list[str]:
        return [f"node{index}" for index in range(1, self.n_nodes + 1)]

    @property
    def environment(self) -> dict[str, str]:
        """What a program needs to speak to this cluster."""
        return {"SLURM_CONF": str(self.root / "slurm.conf"), "PATH": SEARCH_PATH}

    def run(self, *command: object, check: bool = True) -> str:
        """What a Slurm command prints."""
        words = [str(word) for word in command]
        done = subprocess.run(words, env=os.environ | self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0 or not check, f"{words}: {done.stderr}"
        return done.stdout

    def states(self) -> dict[str, str]:
        """The state of every job Slurm remembers, by id; elements of arrays one by one."""
        lines = self.run("squeue", "--all", "--array", "--noheader", "--states=all", "--format=%i|%T").splitlines()
        return dict(line.split("|") for line in lines)

    def start_controller(self, *, forget: bool = False) -> None:
        self._spawn("slurmctld", "slurmctld", "-D", "-f", self.root / "slurm.conf", *(["-c"] if forget else []))
        wait_for(lambda: "UP" in self.run("scontrol", "ping", check=False), "slurmctld")

    def save_state(self) -> None:
        """Make the controller write what it knows of its jobs, as it does within seconds of a change to one."""
        asked = time.time()
        for job in self.run("squeue", "-h", "-o", "%A").split():
            self.run("scontrol", "update", f"JobId={job}", "Comment=saved")
        saved = self.root / "state" / "job_state"
        self.wait_until(lambda: saved.stat().st_mtime > asked, "Slurm to save its state")

    def kill_controller(self) -> None:
        self._end("slurmctld", signal.SIGKILL)

    def start_node(self, node: str) -> None:
        self._spawn(node, "slurmd", "-D", "-N", node, "-f", self.root / "slurm.conf")

    def kill_node(self, node: str) -> None:
        """What a power cut does: its daemon and all its processes are gone at once, and nobody is told."""
        self._end(node, signal.SIGKILL)
        self._kill_processes(node)

    def cut_off_node(self, node: str) -> None:
        """What a broken switch does: Slurm hears nothing of the node, the job there goes on."""
        self._end(node, signal.SIGKILL)

    def processes(self, node: str = "") -> list[psutil.Process]:
        """What runs on a node, or on all of them, besides the daemons: jobs and the steps that look after them."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                at = self._step_node(process) if is_step(process) else self._job_node(process)
                if at and node in ("", at):
                    found.append(process)
        return found

    def wait_until(self, condition: Callable[[], bool], what: str, seconds: float = 120) -> None:
        """Wait for a condition.

        Raises:
            AssertionError: it did not come true; the jobs' states and Slurm's log say more.
        """
        try:
            wait_for(condition, what, seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}: {self.describe()}") from None

    def describe(self) -> str:
        """Where jobs, nodes and their processes stand, and the end of Slurm's logs: for a test that waits in vain."""
        asked = (("squeue", "--all", "--array", "--states=all", "--long"), ("sinfo", "--all", "-N", "--long"))
        lines = [self.run(*words, check=False) for words in asked]
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                lines.append(f"{process.pid} {process.status()} {' '.join(process.cmdline())[-200:]}")
        for log in ("slurmctld.log", *(f"{node}/slurmd.log" for node in self.nodes)):
            lines += ["", log, *(self.root / log).read_text(errors="replace").splitlines()[-30:]]
        return "\n".join(["", *lines])

    def up(self) -> None:
        self._configure()
        self.start_controller(forget=True)
        for node in self.nodes:
            self.start_node(node)
        wait_for(self.is_idle, "the nodes to be idle")

    def down(self) -> None:
        """End everything; a job that ignores it is killed."""
        self.run("scancel", "--user", user(), check=False)
        for name in list(self.daemons):
            self._end(name, signal.SIGKILL)
        self._kill_processes()
        shutil.rmtree(self.root, ignore_errors=True)

    def _kill_processes(self, node: str = "") -> None:
        """Kill until none is left: a killed one takes a moment to die, and may have forked before."""

        def all_dead() -> bool:
            alive = sorted(self.processes(node), key=lambda process: not is_step(process))
            for process in alive:  # steps first: one that sees its job die would tell Slurm
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            return not alive

        wait_for(all_dead, "the killed processes to be gone")

    def _job_node(self, process: psutil.Process) -> str:
        environment = process.environ()
        ours = environment.get("SLURM_CONF") == self.environment["SLURM_CONF"]
        return environment.get("SLURMD_NODENAME", "") if ours else ""

    def _step_node(self, process: psutil.Process) -> str:
        """Off the log it writes: it has no environment, and its command line names no node."""
        logs = [Path(file.path) for file in process.open_files() if file.path.endswith("/slurmd.log")]
        return next((log.parent.name for log in logs if log.parent.parent == self.root), "")

    def is_idle(self) -> bool:
        return self._node_states() == ["idle"] * self.n_nodes

    def is_idle_again(self) -> bool:
        """Takes back drained nodes: a restarted controller drains one where it starts a job that still runs there."""
        if "drained" in self._node_states():
            self.run("scontrol", "update", f"nodename={','.join(self.nodes)}", "state=resume", check=False)
        return self.is_idle()

    def _node_states(self) -> list[str]:
        return self.run("sinfo", "-h", "-N", "-p", "debug", "-o", "%T", check=False).split()

    def _spawn(self, name: str, *command: object) -> None:
        with (self.root / f"{name}.out").open("ab") as output:
            self.daemons[name] = subprocess.Popen(
                [*DIE_WITH_PARENT, *map(str, command)],
                env=os.environ | self.environment,
                cwd=self.root,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def _end(self, name: str, number: signal.Signals) -> None:
        daemon = self.daemons.pop(name)
        daemon.send_signal(number)
        daemon.wait()

    def _configure(self) -> None:
        for folder in ("state", "dev", *self.nodes):
            (self.root / folder).mkdir()
        for number in range(N_GPUS):  # must lead to a character device: Slurm refuses a plain file
            (self.root / "dev" / f"nvidia{number}").symlink_to("/dev/null")
        (self.root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        nodes = f"node[1-{self.n_nodes}]"
        gpus = f"NodeName={nodes} Name=gpu File={self.root}/dev/nvidia[0-{N_GPUS - 1}]"
        (self.root / "gres.conf").write_text(f"AutoDetect=off\n{gpus}\n")
        controller, *others = self.ports
        lines = [
            f"NodeName={node} NodeHostname={HOST} NodeAddr=127.0.0.1 Port={port} CPUs={N_CPUS} RealMemory=16000 "
            f"Gres=gpu:{N_GPUS} State=UNKNOWN"
            for node, port in zip(self.nodes, others, strict=True)
        ]
        settings = SETTINGS.format(root=self.root, host=HOST, port=controller, user=user(), nodes=nodes)
        (self.root / "slurm.conf").write_text("\n".join([settings, *lines, PARTITIONS.format(nodes=nodes)]))


SETTINGS = """
ClusterName=throwaway
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/none
CredType=cred/none
# a requeued job waits for its old credential to expire: 121 s unless told otherwise
AuthInfo=cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/%n/slurmd.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/%n/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=10
MessageTimeout=5
InactiveLimit=0
KillWait=5
UnkillableStepTimeout=20
BatchStartTimeout=10
CompleteWait=0
MinJobAge=300
SchedulerParameters=sched_interval=2,sched_min_interval=100000,bf_interval=2,batch_sched_delay=0
PriorityType=priority/basic
MaxArraySize=5
EnforcePartLimits=ALL
PropagateResourceLimits=NONE
"""

PARTITIONS = """
PartitionName=debug Nodes={nodes} Default=YES MaxTime=01:00:00 DefaultTime=00:10:00 PriorityTier=10 PreemptMode=OFF
PartitionName=low Nodes={nodes} MaxTime=01:00:00 PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=abrupt Nodes={nodes} MaxTime=01:00:00 PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=urgent Nodes={nodes} MaxTime=01:00:00 PriorityTier=20 PreemptMode=OFF
"""


def is_step(process: psutil.Process) -> bool:
    """Whether it is a slurmstepd: the one that starts a job's processes and tells Slurm how they end."""
    return process.name().startswith("slurmstepd")


def user() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.1)


def free_ports(n: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(n)]
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def start_cluster(n_nodes: int = 2) -> Iterator[Cluster]:
    """A cluster for as long as the block runs. Its folder has a short name: sockets in it allow 108 characters.

    Raises:
        pytest.skip.Exception: Slurm is not installed.
    """
    if missing := [program for program in PROGRAMS if not shutil.which(program, path=SEARCH_PATH)]:
        pytest.skip(f"no {', '.join(missing)} here: {PACKAGES}")
    cluster = Cluster(Path(tempfile.mkdtemp(prefix="slurm-")), n_nodes, free_ports(n_nodes + 1))
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()

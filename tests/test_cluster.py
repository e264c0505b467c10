"""The throw-away cluster is a real one: it runs jobs, gives each its GPU, and loses nodes as a real one does."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, start_cluster

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with start_cluster() as started:
        yield started


def submit(cluster: Cluster, folder: Path, command: str, *flags: str) -> str:
    output = cluster.run("sbatch", "--parsable", f"--output={folder}/%A_%a.out", *flags, f"--wrap={command}")
    return output.strip()


def test_jobs_run_with_a_gpu_each(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, "echo gpu $CUDA_VISIBLE_DEVICES", "--array=0-3", "--gpus-per-node=1")
    cluster.wait_until(lambda: set(cluster.states().values()) == {"COMPLETED"}, "four jobs")
    assert set(cluster.states()) == {f"{job}_{index}" for index in range(4)}
    assert {path.read_text() for path in tmp_path.iterdir()} <= {"gpu 0\n", "gpu 1\n"}


def test_a_node_that_dies_takes_its_processes_along(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, "exec sleep 600", "--nodelist=node1", "--requeue")
    cluster.wait_until(lambda: bool(cluster.processes("node1")), "the job to start")
    assert not cluster.processes("node2")
    cluster.kill_node("node1")
    assert not cluster.processes("node1")
    cluster.wait_until(lambda: cluster.states()[job] == "PENDING", "Slurm to notice")
    cluster.run("scancel", job)
    cluster.start_node("node1")

"""Sweeps on a real Slurm: arrays, kills of every kind, and a launcher that may die. Nothing is lost or done twice."""

import contextlib
import json
import signal
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from cluster import Cluster, start_cluster
from cluster_sweep import ClusterSweep, job_processes, was_sent
from commands import SMOKE, broken
from commands import sweep_runner as run
from faults import last_table

from sweep.attempt import newest
from sweep.paths import CacheFolder, ResultsFolder

pytestmark = pytest.mark.slurm

STEPS = 6000
LONG = (*SMOKE, f"steps={STEPS}", "epochs=1", "checkpoint_steps=100", "keep_checkpoints=true")
QUICK = (*SMOKE, "steps=10")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with start_cluster() as started:
        yield started


@pytest.fixture(autouse=True)
def quiet_cluster(cluster: Cluster) -> Iterator[None]:
    """Every test finds both nodes idle and leaves no job."""
    yield
    for node in cluster.nodes:
        if node not in cluster.daemons:
            cluster.start_node(node)
    if "slurmctld" not in cluster.daemons:
        cluster.start_controller()
    cluster.run("scancel", "--user", "root", check=False)
    for process in cluster.processes():
        if process.is_running() and process.status() == psutil.STATUS_STOPPED:
            process.kill()
    cluster.wait_until(cluster.is_idle_again, "the nodes to be idle again")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, cache: CacheFolder) -> ResultsFolder:
    """Cells of three seeds, trained in this process without any interruption."""
    folder = tmp_path_factory.mktemp("unbroken")
    options = ["seed=0,1,2", "hydra/launcher=inline", f"cache_dir={cache.root}", f"results_dir={folder}"]
    done = run(*LONG, *options)
    assert done.returncode == 0, done.stderr
    return ResultsFolder(folder)


def test_arrays_keep_their_parallelism_and_every_job_its_gpu(
    cluster: Cluster, tmp_path: Path, cache: CacheFolder
) -> None:
    """Six jobs do not fit the cluster's largest array of five, and still only two run at once."""
    flags = ["hydra.launcher.jobs=6", "hydra.launcher.array_parallelism=2"]
    on_one_node = "+hydra.launcher.additional_parameters.nodelist=node1"
    sweep = ClusterSweep(cluster, tmp_path, cache, *QUICK, "seed=0,1,2,3,4,5", *flags, on_one_node)
    sweep.submit()
    assert Counter(job.partition("_")[0] for job in cluster.states()).most_common(1)[0][1] == 5
    assert len(cluster.states()) == 6
    most, gpus = 0, set()
    while any(state in ("PENDING", "RUNNING", "COMPLETING") for state in cluster.states().values()):
        most = max(most, list(cluster.states().values()).count("RUNNING"))
        seen = {}
        for process in job_processes(cluster):
            try:
                environment = process.environ()
            except psutil.Error:
                continue
            seen[environment["SLURM_JOB_ID"]] = environment["CUDA_VISIBLE_DEVICES"]
        assert len(set(seen.values())) == len(seen)
        gpus |= set(seen.values())
        time.sleep(0.1)
    assert most == 2
    assert gpus == {"0", "1"}
    collected = sweep.ask("collect")
    assert collected.returncode == 0, collected.stderr
    assert len(list(tmp_path.glob("runs/*"))) == 6
    assert {status.job for status in sweep.statuses} == set(cluster.states())


def test_a_failing_cell_leaves_the_others_and_is_told(cluster: Cluster, tmp_path: Path, cache: CacheFolder) -> None:
    """One raises an exception, the loss of another stops being a number."""
    sweep = ClusterSweep(cluster, tmp_path, cache, "-m", "experiment=smoke", "steps=60", "lr=1e-3,2e-3,1e30")
    sweep.environment = broken("error@2e-3@5") | cluster.environment
    done = sweep.run()
    asked, collected = sweep.ask("status"), sweep.ask("collect")
    assert (done.returncode, asked.returncode, collected.returncode) == (1, 0, 1)
    for told in (done, asked, collected):
        assert "failed: broken on purpose" in told.stderr
        assert "diverged: the " in told.stderr
    assert sorted(status.state for status in sweep.statuses) == ["diverged", "done", "failed"]


def test_a_cell_short_of_memory_is_given_more(cluster: Cluster, tmp_path: Path, cache: CacheFolder) -> None:
    """It runs out in its first two jobs, and is a cell of its own in the third, which may have no more than that."""
    sweep = ClusterSweep(cluster, tmp_path / "out", cache, *SMOKE, "steps=10", "lr=1e-3,2e-3")
    faults = ",".join(f"memory@2e-3@5@{tmp_path / name}" for name in ("once", "twice"))
    sweep.environment = broken(faults) | cluster.environment
    done = sweep.run("hydra.launcher.mem_gb=1", "hydra.launcher.max_mem_gb=3")
    assert done.returncode == 0, done.stderr
    assert "1 cell ran out of memory, and may have more:" in done.stdout
    assert [line.rpartition(", ")[2] for line in done.stdout.splitlines() if line.startswith("submitted")] == [
        "1 GB each",
        "2 GB each",
        "3 GB each",
    ]
    assert {"1G", "2G", "3G"} <= set(cluster.run("squeue", "-h", "--states=all", "-o", "%m").split())
    assert sorted(status.attempts for status in sweep.statuses) == [1, 3]


def test_the_script_is_shown_and_nothing_submitted(cluster: Cluster, tmp_path: Path, cache: CacheFolder) -> None:
    sweep = ClusterSweep(cluster, tmp_path / "out", cache, *QUICK, "seed=0,1", "hydra.launcher.jobs=2")
    before = cluster.states()
    done = sweep.run("dry_run=true", "hydra.launcher.setup=[module load cuda]", "hydra.launcher.partition=low")
    assert done.returncode == 0, done.stderr
    for line in ("#SBATCH --partition=low", "#SBATCH --array=0-1%2", "#SBATCH --requeue", "module load cuda"):
        assert line in done.stdout.splitlines()
    assert cluster.states() == before
    assert not list(tmp_path.iterdir())


def test_what_slurm_refuses_is_told_in_its_words(cluster: Cluster, tmp_path: Path, cache: CacheFolder) -> None:
    done = ClusterSweep(cluster, tmp_path, cache, *QUICK).run("hydra.launcher.partition=nowhere")
    assert done.returncode == 2
    assert "invalid partition specified: nowhere" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("slurm/*/"))


def test_a_warned_job_saves_and_goes_back_into_the_queue(
    cluster: Cluster, tmp_path: Path, cache: CacheFolder, unbroken: ResultsFolder
) -> None:
    """SIGUSR2 is what Slurm sends before the time limit."""
    sweep = ClusterSweep(cluster, tmp_path, cache, *LONG, "seed=0")
    sweep.submit()
    sweep.wait_for_training()
    (job,) = [job for job, state in cluster.states().items() if state == "RUNNING"]
    cluster.run("scancel", "--signal=USR2", job)
    cluster.wait_until(lambda: cluster.states()[job] == "PENDING", "the job to be requeued")
    (status,) = sweep.statuses
    assert status.state == "interrupted"
    assert sweep.folders[0].checkpoint_steps()[-1] == status.step
    assert "1 running" in sweep.finish()
    sweep.same_as(unbroken)
    assert sweep.statuses[0].attempts == 2
    assert sweep.statuses[0].job == job


@pytest.mark.parametrize("partition", ["low", "abrupt"])
def test_a_preempted_job_comes_back(
    partition: str, cluster: Cluster, tmp_path: Path, cache: CacheFolder, unbroken: ResultsFolder
) -> None:
    """`low` sends the user's signal and grants a grace time, `abrupt` neither."""
    sweep = ClusterSweep(cluster, tmp_path, cache, *LONG, "seed=0", f"hydra.launcher.partition={partition}")
    sweep.submit()
    sweep.wait_for_training()
    (job,) = [job for job, state in cluster.states().items() if state == "RUNNING"]
    urgent = cluster.run(
        "sbatch", "--parsable", "-p", "urgent", "-N2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"
    )
    cluster.wait_until(lambda: cluster.states()[urgent.strip()] == "COMPLETED", "the urgent job")
    assert cluster.states()[job] in ("PENDING", "RUNNING")
    sweep.finish()
    sweep.same_as(unbroken)
    (status,) = sweep.statuses
    assert (status.attempts, status.failures, status.job) == (2, 0, job)


def test_cancelled_jobs_are_told_and_the_next_run_goes_on(
    cluster: Cluster, tmp_path: Path, cache: CacheFolder, unbroken: ResultsFolder
) -> None:
    """One that runs, one that waits, one of an array: the third is left alone."""
    flags = ["hydra.launcher.jobs=3", "hydra.launcher.array_parallelism=1"]
    sweep = ClusterSweep(cluster, tmp_path, cache, *LONG, "seed=0,1,2", *flags)
    launcher = sweep.start()
    sweep.wait_for_training()
    states = cluster.states()
    (running,) = [job for job, state in states.items() if state == "RUNNING"]
    waiting = [job for job, state in states.items() if state == "PENDING"]
    assert len(waiting) == 2
    cluster.run("scancel", waiting[0])
    cluster.run("scancel", running)
    output, errors = launcher.communicate(timeout=200)
    assert launcher.returncode == 1, output
    assert f"lost: Slurm job {running}, cancelled" in errors
    assert f"lost: Slurm job {waiting[0]}," in errors  # Slurm may forget an element that never ran at once
    assert len(list(tmp_path.glob("runs/*"))) == 1
    states_of_cells = sorted(status.state for status in sweep.statuses)
    assert states_of_cells == ["done", "interrupted", "new"]
    planned = sweep.run("dry_run=true").stdout
    assert all(f"1 {action}" in planned for action in ("done", "resume", "new"))
    sweep.finish()
    sweep.same_as(unbroken)


def test_a_dead_node_costs_the_steps_since_the_last_checkpoint(
    cluster: Cluster, tmp_path: Path, cache: CacheFolder, unbroken: ResultsFolder
) -> None:
    sweep = ClusterSweep(cluster, tmp_path, cache, *LONG, "seed=0")
    launcher = sweep.start()
    sweep.wait_for_training()
    (node,) = {process.environ()["SLURMD_NODENAME"] for process in job_processes(cluster)}
    cluster.kill_node(node)
    output, errors = launcher.communicate(timeout=250)
    assert launcher.returncode == 0, output + errors
    sweep.same_as(unbroken)
    (status,) = sweep.statuses
    assert status.attempts == 2
    assert status.host != node


def test_the_same_job_alive_twice_leaves_one_result(
    cluster: Cluster, tmp_path: Path, cache: CacheFolder, unbroken: ResultsFolder
) -> None:
    """A node is cut off; its job freezes and wakes up when Slurm has started it again on the other node."""
    sweep = ClusterSweep(cluster, tmp_path, cache, *LONG, "seed=0")
    sweep.submit()
    sweep.wait_for_training()
    (ghost,) = job_processes(cluster)
    token = newest(sweep.folders[0])["token"]
    node = ghost.environ()["SLURMD_NODENAME"]
    ghost.suspend()
    cluster.cut_off_node(node)
    cluster.wait_until(lambda: newest(sweep.folders[0])["token"] != token, "the second start")
    ghost.resume()
    sweep.finish()
    psutil.wait_procs([ghost], timeout=30)
    assert not ghost.is_running() or ghost.status() == psutil.STATUS_ZOMBIE
    sweep.same_as(unbroken)
    (status,) = sweep.statuses
    assert (status.state, status.attempts, status.failures) == ("done", 2, 0)
    assert status.host != node
    assert "has been started again" in sweep.folders[0].log.read_text()
    assert len(list(tmp_path.glob("runs/*"))) == 1


def test_a_restarted_controller_is_waited_for(
    cluster: Cluster, tmp_path: Path, cache: CacheFolder, unbroken: ResultsFolder
) -> None:
    sweep = ClusterSweep(cluster, tmp_path, cache, *LONG, "seed=0")
    launcher = sweep.start()
    sweep.wait_for_training()
    (process,) = job_processes(cluster)
    process.suspend()  # so that it is not over before the controller is gone
    cluster.save_state()
    cluster.kill_controller()
    asked = sweep.ask("status")
    assert asked.returncode == 0
    assert "Slurm was not asked" in asked.stdout
    again = sweep.run()
    assert again.returncode == 2
    assert "squeue" in again.stderr
    process.resume()
    cluster.start_controller()
    _, errors = launcher.communicate(timeout=200)
    assert launcher.returncode == 0, errors
    sweep.same_as(unbroken)


def test_jobs_that_slurm_forgot_are_sent_again(cluster: Cluster, tmp_path: Path, cache: CacheFolder) -> None:
    sweep = ClusterSweep(cluster, tmp_path, cache, *QUICK, "seed=0,1")
    held = "+hydra.launcher.additional_parameters.hold=true"
    assert sweep.run(held, "wait=false").returncode == 0
    assert "pending (JobHeldUser)" in sweep.ask("status").stdout
    assert "2 running" in sweep.run(held, "wait=false").stdout
    assert len(list(tmp_path.glob("slurm/*/"))) == 1
    cluster.kill_controller()
    cluster.start_controller(forget=True)
    assert "unknown to Slurm" in sweep.ask("collect").stderr
    sweep.finish()
    assert len(list(tmp_path.glob("runs/*"))) == 2


def test_a_job_that_slurm_forgot_and_that_works_on_is_waited_for(
    cluster: Cluster, tmp_path: Path, cache: CacheFolder
) -> None:
    """Its lock tells that it lives. Slurm's own daemon on the node would end it, so that one is cut off first."""
    sweep = ClusterSweep(cluster, tmp_path, cache, *SMOKE, "steps=600", "checkpoint_steps=20")
    launcher = sweep.start()
    sweep.wait_for_training()
    (process,) = job_processes(cluster)
    process.suspend()
    cluster.cut_off_node(process.environ()["SLURMD_NODENAME"])
    cluster.kill_controller()
    cluster.start_controller(forget=True)
    collected = sweep.ask("collect")
    assert collected.returncode == 1
    assert "unknown to Slurm, and at work" in collected.stderr
    assert "lost" not in sweep.ask("status").stdout
    assert "1 running; nothing to run" in sweep.run("dry_run=true").stdout
    process.resume()
    output, errors = launcher.communicate(timeout=200)
    assert launcher.returncode == 0, errors
    assert output.count("submitted") == 1
    assert len(list(tmp_path.glob("runs/*"))) == 1
    assert sweep.statuses[0].attempts == 1


def test_a_launcher_that_dies_is_not_missed(
    cluster: Cluster, tmp_path: Path, cache: CacheFolder, unbroken: ResultsFolder
) -> None:
    """`status` and `watch` need none; the same command again re-attaches. Nothing is submitted twice."""
    sweep = ClusterSweep(cluster, tmp_path, cache, *LONG, "seed=0,1,2", "hydra.launcher.jobs=2")
    launcher = sweep.start()
    sweep.wait_for_training()
    launcher.kill()
    launcher.communicate()
    jobs, at_work = set(cluster.states()), job_processes(cluster)
    for process in at_work:  # so that none is over before it was asked about
        process.suspend()
    assert sweep.ask("status").stdout.count("it prints to") == 2
    assert "3 cells: 3 running; nothing to run" in sweep.run("dry_run=true").stdout
    for process in at_work:
        process.resume()
    with ThreadPoolExecutor(1) as pool:
        watched = pool.submit(sweep.ask, "watch")
        output = sweep.finish()
    assert "submitted" not in output
    assert watched.result().returncode == 0
    assert last_table(watched.result().stdout) == last_table(output)
    assert set(cluster.states()) <= jobs  # Slurm forgets old ones
    sweep.same_as(unbroken)
    assert {status.attempts for status in sweep.statuses} == {1}


def test_cancel_saves_and_ends_everything(
    cluster: Cluster, tmp_path: Path, cache: CacheFolder, unbroken: ResultsFolder
) -> None:
    sweep = ClusterSweep(cluster, tmp_path, cache, *LONG, "seed=0,1", "hydra.launcher.jobs=2")
    sweep.submit()
    sweep.wait_for_training()
    asked = sweep.ask("cancel")
    assert asked.returncode == 0
    assert "cancelled 2 jobs" in asked.stdout
    cluster.wait_until(cluster.is_idle, "the jobs to end")
    assert "interrupted" in {status.state for status in sweep.statuses}
    assert not list(tmp_path.glob("runs/*"))
    sweep.finish()
    sweep.same_as(unbroken)


@pytest.mark.slow
def test_the_time_limit_only_interrupts(
    cluster: Cluster, tmp_path: Path, cache: CacheFolder, unbroken: ResultsFolder
) -> None:
    """A limit of two minutes, looked at by Slurm every half, and a job held up until the warning comes."""
    sweep = ClusterSweep(cluster, tmp_path, cache, *LONG, "seed=0")
    done = sweep.run("wait=false", "hydra.launcher.timeout_min=2", "hydra.launcher.signal_delay_s=60")
    assert done.returncode == 0, done.stderr
    sweep.wait_for_training()
    (process,) = job_processes(cluster)
    process.suspend()
    job = sweep.statuses[0].job
    cluster.wait_until(lambda: was_sent(process, signal.SIGUSR2), "the warning", 110)
    with contextlib.suppress(psutil.NoSuchProcess):
        process.resume()
    cluster.wait_until(lambda: sweep.statuses[0].state != "running", "the end that was asked for", 30)
    sweep.finish()
    sweep.same_as(unbroken)
    assert sweep.statuses[0].job == job


def test_records_hold_no_secret(cluster: Cluster, tmp_path: Path, cache: CacheFolder) -> None:
    sweep = ClusterSweep(cluster, tmp_path, cache, *QUICK)
    sweep.environment |= {"HF_TOKEN": "hf_not_for_disk"}
    sweep.finish()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(json.loads(path.read_text())["slurm_id"] for path in files if path.name == "submission.json")
    assert not [path for path in files if b"hf_not_for_disk" in path.read_bytes()]

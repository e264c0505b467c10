"""Slots of a machine: GPUs as nvidia-smi lists them and CUDA_VISIBLE_DEVICES masks them, cores, memory."""

import os
from pathlib import Path

import pytest

from sweep.errors import ConfigError
from sweep.launch import machine
from sweep.launch.machine import Gpu, LocalOptions, find_slots, visible_gpus

UUIDS = [f"GPU-{n}a7b8c9d-1111-2222-3333-444455556666" for n in range(4)]
MIGS = ["MIG-0f0f0f0f-aaaa-5555-bbbb-111111111111", "MIG-1f1f1f1f-aaaa-5555-bbbb-222222222222"]


def install_nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, n_gpus: int, migs: tuple[str, ...] = ()) -> None:
    """Put a program called nvidia-smi on the path that lists GPUs; the first is cut into MIG instances if there are."""
    listing = []
    for number in range(n_gpus):
        listing.append(f"GPU {number}: NVIDIA H100 80GB HBM3 (UUID: {UUIDS[number]})")
        if number == 0:
            listing += [f"  MIG 3g.40gb     Device  {index}: (UUID: {mig})" for index, mig in enumerate(migs)]
    sizes = [f"{uuid}, 81920" for uuid in UUIDS[:n_gpus]]
    script = folder / "nvidia-smi"
    script.write_text(
        "#!/bin/sh\ncase \"$1\" in\n-L) cat <<'E'\n"
        + "\n".join(listing)
        + "\nE\n;;\n*) cat <<'E'\n"
        + "\n".join(sizes)
        + "\nE\n;;\nesac\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


@pytest.fixture(autouse=True)
def no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def tokens() -> list[str]:
    return [gpu.token for gpu in visible_gpus()]


def test_without_nvidia_smi_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert visible_gpus() == []


def test_gpus_are_named_by_uuid_with_their_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install_nvidia_smi(tmp_path, monkeypatch, 2)
    assert visible_gpus() == [Gpu(UUIDS[0], 80 * 2.0**30), Gpu(UUIDS[1], 80 * 2.0**30)]


def test_mig_instances_stand_for_their_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install_nvidia_smi(tmp_path, monkeypatch, 2, tuple(MIGS))
    assert tokens() == [*MIGS, UUIDS[1]]


@pytest.mark.parametrize(
    ("mask", "seen"),
    [
        ("", []),
        ("2,0", ["2", "0"]),
        (" 1 , 3 ", ["1", "3"]),
        ("1,7,0", ["1"]),
        ("-1", []),
        (f"{UUIDS[3]},{UUIDS[1]}", [UUIDS[3], UUIDS[1]]),
        (UUIDS[2][:8], [UUIDS[2][:8]]),
        ("GPU-ffffffff", []),
        ("MIG-77777777-aaaa-5555-bbbb-333333333333,0", ["MIG-77777777-aaaa-5555-bbbb-333333333333", "0"]),
    ],
)
def test_the_mask_of_the_parent_is_respected(
    mask: str, seen: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install_nvidia_smi(tmp_path, monkeypatch, 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)
    assert tokens() == seen


def test_each_gpu_is_a_slot_with_a_share_of_the_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install_nvidia_smi(tmp_path, monkeypatch, 4)
    monkeypatch.setattr(machine, "usable_cores", lambda: 10)
    slots = find_slots("auto", LocalOptions())
    assert [slot.gpu for slot in slots] == UUIDS
    assert {slot.n_threads for slot in slots} == {2}
    assert {slot.memory_bytes for slot in slots} == {0.9 * 80 * 2**30}


def test_more_slots_than_gpus_share_their_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install_nvidia_smi(tmp_path, monkeypatch, 2)
    slots = find_slots("cuda", LocalOptions(slots=4))
    assert [slot.gpu for slot in slots] == [UUIDS[0], UUIDS[1], UUIDS[0], UUIDS[1]]
    assert slots[0].memory_bytes == 0.9 * 40 * 2**30


def test_one_gpu_can_be_asked_for_by_its_number(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install_nvidia_smi(tmp_path, monkeypatch, 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert [slot.gpu for slot in find_slots("cuda:1", LocalOptions())] == ["1"]
    with pytest.raises(ConfigError, match=r"device=cuda:2: 2 GPUs are visible \(CUDA_VISIBLE_DEVICES=3,1\)"):
        find_slots("cuda:2", LocalOptions())


def test_a_gpu_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        ConfigError, match=r"device=cuda: 0 GPUs are visible \(nvidia-smi lists none\); choose device=cpu"
    ):
        find_slots("cuda", LocalOptions())


@pytest.mark.parametrize(("n_slots", "n_threads"), [(None, 8), (1, 8), (2, 4), (3, 2), (20, 1)])
def test_threads_are_never_oversubscribed_on_a_cpu(
    n_slots: int | None, n_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "usable_cores", lambda: 8)
    slots = find_slots("cpu", LocalOptions(slots=n_slots))
    assert len(slots) == (n_slots or 1)
    assert {slot.n_threads for slot in slots} == {n_threads}
    assert {slot.gpu for slot in slots} == {None}


def test_threads_asked_for_by_the_parent_are_an_upper_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = machine.usable_cores()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert machine.usable_cores() == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "100000")
    assert machine.usable_cores() == cores
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert machine.usable_cores() == cores


def test_a_container_bounds_the_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(machine, "CGROUP_LIMIT", limit)
    limit.write_text("max\n")
    everything = machine.free_memory()
    limit.write_text(f"{2**20}\n")
    assert machine.free_memory() == 0.9 * 2**20 < everything
    assert find_slots("cpu", LocalOptions(memory_gib=3))[0].memory_bytes == 3 * 2**30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (LocalOptions(slots=0), "hydra.launcher.slots=0 must be at least 1"),
        (LocalOptions(memory_gib=-1.0), "hydra.launcher.memory_gib=-1.0 must be a positive number"),
    ],
)
def test_options_out_of_range_are_told(options: LocalOptions, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_slots("cpu", options)

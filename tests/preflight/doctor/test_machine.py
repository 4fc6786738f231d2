"""System, memory, shared memory, and the disk."""

import os
import shutil
from collections import namedtuple
from types import SimpleNamespace

import psutil
import pytest

from mpo.preflight.machine import GIB, disk, file_system, folder, machine

Usage = namedtuple("Usage", "total used free")
FIX = "mpo train ... run_dir=/larger/disk/runs"


@pytest.fixture
def free(monkeypatch):
    """Sets the free space of every disk, out of 100 GiB."""

    def set_to(size):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100 * GIB, 100 * GIB - size, size))

    return set_to


def look(path):
    return folder("runs", path, 50 * GIB, GIB, FIX)


def test_this_machine():
    found = {finding.name: finding for finding in machine()}
    total = psutil.virtual_memory().total / GIB
    assert f"free of {total:.2f} GiB" in found["memory"].value


def test_a_container_that_may_use_less_memory_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("mpo.preflight.machine.CGROUP", tmp_path / "memory.max")
    for written, said in (("1073741824\n", "container: 1.00 GiB"), ("max\n", None)):
        (tmp_path / "memory.max").write_text(written)
        value = next(finding.value for finding in machine() if finding.name == "memory")
        assert said in value if said else "container" not in value


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="a system without /dev/shm")
def test_dockers_64_mib_of_shared_memory_are_little(free):
    free(64 * 2**20)
    found = next(finding for finding in machine() if finding.name == "/dev/shm")
    assert found.status == "note" and "64.0 MiB" in found.value and "--shm-size" in found.fix


def test_a_folder_with_room(tmp_path, free):
    free(80 * GIB)
    found = look(tmp_path / "not" / "there" / "yet")
    assert found.status == "ok" and found.value.endswith("yet: 80.00 GiB free of 100.00 GiB, writable")
    assert not (tmp_path / "not").exists() and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("left", "status", "said"), [(20 * GIB, "note", "free space"), (GIB // 2, "problem", "full"), (0, "problem", "full")]
)
def test_a_disk_that_is_full_or_nearly(tmp_path, free, left, status, said):
    free(left)
    found = look(tmp_path)
    assert (found.status, found.fix) == (status, FIX) and found.value.endswith(said)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="a system without /proc")
def test_a_folder_that_nobody_may_write_into(free):
    free(80 * GIB)
    found = look("/proc")
    assert found.status == "problem" and "not writable (" in found.value and found.fix == FIX


def test_a_network_file_system_is_named(tmp_path, monkeypatch):
    mounts = [SimpleNamespace(mountpoint="/", fstype="ext4"), SimpleNamespace(mountpoint=str(tmp_path.resolve()), fstype="nfs4")]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: mounts)
    assert file_system(tmp_path) == "nfs4"
    assert "network file system (nfs4)" in look(tmp_path / "runs").value
    assert file_system(tmp_path.parent) == "ext4"


def test_the_three_folders_of_a_run(tmp_path, monkeypatch, free):
    free(80 * GIB)
    monkeypatch.setenv("MPO_CACHE", str(tmp_path / "cache"))
    found = {finding.name: finding for finding in disk(tmp_path / "runs")}
    assert list(found) == ["runs", "Hugging Face", "references"]
    assert found["runs"].value.startswith(f"{tmp_path / 'runs'}: ")
    assert found["references"].value.startswith(f"{tmp_path / 'cache' / 'references'}: ")
    free(0)
    fixes = [finding.fix for finding in disk(tmp_path)]
    assert fixes == [FIX, "export HF_HOME=/larger/disk/huggingface", "export MPO_CACHE=/larger/disk/mpo"]


def test_a_disk_that_cannot_be_asked_is_a_finding(tmp_path, monkeypatch):
    def fail(path):
        raise OSError("stale file handle")

    monkeypatch.setattr(shutil, "disk_usage", fail)
    found = list(disk(tmp_path))
    assert [finding.status for finding in found] == ["note"] * 3 and "stale file handle" in found[0].value

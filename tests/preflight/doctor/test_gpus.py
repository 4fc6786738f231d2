"""Descriptions of GPUs, and reasons for having none. Without a GPU, PyTorch's functions are replaced."""

from types import SimpleNamespace

import pytest
import torch

from mpo.batching.attention import kernel_for
from mpo.preflight.machine import attention, gpus, kinds, peers

TOPOLOGY = """\
\x1b[4m\tGPU0\tGPU1\tCPU Affinity\x1b[0m
GPU0\t X \t{0}\t0-31
GPU1\t{0}\t X \t0-31

Legend:
  NV#  = Connection traversing a bonded set of # NVLinks
"""

no_gpu = pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has a GPU")


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """Puts an nvidia-smi on the path that prints a driver version, or a topology for `topo`."""

    def install(driver="580.82.07", link="NV18"):
        (tmp_path / "topology").write_text(TOPOLOGY.format(link))
        script = tmp_path / "nvidia-smi"
        script.write_text(f'#!/bin/sh\nif [ "$1" = topo ]; then cat {tmp_path}/topology; else echo {driver}; fi\n')
        script.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    return install


@pytest.fixture
def cuda(monkeypatch):
    """GPUs as PyTorch describes them: (name, total GiB, free GiB, compute capability)."""

    def install(*devices, reach=True):
        gib = 2**30
        properties = [
            SimpleNamespace(name=name, total_memory=total * gib, major=major, minor=minor)
            for name, total, _, (major, minor) in devices
        ]
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
        monkeypatch.setattr(torch.cuda, "get_device_properties", properties.__getitem__)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (devices[index][2] * gib, devices[index][1] * gib))
        monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: reach)
        monkeypatch.setattr("mpo.preflight.machine._slow_bf16", lambda index: "emulated")

    return install


@no_gpu
def test_without_gpu_and_driver_a_run_is_on_the_cpu(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    found = {finding.name: finding for finding in gpus()}
    assert found["GPU"].status == "note" and "CPU" in found["GPU"].value
    assert "gloo" in found["collectives"].value


@no_gpu
@pytest.mark.skipif(torch.version.cuda is None, reason="needs a torch with CUDA")
def test_a_driver_that_pytorch_cannot_use_is_a_problem(smi, monkeypatch):
    smi()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = next(gpus())
    assert found.status == "problem" and "580.82.07" in found.value and "RuntimeError" in found.value
    assert found.fix.startswith(f"install an NVIDIA driver for CUDA {torch.version.cuda}")


@no_gpu
def test_a_build_for_cpus_beside_a_driver_is_a_problem(smi, monkeypatch):
    smi()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.version, "cuda", None)
    found = next(gpus())
    assert found.status == "problem" and found.fix == "pip install --force-reinstall torch torchvision"


@no_gpu
def test_hidden_gpus_are_named(smi, monkeypatch):
    smi()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = next(gpus())
    assert found.status == "note" and found.fix == "unset CUDA_VISIBLE_DEVICES"


def test_gpus_that_are_alike_share_a_line(cuda, smi):
    smi()
    h100 = ("NVIDIA H100", 80, 79, (9, 0))
    cuda(h100, h100, ("NVIDIA H100", 80, 70, (9, 0)), ("NVIDIA A100", 40, 39, (8, 0)))
    found = {finding.name: finding for finding in gpus()}
    assert found["GPU 0-2"].value == "NVIDIA H100, 80.00 GiB (70.00 GiB free), compute capability 9.0, bf16: yes"
    assert found["GPU 3"].value == "NVIDIA A100, 40.00 GiB (39.00 GiB free), compute capability 8.0, bf16: yes"
    assert found["between GPUs"].status == "ok" and found["between GPUs"].value.endswith("all pairs, NVLink")


def test_a_gpu_in_use_and_one_without_bf16_are_notes(cuda, smi):
    smi()
    cuda(("NVIDIA H100", 80, 3, (9, 0)), ("Tesla T4", 16, 15, (7, 5)))
    found = {finding.name: finding for finding in gpus()}
    assert found["GPU 0"].status == "note" and found["GPU 0"].fix == "nvidia-smi"
    assert found["GPU 1"].status == "note" and "bf16: emulated" in found["GPU 1"].value
    assert found["GPU 1"].fix == "mpo train ... trainer.bf16=false trainer.fp16=true"
    assert len(kinds()) == 2


def test_pairs_without_peer_access_are_listed():
    found = peers(3, lambda a, b: {a, b} != {0, 2}, TOPOLOGY.format("SYS"))
    assert found.status == "note" and found.value.startswith("no peer access between 0-2, no NVLink:")


def test_the_kernel_of_packed_rows_here():
    values = [finding.value for finding in attention()]
    assert values and all(value.startswith("PyTorch's") for value in values)
    if not torch.cuda.is_available():
        assert "its varlen kernel needs an NVIDIA GPU" in values[0]


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0), reason="needs an NVIDIA GPU, Ampere or newer"
)
def test_the_kernel_on_a_gpu_and_what_keeps_it_away():
    assert kernel_for("cuda", torch.bfloat16) == "PyTorch's varlen kernel, one call for all segments"
    assert "needs bfloat16 or float16" in kernel_for("cuda", torch.float32)
    assert "needs heads of 8" in kernel_for("cuda", torch.bfloat16, head_dim=36)

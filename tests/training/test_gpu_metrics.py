"""Readings of GPUs: NVML that fails in any way, per-node metrics, the statistics of a device, CPU affinity."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import deepspeed
import pytest
import torch
import torch.distributed as dist

from maestro_scale.training import affinity, device, distributed, nvml
from maestro_scale.training.metrics.meter import Meter
from maestro_scale.training.metrics.nodes import Nodes

GPU = "GPU-989d4723-8384-4046-39ce-b8535b6b92da"


class NVMLError(Exception):
    """As pynvml's, which does not derive from RuntimeError."""


def fake_nvml(**replaced):
    def handle(uuid):
        assert uuid == GPU
        return "handle"

    module = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlSystemGetDriverVersion=lambda: "570.86.15",
        nvmlDeviceGetHandleByUUID=handle,
        nvmlDeviceGetMemoryInfo=lambda h: SimpleNamespace(used=3 * 2**30, total=80 * 2**30),
        nvmlDeviceGetUtilizationRates=lambda h: SimpleNamespace(gpu=87, memory=12),
        nvmlDeviceGetPciInfo=lambda h: SimpleNamespace(busId=b"00000000:3B:00.0"),
    )
    for name, function in replaced.items():
        setattr(module, name, function)
    return module


def readings():
    return nvml.driver_version(), nvml.used_bytes(GPU), nvml.utilization_percent(GPU), nvml.pci_id(GPU)


def test_readings(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    assert readings() == ("570.86.15", 3 * 2**30, 87.0, "0000:3b:00.0")


def raising(error):
    def function(*_):
        raise error

    return function


@pytest.mark.parametrize(
    "error",
    [
        NVMLError("Not Supported"),
        OSError("no library"),
        TypeError("old binding"),
        RuntimeError("broken binding"),
    ],
)
@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("nvmlInit", {0, 1, 2, 3}),
        ("nvmlSystemGetDriverVersion", {0}),
        ("nvmlDeviceGetHandleByUUID", {1, 2, 3}),
        ("nvmlDeviceGetMemoryInfo", {1}),
        ("nvmlDeviceGetUtilizationRates", {2}),
        ("nvmlDeviceGetPciInfo", {3}),
    ],
)
def test_a_failing_function_makes_its_own_readings_absent(monkeypatch, name, missing, error):
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(**{name: raising(error)}))
    assert {i for i, value in enumerate(readings()) if value is None} == missing


def test_without_nvml_all_readings_are_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)  # import raises ImportError
    assert readings() == (None, None, None, None)


class OneRank:
    """A world whose other ranks are given: their hosts, and what each collective adds."""

    rank, size, device = 0, 1, torch.device("cpu")

    def __init__(self, hosts=("here",), others=()):
        self.hosts, self.others = list(hosts), list(others)

    def gather(self, value):
        return self.hosts

    def sums(self, values):
        return [sum(column) for column in zip(values, *(o[0] for o in self.others), strict=True)]

    def maxima(self, values):
        return [max(column) for column in zip(values, *(o[1] for o in self.others), strict=True)]


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr("maestro_scale.training.metrics.nodes.gpu_id", lambda device: GPU)


def test_metrics_of_a_gpu(monkeypatch, on_gpu):
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    read = Nodes(OneRank()).read()
    assert read["system/here/gpu_memory_gib"] == 3.0
    assert read["system/here/gpu_percent"] == 87.0


def test_what_a_gpu_does_not_report_is_absent_not_zero(monkeypatch, on_gpu):
    monkeypatch.setitem(
        sys.modules, "pynvml", fake_nvml(nvmlDeviceGetUtilizationRates=raising(NVMLError("MIG")))
    )
    read = Nodes(OneRank()).read()
    assert read["system/here/gpu_memory_gib"] == 3.0
    assert "system/here/gpu_percent" not in read
    monkeypatch.setitem(sys.modules, "pynvml", None)
    read = Nodes(OneRank()).read()
    assert {name.split("/")[-1] for name in read} == {"cpu_percent", "memory_gib", "network_mb_per_s"}


def test_a_node_reports_its_ranks_together(monkeypatch, on_gpu):
    """Two ranks here, two on another node of which one GPU reports no utilisation."""
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    low = float("-inf")
    others = [
        ([0, 0, 0, 13.0, 1, 0, 0, 0, 0, 0], [5.0, low]),
        ([0, 0, 0, 0, 0, 50.0, 8.0, 1.0, 40.0, 1], [low, 7.0]),
        ([0, 0, 0, 0, 0, 0, 0, 0, 0.0, 0], [low, 6.0]),
    ]
    read = Nodes(OneRank(["here", "here", "there", "there"], others)).read()
    assert read["system/here/gpu_percent"] == (87 + 13) / 2
    assert read["system/here/gpu_memory_gib"] == 5.0
    assert {k: v for k, v in read.items() if k.startswith("system/there/")} == {
        "system/there/cpu_percent": 50.0,
        "system/there/memory_gib": 8.0,
        "system/there/network_mb_per_s": 1.0,
        "system/there/gpu_memory_gib": 7.0,
        "system/there/gpu_percent": 40.0,
    }


def test_no_other_gpu_is_asked_for_its_memory(monkeypatch):
    """``mem_get_info`` of another GPU would open a context there."""
    asked = []
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda d: asked.append(d) or (2**30, 4 * 2**30))
    monkeypatch.setattr("maestro_scale.training.metrics.nodes.gpu_id", lambda device: "")
    world = OneRank()
    world.device = torch.device("cuda", 2)
    assert Nodes(world).read()["system/here/gpu_memory_gib"] == 3.0
    assert asked == [torch.device("cuda", 2)]


def test_the_meter_of_a_device_without_statistics_reports_no_memory():
    world = OneRank()
    world.device = torch.device("meta")
    meter = Meter(world)
    meter.restart()
    meter.add(4, None, 0.5)
    read = meter.read()
    assert read["peak_memory_gib"] is None
    assert (read["data_wait_s"], read["mfu"]) == (0.5, None)
    assert Meter(OneRank(), steps=1).read()["peak_memory_gib"] > 0.01


def test_deepspeed_and_torch_get_the_same_device(monkeypatch):
    """The crash of ``--gpus-per-task=1``: DeepSpeed calls set_device(LOCAL_RANK) where one device is visible."""
    calls = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda d: calls.update(torch=d))
    monkeypatch.setattr(distributed, "gpu_id", lambda d: GPU)
    monkeypatch.setattr(distributed, "pci_id", lambda d: None)
    monkeypatch.setattr(
        deepspeed, "init_distributed", lambda **k: calls.update(deepspeed=os.environ["LOCAL_RANK"])
    )
    monkeypatch.setattr(dist, "new_group", lambda **k: None)
    for name in ("MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR", "OMPI_COMM_WORLD_LOCAL_RANK"):
        monkeypatch.setenv(name, "")  # else what init_distributed sets would stay after the test
        monkeypatch.delenv(name)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    world = distributed.init_distributed(30.0)
    assert calls == {"torch": torch.device("cuda", 0), "deepspeed": "0"}
    assert (world.device, world.local_rank, world.num_nodes) == (torch.device("cuda", 0), 3, 1)


def test_pci_addresses(monkeypatch):
    properties = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x3B, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: properties)
    assert device.pci_id(torch.device("cuda", 0)) == "0000:3b:00.0"
    assert device.pci_id(torch.device("cpu")) is None
    # torch before 2.9 has the UUID only.
    older = SimpleNamespace(uuid=GPU.removeprefix("GPU-"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: older)
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert device.pci_id(torch.device("cuda", 0)) == "0000:3b:00.0"


@pytest.mark.parametrize(
    ("text", "cpus"), [("0-3,8\n", {0, 1, 2, 3, 8}), ("5", {5}), ("", set()), ("0-1,4-5", {0, 1, 4, 5})]
)
def test_cpu_lists(text, cpus):
    assert affinity.parse_cpu_list(text) == cpus


def sysfs(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_cpus_near_a_device(tmp_path):
    root = sysfs(
        tmp_path,
        {
            "bus/pci/devices/0000:3b:00.0/local_cpulist": "0-1,4-5\n",
            "bus/pci/devices/0000:3b:00.0/numa_node": "0\n",
            "bus/pci/devices/0000:86:00.0/numa_node": "1\n",
            "bus/pci/devices/0000:af:00.0/numa_node": "-1\n",
            "bus/pci/devices/0000:b0:00.0/local_cpulist": "\n",
            "devices/system/node/node1/cpulist": "2-3,6-7\n",
        },
    )
    assert affinity.cpus_near("0000:3B:00.0", root) == {0, 1, 4, 5}
    assert affinity.cpus_near("0000:86:00.0", root) == {2, 3, 6, 7}
    for unknown in ("0000:af:00.0", "0000:b0:00.0", "0000:ff:00.0"):
        assert affinity.cpus_near(unknown, root) == set()


@pytest.mark.parametrize(
    ("allowed", "near", "others", "chosen"),
    [
        # All ranks may use all 8 CPUs: the near half. The other half is outside of ``allowed`` in the next case.
        (range(8), range(4), [range(8)], range(4)),
        (range(6), range(4, 8), [range(6)], range(4, 6)),
        # The scheduler has given each rank its own CPUs.
        (range(4), range(2), [range(4, 8)], None),
        # One rank: on all CPUs of the machine, or on those that the scheduler chose.
        (range(8), range(4), [], range(4)),
        (range(2, 6), range(4), [], None),
        # Nothing to gain: no near CPU is allowed, none is known, or all are near.
        (range(4), range(4, 8), [range(4)], None),
        (range(8), (), [range(8)], None),
        (range(8), range(8), [range(8)], None),
    ],
)
def test_choice_of_cpus(allowed, near, others, chosen):
    found = affinity.choose_cpus(
        frozenset(allowed), frozenset(near), [frozenset(o) for o in others], num_online=8
    )
    assert found == (None if chosen is None else set(chosen))


def test_all_threads_and_child_processes_are_restricted():
    program = """
import os, subprocess, sys, threading
from maestro_scale.training.affinity import restrict_process
ready, done = threading.Event(), threading.Event()
def wait(): ready.set(); done.wait()
threading.Thread(target=wait).start(); ready.wait()
cpu = min(os.sched_getaffinity(0))
restrict_process(frozenset({cpu}))
masks = [os.sched_getaffinity(int(t)) for t in os.listdir("/proc/self/task")]
command = [sys.executable, "-c", "import os; print(os.sched_getaffinity(0))"]
child = subprocess.run(command, capture_output=True, text=True)
done.set()
print(len(masks) >= 2 and all(m == {cpu} for m in masks) and child.stdout.strip() == str({cpu}))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "True"

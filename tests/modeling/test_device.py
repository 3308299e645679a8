"""What the machine can do: chosen by capability, refused in sentences."""

from __future__ import annotations

import os

import pytest
import torch

from ekiden.errors import UsageError, UserError
from ekiden.modeling import device as device_module
from ekiden.modeling.device import (
    available_cores,
    configure_determinism,
    peak_flops,
    select_device,
    select_precision,
)

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)


@pytest.fixture
def gpus(monkeypatch):
    """Pretend that there are GPUs of a name and a compute capability; bf16 is always said to be supported."""

    def pretend(name: str, capability: tuple[int, int], count: int = 1) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device=None: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device=None: capability)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)

    return pretend


def test_auto_takes_a_gpu_where_there_is_one(gpus):
    gpus("", (0, 0), count=0)
    assert select_device("auto") == CPU
    gpus("Tesla T4", (7, 5), count=2)
    assert select_device("auto") == CUDA
    assert select_device("cuda:1") == torch.device("cuda", 1)
    assert select_device("cpu") == CPU


@pytest.mark.parametrize("asked", ["cuda", "cuda:0"])
def test_missing_gpu_is_one_sentence(gpus, asked):
    gpus("", (0, 0), count=0)
    with pytest.raises(
        UserError, match=r"--device cuda\S* is not there \(0 CUDA devices seen\); give --device cpu"
    ):
        select_device(asked)


def test_gpu_number_beyond_the_last(gpus):
    gpus("Tesla T4", (7, 5), count=2)
    with pytest.raises(UserError, match=r"cuda:2 is not there \(2 CUDA"):
        select_device("cuda:2")


@pytest.mark.parametrize("asked", ["gpu", "mps", "tpu:0", "cuda:x"])
def test_other_devices_are_refused(asked):
    with pytest.raises(UserError, match="give auto, cpu, cuda or cuda:N"):
        select_device(asked)


def test_pascal_is_refused(gpus):
    gpus("Tesla P100-PCIE-16GB", (6, 0))
    with pytest.raises(UserError, match=r"P100.*6\.0.*not supported.*T4"):
        select_device("auto")


@pytest.mark.parametrize(
    ("capability", "precision", "scaler"),
    [((7, 0), "fp16", True), ((7, 5), "fp16", True), ((8, 0), "bf16", False), ((9, 0), "bf16", False)],
)
def test_precision_follows_capability(gpus, capability, precision, scaler):
    gpus("some GPU", capability)
    chosen = select_precision(CUDA, "auto")
    assert (chosen.name, chosen.use_scaler) == (precision, scaler)
    assert select_precision(CUDA, "fp32").dtype == torch.float32


def test_precision_on_a_cpu():
    assert select_precision(CPU, "auto").name == "fp32"
    assert select_precision(CPU, "bf16").dtype == torch.bfloat16
    assert select_precision(CPU, "fp16").use_scaler


def test_emulated_bf16_is_refused(gpus):
    gpus("Tesla T4", (7, 5))
    with pytest.raises(UserError, match=r"bf16 needs compute capability 8.0 and Tesla T4 has 7.5; give fp16"):
        select_precision(CUDA, "bf16")


def test_unknown_precision():
    with pytest.raises(UsageError, match="did you mean 'bf16'"):
        select_precision(CPU, "bf61")


@pytest.mark.parametrize(
    ("name", "fp16", "bf16", "fp32"),
    [
        ("Tesla T4", 65e12, None, 8.1e12),
        ("NVIDIA L4", 121e12, 121e12, 30.3e12),
        ("NVIDIA A10G", 70e12, 70e12, 35e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 312e12, 19.5e12),
        ("NVIDIA H100 80GB HBM3", 989e12, 989e12, 67e12),
        ("NVIDIA H100 PCIe", 756e12, 756e12, 51e12),
        ("NVIDIA RTX A1000", None, None, None),
        ("NVIDIA L40", None, None, None),
        ("NVIDIA T400 4GB", None, None, None),
        ("AMD EPYC", None, None, None),
    ],
)
def test_peak_flops(name, fp16, bf16, fp32):
    found = [peak_flops(name, device_module._PRECISIONS[kind]) for kind in ("fp16", "bf16", "fp32")]
    assert found == [fp16, bf16, fp32]


@pytest.fixture
def untouched_settings():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.mark.usefixtures("untouched_settings")
def test_determinism(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    assert configure_determinism(1) == 1
    assert torch.get_num_threads() == 1
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert configure_determinism(None) == available_cores() >= 1

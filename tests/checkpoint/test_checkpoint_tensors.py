"""The tensor files: any dtype, shape and layout comes back to the last bit, through our reader and the library's."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from checkpoint_faults import Fault, injected
from hypothesis import given, settings
from hypothesis import strategies as st

from ekiden.checkpoint import files
from ekiden.checkpoint.header import read_header
from ekiden.checkpoint.tensors import DTYPES, read_tensors, write_tensors


def random_tensor(dtype: torch.dtype, shape: list[int], layout: str, seed: int) -> torch.Tensor:
    """Return a tensor of random bytes (NaNs of every kind included) in one of several memory layouts."""
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        tensor = torch.randint(0, 2, shape, generator=generator).bool()
    else:
        count = math.prod(shape) * dtype.itemsize
        raw = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)
        tensor = raw.view(dtype).reshape(shape)
    if layout == "transposed" and tensor.dim() > 1:
        tensor = tensor.transpose(0, -1)
    elif layout == "strided" and tensor.dim() > 0:
        tensor = tensor[::2]
    elif layout == "expanded":
        tensor = tensor.unsqueeze(0).expand(3, *tensor.shape)
    return tensor


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    fresh = [torch.empty(t.shape, dtype=t.dtype).copy_(t) for t in (first, second)]
    return torch.equal(*(t.reshape(-1).view(torch.uint8) for t in fresh))


TENSORS = st.dictionaries(
    st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__"),
    st.builds(
        random_tensor,
        st.sampled_from(list(DTYPES)),
        st.lists(st.integers(0, 4), max_size=4),
        st.sampled_from(["plain", "transposed", "strided", "expanded"]),
        st.integers(0, 2**31),
    ),
    max_size=6,
)


@settings(max_examples=150, deadline=None)
@given(TENSORS, st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2))
def test_every_tensor_comes_back_to_the_last_bit(
    tensors: dict[str, torch.Tensor], metadata: dict[str, str]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        record = write_tensors(path, tensors, metadata)
        ours, library = read_tensors(path), safetensors.torch.load_file(path)
        from_bytes = safetensors.torch.load(path.read_bytes())
        with safetensors.safe_open(path, framework="pt") as file:
            assert (file.metadata() or {}) == metadata
        assert record.bytes == path.stat().st_size
        assert record.tensors == {name: str(info) for name, info in read_header(path).items()}
        for read in (ours, library, from_bytes):
            assert read.keys() == tensors.keys()
            assert all(same_bits(read[name], tensors[name]) for name in tensors)


@settings(max_examples=50, deadline=None)
@given(TENSORS)
def test_files_of_the_library_are_read_too(tensors: dict[str, torch.Tensor]) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        safetensors.torch.save_file(tensors, path)
        read = read_tensors(path)
        assert read.keys() == tensors.keys()
        assert all(same_bits(read[name], tensors[name]) for name in tensors)


def test_every_tensor_is_aligned_to_its_own_width(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(
        path, {"a": torch.ones(3, dtype=torch.bool), "b": torch.ones(2), "c": torch.ones(1).double()}
    )
    header_bytes = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert header_bytes % 8 == 0
    for tensor in read_tensors(path).values():
        assert tensor.data_ptr() % tensor.dtype.itemsize == 0


def test_a_large_tensor_is_written_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "CHUNK_BYTES", 1000)
    tensor = torch.arange(1250, dtype=torch.float32)
    seen = Fault()
    with injected(seen):
        write_tensors(tmp_path / "x.safetensors", {"w": tensor})
    writes = [operation for operation, _path in seen.operations if operation == "write"]
    assert len(writes) == 1 + 5  # the header, then 5000 bytes
    assert torch.equal(read_tensors(tmp_path / "x.safetensors")["w"], tensor)


def test_tensors_that_need_a_gradient_are_written(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.randn(2, 2))
    write_tensors(tmp_path / "x.safetensors", {"w": weight})
    assert torch.equal(read_tensors(tmp_path / "x.safetensors")["w"], weight)


@pytest.mark.gpu
def test_tensors_on_a_gpu_are_written(tmp_path: Path) -> None:
    weight = torch.randn(3, 5, device="cuda").to(torch.bfloat16).t()
    write_tensors(tmp_path / "x.safetensors", {"w": weight})
    assert torch.equal(read_tensors(tmp_path / "x.safetensors")["w"], weight.cpu())

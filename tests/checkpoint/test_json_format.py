"""JSON checkpoints: every bit comes back, any parser reads them, other tools' number lists too; bad ones are a sentence."""

from __future__ import annotations

import base64
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conversions import DTYPES, MEGABYTE, convert_in_little_memory, every_bit, odd, refusal, trained

import ekiden
from ekiden.checkpoint.convert import compare, convert_checkpoint, open_tree
from ekiden.checkpoint.json_format import load_json_checkpoint, write_json
from ekiden.checkpoint.json_reader import read_json
from ekiden.checkpoint.json_scan import LONG_BYTES
from ekiden.checkpoint.lazy import check_tree
from ekiden.errors import UserError


def saved(value: Any, folder: Path) -> Path:
    torch.save(value, folder / "a.pt")
    return folder / "a.pt"


def written(text: str | bytes, folder: Path) -> Path:
    path = folder / "b.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def read_all(path: Path) -> Any:
    tree = read_json(path)
    for tensor in check_tree(tree, "x"):
        assert sum(map(len, tensor.read())) == tensor.bytes
    return tree


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def array(dtype: str, shape: list[int], data: Any) -> str:
    return json.dumps({"w": {"dtype": dtype, "shape": shape, "data": data}})


# -- round trips -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("readable", [False, True], ids=["base64", "numbers"])
@pytest.mark.parametrize("make", [trained, odd])
def test_pt_to_json_to_pt_keeps_every_bit(make: Callable[[], Any], readable: bool, tmp_path: Path) -> None:
    path = saved(make(), tmp_path)
    there = convert_checkpoint(path, tmp_path / "x.json", readable=readable, test_load=True)
    assert there.compared == there.tensors > 0
    back = convert_checkpoint(there.path, tmp_path / "y.pt", test_load=True)
    assert back.compared == there.tensors
    assert compare(open_tree(path), torch.load(back.path, weights_only=True)) == there.tensors
    # And without a file between: what torch.load returns.
    assert compare(open_tree(path), ekiden.load_json_checkpoint(there.path)) == there.tensors


def test_any_parser_reads_it_and_finds_the_numbers(tmp_path: Path) -> None:
    """Only Python's json module and base64, as somebody without Ekiden would."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    value = odd() | {"w": torch.randn(300, 7), "bf16": torch.randn(600).bfloat16()}
    path = convert_checkpoint(saved(value, tmp_path), tmp_path / "x.json").path
    plain = json.loads(path.read_bytes(), parse_constant=refuse)
    pairs = {key: item for key, item in plain["__value__"]["__dict__"] if isinstance(key, str)}
    held = pairs["w"]
    found = np.frombuffer(base64.b64decode(held["data"]), "<f4").reshape(held["shape"])
    assert np.array_equal(found, value["w"].numpy()) and held["dtype"] == "float32"
    half = np.frombuffer(base64.b64decode(pairs["bf16"]["data"]), "<u2").astype(np.uint32) << 16
    assert np.array_equal(half.view(np.float32), value["bf16"].float().numpy())
    assert pairs["floats"][:3] == [{"__float__": name} for name in ("NaN", "Infinity", "-Infinity")]


def test_base64_takes_a_third_more_and_no_more(tmp_path: Path) -> None:
    there = convert_checkpoint(saved({"model": {"w": torch.randn(500, 1000)}}, tmp_path), tmp_path / "x.json")
    assert 1.33 < there.bytes / there.source_bytes < 1.34 and "1.33" in str(there)


def test_tied_weights_are_kept_once_and_come_back_tied(tmp_path: Path) -> None:
    base = torch.randn(100, 100)
    path = convert_checkpoint(saved({"wte": base, "head": base}, tmp_path), tmp_path / "x.json").path
    assert path.stat().st_size < 55_000
    back = load_json_checkpoint(path)
    assert back["wte"].data_ptr() == back["head"].data_ptr() and torch.equal(back["wte"], base)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_are_written_where_there_are_numbers_and_come_back(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    """Random bits hold NaNs, which JSON has no numbers for; without them the lists are read back to the last bit."""
    tensor = every_bit(dtype, 40, 50)
    if dtype.is_floating_point and dtype.itemsize > 1:
        tensor[~torch.isfinite(tensor)] = -0.0
        tensor[0, :3] = torch.tensor([5e-324, 1.0, 65504.0], dtype=torch.float64).to(dtype)
    source = saved({"w": tensor, "nan": every_bit(dtype, 40, 50)}, tmp_path)
    path = convert_checkpoint(source, tmp_path / "x.json", readable=True, test_load=True).path
    plain = json.loads(path.read_text())
    has_numbers = not dtype.is_complex and not (dtype.is_floating_point and dtype.itemsize == 1)
    assert isinstance(plain["w"]["data"], list if has_numbers else str)
    assert isinstance(plain["nan"]["data"], str) == (dtype.is_floating_point or dtype.is_complex)
    assert bits(load_json_checkpoint(path)["w"]) == bits(tensor)


def test_every_length_about_the_limit_of_a_long_string(tmp_path: Path) -> None:
    """Strings, names and arrays of numbers around the length from which they stay in the file."""
    near = range(LONG_BYTES - 4, LONG_BYTES + 4)
    value = {
        "texts": ["x" * n for n in near] + ["\\" * (n // 2) for n in near] + ['"' * (n // 2) for n in near],
        "bytes": [bytes(n * 3 // 4) for n in near],
        "numbers": [[1] * (n // 2) for n in near],
        "tensors": [torch.arange(n * 3 // 4, dtype=torch.uint8) for n in near],
        "names": {"k" * n: n for n in near},
    }
    path = convert_checkpoint(saved(value, tmp_path), tmp_path / "x.json", test_load=True).path
    compare(open_tree(tmp_path / "a.pt"), load_json_checkpoint(path))


def test_where_a_file_is_cut_into_reads_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = convert_checkpoint(saved(odd(), tmp_path), tmp_path / "x.json").path
    numbers = convert_checkpoint(tmp_path / "a.pt", tmp_path / "y.json", readable=True).path
    expected = open_tree(tmp_path / "a.pt")
    for size in (1, 2, 7, 511):
        monkeypatch.setattr("ekiden.checkpoint.files.CHUNK_BYTES", size)
        monkeypatch.setattr("ekiden.checkpoint.lazy.CHUNK_BYTES", max(size, 3))
        for file in (path, numbers):
            if size > 2 or file == path:
                assert compare(expected, read_json(file)) == len(check_tree(expected, "a"))


# -- what other tools write --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("wrap", ["model_state_dict", "state_dict", "model", "weights", ""])
def test_plain_number_lists_are_tensors(wrap: str, indent: int | None, tmp_path: Path) -> None:
    matrix, vector = torch.randn(30, 20), torch.randn(7)
    weights = {"a.weight": matrix.tolist(), "a.bias": vector.tolist(), "deep.w": [[[1, 2], [3, 4]]]}
    value = {wrap: weights, "step": 3, "loss": 2.5, "history": [1.5, 2.5]} if wrap else weights
    tree = load_json_checkpoint(written(json.dumps(value, indent=indent), tmp_path))
    held = tree[wrap] if wrap else tree
    assert torch.equal(held["a.weight"], matrix) and torch.equal(held["a.bias"], vector)
    assert held["deep.w"].shape == (1, 2, 2) and held["deep.w"].dtype == torch.float32
    if wrap:
        assert (tree["step"], tree["loss"], tree["history"]) == (3, 2.5, [1.5, 2.5])


def test_moments_in_number_lists_are_tensors_and_other_lists_are_lists(tmp_path: Path) -> None:
    value = {
        "optimizer_state_dict": {
            "state": {"0": {"step": 4, "exp_avg": [[0.5] * 400], "exp_avg_sq": [[0.25] * 400]}},
            "param_groups": [{"params": [0], "lr": 1e-3, "betas": [0.9, 0.95]}],
        },
        "curve": [0.5] * 400,
    }
    tree = load_json_checkpoint(written(json.dumps(value), tmp_path))
    entry = tree["optimizer_state_dict"]["state"]["0"]
    assert entry["exp_avg"].shape == (1, 400) and entry["step"] == 4
    assert tree["optimizer_state_dict"]["param_groups"][0]["betas"] == [0.9, 0.95]
    assert tree["curve"] == [0.5] * 400


@pytest.mark.parametrize("dtype", ["float32", "torch.float32", "bfloat16", "int64", "bool"])
@pytest.mark.parametrize("count", [6, 6000])
def test_tensor_objects_with_nested_or_flat_numbers(dtype: str, count: int, tmp_path: Path) -> None:
    values = torch.arange(count).reshape(2, 3, -1) % 2
    torch_dtype = getattr(torch, dtype.removeprefix("torch."))
    for data in (values.tolist(), values.flatten().tolist()):
        found = load_json_checkpoint(written(array(dtype, list(values.shape), data), tmp_path))["w"]
        assert found.dtype == torch_dtype and torch.equal(found, values.to(torch_dtype))


def test_numbers_in_every_spelling(tmp_path: Path) -> None:
    text = '{"w":{"dtype":"float64","shape":[8],"data":[ 1,-0.0 ,1E3,\n1.5e-3,0.1,123456789012345678,-1e+2\t,5e-324 ]}}'
    expected = [1, -0.0, 1e3, 1.5e-3, 0.1, 123456789012345678, -100, 5e-324]
    found = load_json_checkpoint(written(text, tmp_path))["w"]
    assert found.tolist() == [float(number) for number in expected] and math.copysign(1, found[1]) == -1


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    for shape, data in (([], 2.5), ([], [2.5]), ([0], []), ([0, 3], []), ([0], "")):
        found = load_json_checkpoint(written(array("float32", shape, data), tmp_path))["w"]
        assert list(found.shape) == shape and found.flatten().tolist() == [2.5] * found.numel()


def test_rounding_is_to_the_nearest_as_torch_does(tmp_path: Path) -> None:
    random.seed(3)
    values = [random.gauss(0, 1) * 10 ** random.uniform(-6, 4) for _ in range(2000)]
    for dtype in ("bfloat16", "float16", "float32"):
        found = load_json_checkpoint(written(array(dtype, [2000], values), tmp_path))["w"]
        single = torch.tensor(values, dtype=torch.float64).to(
            torch.float16 if dtype == "float16" else torch.float32
        )
        assert torch.equal(found, single.to(getattr(torch, dtype)))


# -- bad input ---------------------------------------------------------------------------------------------------------

LONG = [0.5] * 1000
ZEROS = "AAAA" * 1000


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (array("float32", [10**9], "AAAA"), "needs 5333333336"),
        (array("float32", [10**9], ZEROS), "needs 5333333336"),
        (array("float32", [10**9], [1, 2]), "too few for its shape"),
        (array("float32", [10**9], LONG), "too few for its shape"),
        (array("float32", [2**40, 2**40], [1]), "too few for its shape"),
        (array("float32", [2**60], "AAAA"), "which cannot be"),
        (array("float32", [-3], "AAAA"), "which cannot be"),
        (array("float32", [1.5], "AAAA"), "which cannot be"),
        (array("float32", [True], "AAAA"), "which cannot be"),
        (array("float32", [1] * 5000, "AAAA"), "which cannot be"),
        (array("float32", "many", "AAAA"), "which cannot be"),
        (array("float32", [4, 5], LONG), "does not hold as many numbers as its shape says"),
        (array("float32", [400, 5], LONG), "does not hold as many numbers|too few for its shape"),
        (array("float32", [20, 50], [LONG[:40]] * 25), "and its numbers \\[25, 40\\]"),
        (array("float32", [20, 50], [LONG[:40]] * 10 + [LONG[:60]] * 10), "rows of 40 and of 60"),
        (array("float32", [1000], [*LONG[:999], [0.5]]), "mixes numbers and lists"),
        (array("float33", [1], "AAAA"), "dtype 'float33', which is unknown"),
        (array("int8", [1000], [*[1] * 999, 300]), "int8 cannot hold"),
        (array("int8", [1000], LONG), "holds fractions"),
        (array("bool", [1000], [2] * 1000), "other numbers than 0 and 1"),
        (array("float16", [1000], [*LONG[:999], 70000]), "beyond float16"),
        (array("complex64", [1000], LONG), "read from base64 only"),
        (array("float32", [1], "AA=A=AAA"), "is not base64"),
        (array("float32", [750], "AAAA" * 300 + "AAA=" + "AAAA" * 699), "base64"),
        (array("float32", [750], "AAA\u00e9" * 1000), "base64"),
        (array("float32", [2], {"a": 1}), "neither base64 nor numbers"),
        (array("float32", [2], ["1", "2"]), "neither base64 nor numbers"),
        ('{"w": NaN}', "NaN is not JSON"),
        ('{"w": [1, -Infinity]}', "Infinity is not JSON"),
        ('{"w": 1e400}', "beyond a float"),
        ('{"a.w": [' + "0.5," * 5000 + "NaN]}", "NaN is not JSON"),
        ('{"a.w": [' + "0.5," * 5000 + "Infinity]}", "Infinity is not JSON"),
        ('{"a.w": [' + "0.5," * 5000 + "1e400]}", "not a list of numbers|beyond float32"),
        ('{"a.w": [' + "0.5," * 5000 + "]}", "not a list of numbers"),
        ('{"a.w": [' + "0.5," * 5000 + ",0.5]}", "not a list of numbers"),
        ('{"a.w": [' + "0.5 " * 5000 + "]}", "not a list of numbers"),
        ('{"a.w": [' + "0.5," * 5000 + "0.5", "cut short"),
        ('{"a.w": [' + "[0.5]," * 999 + "[0.5][0.5]]}", "lacks a comma"),
        ('{"a": 1, "a": 2}', "twice"),
        ("[" * 100_000, "more than 64 deep"),
        ("[" * 60 + "]" * 60, "nested deeper"),
        ('{"a.w": ' + "[" * 60 + "0.5" + "]" * 60 + "}", "nested deeper"),
        ('{"a":' * 100_000, "nested deeper"),
        ('{"a": ' + "9" * 5000 + "}", "digits"),
        ('{"a": "' + "x" * 5000, "cut short"),
        ('{"a": "x', "cut short"),
        ('{"a": "\\', "cut short"),
        ('{"' + "k" * 5000 + '": 1}', "name longer than 512"),
        ('{"a": "\\ud800' + "x" * 5000 + '\n"}', "not a string of JSON"),
        ("", "no checkpoint|not valid JSON"),
        ("{", "not valid JSON"),
        ("{} {}", "not valid JSON"),
        (b"\xff\xfe{\x00}\x00", "not valid JSON|no checkpoint"),
        ('{"__ekiden__": {"version": 99}}', "version of the format"),
        ('{"__ekiden__": 5}', "version of the format"),
        ('{"__ekiden__": {"version": 1, "ordered": [5]}}', "not well-formed"),
        ('{"__ekiden__": {"version": 1, "ordered": []}, "a": {"__same_as__": 0}}', "does not stand before"),
        ('{"__ekiden__": {"version": 1, "ordered": []}, "a": {"__float__": "1"}}', "not well-formed"),
        ('{"__ekiden__": {"version": 1, "ordered": []}, "a": {"__eval__": "1"}}', "not well-formed"),
        ('{"__ekiden__": {"version": 1, "ordered": []}, "a": {"__set__": [[1]]}}', "key that cannot be one"),
        ('{"__ekiden__": {"version": 1, "ordered": []}, "a": {"__dict__": [[1]]}}', "not well-formed"),
        ('{"__ekiden__": {"version": 1, "ordered": []}, "a": {"__tuple__": [], "b": 1}}', "keys beside"),
        ('{"__ekiden__": {"version": 1, "ordered": []}, "a": {"__bytes__": "A"}}', "not base64"),
        ('{"__ekiden__": {"version": 1, "ordered": []}, "a": {"__device__": "x; y"}}', "not well-formed"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_json_is_one_sentence(text: str | bytes, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words) as error:
        read_all(written(text, tmp_path))
    assert "\n" not in str(error.value)


def claims(tmp_path: Path) -> dict[str, Path]:
    """Return files that would need gigabytes if what they say, or how they are made, were believed."""
    big = {
        "shape": array("float32", [10**9], ZEROS),
        "many tensors": '{"w":[' + ",".join([array("float32", [10**9], "AAAA")] * 3) + "]}",
        "values": "[" + "{}," * (3 * MEGABYTE) + "{}]",
        "text": '{"a": "' + "x" * (70 * MEGABYTE) + '"}',
        "numbers outside a tensor": '{"a": [' + "0," * (10 * MEGABYTE) + "0]}",
        "no number at the end": '{"a.w": [' + "0," * (10 * MEGABYTE) + "NaN]}",
        "rest": "[" + f'"{"x" * 500}",' * 140_000 + "1]",
        "depth": "[" * (20 * MEGABYTE),
        "backslashes": '{"a": "' + "\\" * (16 * MEGABYTE + 1) + '"}',
    }
    paths = {}
    for number, (name, text) in enumerate(big.items()):
        paths[name] = tmp_path / f"{number}.json"
        paths[name].write_text(text)
    return paths


LITTLE = """
import resource, sys
from pathlib import Path
from ekiden.checkpoint.convert import convert_checkpoint
from ekiden.errors import UserError
resource.setrlimit(resource.RLIMIT_AS, (400 << 20, 400 << 20))
for path in sys.argv[1:]:
    try:
        convert_checkpoint(path, path + ".pt")
    except UserError as error:
        assert not Path(path + ".pt").exists()
        print(error)
"""


def test_claims_cost_no_memory(tmp_path: Path) -> None:
    """All of them in one process with 400 MB of address space, and a sparse file and a pipe."""
    paths = claims(tmp_path)
    paths["sparse"] = tmp_path / "sparse.json"
    paths["sparse"].write_text('{"a": "')
    os.truncate(paths["sparse"], 700 * MEGABYTE)
    paths["pipe"] = tmp_path / "pipe.json"
    os.mkfifo(paths["pipe"])
    done = subprocess.run(
        [sys.executable, "-c", LITTLE, *map(str, paths.values())],
        capture_output=True,
        text=True,
        check=False,
        env={"OPENBLAS_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
    )
    sentences = done.stdout.splitlines()
    assert (done.returncode, done.stderr, len(sentences)) == (0, "", len(paths)), done.stderr
    assert all(len(sentence) < 600 and str(tmp_path) in sentence for sentence in sentences)


def test_a_bad_file_is_one_sentence_of_the_verb(tmp_path: Path) -> None:
    path = written(array("float32", [10**9], "AAAA"), tmp_path)
    assert "has 4 characters of base64" in refusal(path, tmp_path)


def test_a_tensor_larger_than_memory_goes_through(tmp_path: Path) -> None:
    """90 MB there and back in 150 MB of address space, of which Python and its libraries take most."""
    elements = 90 * MEGABYTE
    path = tmp_path / "large.pt"
    torch.save({"w": torch.zeros(elements, dtype=torch.uint8), "b": torch.ones(3)}, path)
    done = convert_in_little_memory(path, tmp_path / "large.json", 150)
    assert done.returncode == 0, done.stderr
    done = convert_in_little_memory(tmp_path / "large.json", tmp_path / "again.pt", 150)
    assert done.returncode == 0, done.stderr
    assert compare(open_tree(path), open_tree(tmp_path / "again.pt")) == 2


def test_every_cut_is_told(tmp_path: Path) -> None:
    path = convert_checkpoint(saved(trained(), tmp_path), tmp_path / "x.json").path
    data = path.read_bytes().rstrip()
    for length in [*range(0, 300, 7), *range(300, len(data), 331), len(data) - 1]:
        with pytest.raises(UserError):
            read_all(written(data[:length], tmp_path))


def test_any_changed_byte_is_read_or_told(tmp_path: Path) -> None:
    """JSON carries no hash; what is asked of a damaged file is a value or a sentence, and no other exception."""
    random.seed(5)
    path = convert_checkpoint(saved(odd(), tmp_path), tmp_path / "x.json").path
    numbers = convert_checkpoint(tmp_path / "a.pt", tmp_path / "y.json", readable=True).path
    told = 0
    for number in range(160):
        data = bytearray((path, numbers)[number % 2].read_bytes())
        for _ in range(3):
            data[random.randrange(len(data))] = random.choice(
                b'[]{}",:0-9eE\\ \n\xff' + bytes([number % 256])
            )
        try:
            read_all(written(bytes(data), tmp_path))
        except UserError as error:
            assert "\n" not in str(error)
            told += 1
    assert told > 80


# -- writing -----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_kept_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    deep: list[Any] = []
    for _ in range(22):
        deep = [(deep,)]
    for value in ({"a": object()}, {"a": 2**70}, {"a": deep}):
        with pytest.raises(UserError):
            write_json(tmp_path / "x.json", value)
        assert not list(tmp_path.iterdir())


def test_a_float_pun_is_no_tensor(tmp_path: Path) -> None:
    """An ordinary dict that looks like a tensor or like one of the marks stays what it is."""
    value = {"dtype": "float32", "shape": [1], "data": "AAAA"}
    marks = {"__float__": "NaN", "x": {"__tuple__": [1]}, "y": {"__value__": 1}, "part-": 1}
    given = [value, marks, torch.ones(1)]  # nothing without a tensor is converted
    path = convert_checkpoint(saved(given, tmp_path), tmp_path / "x.json", test_load=True).path
    assert load_json_checkpoint(path)[:2] == [value, marks]

"""The notebooks: written as they are kept, and executed from top to bottom on a CPU with the network closed."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import pytest
from campaign import outcome
from sessions import Zygote

from ekiden.cli import cli
from ekiden.errors import UsageError, UserError
from ekiden.kaggle import interactive, session
from ekiden.kaggle.launcher import packed_package
from ekiden.kaggle.notebook import write_notebook

ROOT = Path(__file__).parents[2]
KEPT = ("gpt2-wikitext-103.ipynb", "gemma3-multilingual.ipynb")
TINY = """
num_hidden_layers: 2
hidden_size: 32
num_attention_heads: 2
num_key_value_heads: {heads}
head_dim: 16
intermediate_size: 64
max_length: 32
batch_size: 4
gradient_accumulation_steps: 1
max_steps: 12
log_steps: 1
eval_steps: 4
eval_tokens: 200
save_steps: 4
sample_tokens: 4
warmup_steps: 2
num_threads: 1
"""


def commands() -> list[list[str]]:
    """Return the commands of `make notebooks`."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    rule = re.search(r"(?m)^notebooks:.*\n((?:\t.*\n)+)", makefile)
    assert rule
    return [shlex.split(line)[1:] for line in rule[1].splitlines()]


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def test_the_kept_notebooks_are_what_the_verb_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    monkeypatch.chdir(ROOT)
    for arguments in commands():
        place = arguments.index("--output") + 1
        name = Path(arguments[place]).name
        arguments[place] = str(tmp_path / name)
        cli.main(arguments, standalone_mode=False)
        assert (tmp_path / name).read_text() == (ROOT / "notebooks" / name).read_text(), (
            "run `make notebooks`"
        )
        written.append(name)
    assert sorted(written) == sorted(KEPT)


@pytest.mark.parametrize("package", ["embed", "input"])
def test_a_notebook_is_valid_and_explains_itself(
    tmp_path: Path, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbformat = pytest.importorskip("nbformat")
    monkeypatch.setenv("KAGGLE_API_TOKEN", "KGAT_secret")
    path = write_notebook(
        "gemma3-tiny",
        tmp_path / "train.ipynb",
        corpus=["me/some-corpus-1"],
        token_budget="1M",
        prompts=["a'b"],
        package=package,
    )
    nbformat.validate(nbformat.read(path, as_version=4))
    assert path.stat().st_size < 1_000_000 and "KGAT" not in path.read_text()
    cells = json.loads(path.read_text())["cells"]
    kinds = [cell["cell_type"] for cell in cells]
    # Every piece of code has its text above it.
    assert kinds[:2] == ["markdown", "code"] and all(a != b for a, b in zip(kinds, kinds[1:]))
    for cell in cells:
        if cell["cell_type"] == "code":
            compile(source(cell), cell["id"], "exec")
    values: dict[str, Any] = {}
    exec(source(cells[1]), values)  # noqa: S102
    assert values["CORPUS"] == ["me/some-corpus-1"] and values["PROMPTS"] == ["a'b"] and values["GPUS"] == 2
    assert values["RECIPE"] == "\npreset: gemma3-tiny\nmax_steps: 245  # 1M tokens\n"
    with pytest.raises(UsageError, match=r"must end in \.ipynb"):
        write_notebook("gemma3-tiny", tmp_path / "train.py", corpus=[])


@pytest.fixture
def kaggle_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zygote: Zygote) -> Path:
    """Return a /kaggle of this test, in which training is forked."""
    (tmp_path / "working").mkdir()
    (tmp_path / "input").mkdir()
    monkeypatch.setattr(session, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "executable", str(zygote.python))
    return tmp_path


def test_two_sessions_of_a_notebook_are_one_run(
    kaggle_root: Path,
    packed: dict[str, Path],
    recipe: str,
    reference: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for ref, path in packed.items():
        target = kaggle_root / "input" / ref.split("/")[1]
        target.symlink_to(path)
    dataset = interactive.find_dataset()
    run = interactive.take_up()
    assert "this is the beginning" in capsys.readouterr().out
    options: dict[str, Any] = {
        "hours": 1.0,
        "gpus": 0,
        "began": __import__("time").time(),
        "refresh_seconds": 0.1,
    }
    monkeypatch.setenv("STOP_AFTER_STEPS", "8")
    verdict = interactive.train(recipe, dataset, run, **options)
    assert "it goes on at step 8" in interactive.describe_verdict(verdict)
    monkeypatch.delenv("STOP_AFTER_STEPS")
    (kaggle_root / "working").rename(kaggle_root / "input" / "last-version")
    (kaggle_root / "working").mkdir()
    run = interactive.take_up()
    assert "at step 8" in capsys.readouterr().out
    verdict = interactive.train(recipe, dataset, run, **options)
    assert "The run is complete" in interactive.describe_verdict(verdict)
    assert outcome(run) == reference
    assert interactive.model_of(run) == run / "final_model"
    interactive.show_samples(run)
    assert "english: " in capsys.readouterr().out
    with pytest.raises(UserError, match="training failed"):
        interactive.train("preset: gpt2-10m\nhidden_size: 7\n", dataset, run, **options)


def test_without_a_corpus_a_sentence_says_what_to_add(kaggle_root: Path) -> None:
    with pytest.raises(
        UserError, match="add the datasets that `ekiden kaggle corpus upload` printed as inputs"
    ):
        interactive.find_dataset(["me/some-corpus-1"])


def fresh_environment(folder: Path) -> Path:
    """Create an environment with this one's packages but without Ekiden; return its python.

    A folder that a .pth file names is searched, but its own .pth files, an editable installation's, are not read.
    """
    venv.create(folder)
    own = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    packages = [path for path in sys.path if path.endswith("-packages")]
    (own / "packages.pth").write_text("\n".join(packages))
    return folder / "bin" / "python"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", KEPT)
def test_a_kept_notebook_executes_without_a_network(
    name: str, packed: dict[str, Path], language_folder: Path, tmp_path: Path
) -> None:
    """Gemma with token shards; GPT-2 with a corpus of text, for which the notebook makes tokenizer and shards."""
    pytest.importorskip("nbclient")
    from ekiden.kaggle.pack import plan_pack, write_part

    mounts = {ref.split("/")[1]: path for ref, path in packed.items()}
    if name.startswith("gpt2"):
        write_part(plan_pack(language_folder, "text-corpus", 10**9), 1, tmp_path / "text")
        mounts = {"text-corpus-1": tmp_path / "text"}
    for slug, path in mounts.items():
        (tmp_path / "kaggle" / "input" / "datasets" / "me").mkdir(parents=True, exist_ok=True)
        (tmp_path / "kaggle" / "input" / "datasets" / "me" / slug).symlink_to(path)
    wheel = tmp_path / "kaggle" / "input" / "ekiden-wheel-1" / "ekiden-wheel-00000.bin"
    wheel.parent.mkdir(parents=True)
    wheel.write_bytes(base64.b85decode(packed_package()))
    (tmp_path / "kaggle" / "working").mkdir()
    preset = "gpt2-10m" if name.startswith("gpt2") else "gemma3-270m"
    heads = 2 if name.startswith("gpt2") else 1
    values = {"GPUS": 0, "VOCAB_SIZE": 430, "RECIPE": f"preset: {preset}" + TINY.format(heads=heads)}
    (tmp_path / "settings.json").write_text(json.dumps(values))
    executed = tmp_path / "executed.ipynb"
    script = [fresh_environment(tmp_path / "fresh"), Path(__file__).with_name("execute_notebook.py")]
    done = subprocess.run(
        [*script, ROOT / "notebooks" / name, tmp_path / "settings.json", executed],
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(tmp_path),
            "EKIDEN_KAGGLE_ROOT": str(tmp_path / "kaggle"),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    print(f"{name} in a fresh environment; network {done.stdout.strip()}")
    shown = executed.read_text()
    assert "ekiden 0.1.0 from /tmp/" in shown and "completed at step 12" in shown
    assert "The run is complete" in shown
    assert '"image/png"' in shown or importlib.util.find_spec("matplotlib") is None  # the curve
    working = tmp_path / "kaggle" / "working"
    assert (working / "model" / "config.json").is_file() and (working / "run" / "final_model").is_dir()
    assert "english: " in shown and ("closed: " in done.stdout or "could not be closed" in done.stdout)

"""Guarantees 2 to 4: no pickle from files, no torch.load without weights_only, no shell, safe YAML.

Each rule is shown a source that breaks it and must find it; then it reads the repository.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.distributed.checkpoint import FileSystemReader

from pardemo import sweep
from pardemo.cluster.integrity import Damaged, Reader
from pardemo.parameters import Refused

from . import rules

BROKEN = {
    "pickle.load(file)": "import pickle\npickle.load(file)",
    "under another name": "from pickle import loads as read\nread(data)",
    "an unpickler of its own": "import pickle\nclass Mine(pickle.Unpickler): ...",
    "torch.load(path)": "import torch\ntorch.load(path)",
    "weights_only=False": "import torch\ntorch.load(path, weights_only=False)",
    "weights_only=flag": "import torch as t\nt.load(path, weights_only=flag)",
    "a checkpoint past the checks": "import torch.distributed.checkpoint as dcp\ndcp.load(x)",
    "numpy with objects": "import numpy as np\nnp.load(path, allow_pickle=True)",
    "pandas.read_pickle": "import pandas as pd\npd.read_pickle(path)",
    "shell=True": "import subprocess\nsubprocess.run(f'ls {name}', shell=True)",
    "shell=a variable": "import subprocess\nsubprocess.Popen(words, shell=how)",
    "os.system": "import os\nos.system('ls')",
    "system under another name": "from os import system\nsystem('ls')",
    "yaml.load": "import yaml\nyaml.load(text, Loader=yaml.Loader)",
    "yaml.unsafe_load": "import yaml\nyaml.unsafe_load(text)",
    "eval": "eval(parameters['lr'])",
    "rpc": "import torch.distributed.rpc as rpc\nrpc.init_rpc('worker')",
}


@pytest.mark.parametrize("source", BROKEN.values(), ids=list(BROKEN))
def test_a_source_that_breaks_the_rule_is_found(source: str) -> None:
    assert rules.faults(source, "pardemo/made_up.py") != []


@pytest.mark.parametrize(
    "cell", ["!ls", "%%bash\nls", "x = 1\n  !rm -r y", "%sx ls", "%pip install x"]
)
def test_a_notebook_with_a_shell_is_found(cell: str) -> None:
    book = {"cells": [{"cell_type": "code", "source": [cell]}]}
    assert rules.notebook_faults(json.dumps(book), "notebooks/made_up.ipynb") != []


def test_the_package_keeps_the_rules() -> None:
    found = [
        fault
        for path in rules.sources()
        for fault in rules.faults(path.read_text(), str(path.relative_to(rules.ROOT)))
    ]
    assert found == []


def test_every_excuse_is_still_needed() -> None:
    for file, call in rules.EXCUSED:
        source = (rules.ROOT / file).read_text()
        assert any(call in fault for fault in rules.faults(source, "elsewhere.py")), (file, call)


def test_lessons_and_benchmarks_keep_the_rules() -> None:
    found = [
        fault
        for path in rules.books()
        for fault in rules.notebook_faults(path.read_text(), str(path.relative_to(rules.ROOT)))
    ]
    assert found == []


class Planted:
    """Makes a folder when it is unpickled."""

    def __init__(self, where: Path) -> None:
        self.where = where

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.where),)


def test_a_planted_checkpoint_is_refused_and_does_not_run(tmp_path: Path) -> None:
    """Broken on purpose below: what torch itself would have done with the same file."""
    planted = tmp_path / "ran"
    folder = tmp_path / "step-00000001"
    folder.mkdir(mode=0o700)
    (folder / ".metadata").write_bytes(pickle.dumps(Planted(planted)))
    with pytest.raises(Damaged, match="mkdir"):
        Reader(folder).read_metadata()
    assert not planted.exists()
    with contextlib.suppress(AttributeError):  # what the payload returns is no metadata
        FileSystemReader(folder).read_metadata()
    assert planted.exists(), "the file was harmless: the test above has shown nothing"


def test_planted_weights_are_refused_and_do_not_run(tmp_path: Path) -> None:
    """Broken on purpose below: the same file without weights_only runs."""
    planted = tmp_path / "ran"
    torch.save(Planted(planted), tmp_path / "weights.pt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "weights.pt", weights_only=True)
    assert not planted.exists()
    torch.load(tmp_path / "weights.pt", weights_only=False)
    assert planted.exists()


def test_yaml_with_an_object_is_refused_and_does_not_run(tmp_path: Path) -> None:
    """Broken on purpose below: the unsafe loader makes the folder."""
    planted = tmp_path / "ran"
    file = tmp_path / "sweep.yml"
    file.write_text(f"benchmark: !!python/object/apply:os.mkdir ['{planted}']\n")
    with pytest.raises(Refused, match="not a YAML file of plain values"):
        sweep.load(file)
    assert not planted.exists()
    yaml.unsafe_load(file.read_text())
    assert planted.exists()


def test_a_value_with_shell_words_reaches_a_program_as_one_word(tmp_path: Path) -> None:
    """Slurm's script is the only shell text pardemo writes: it is run here by a real shell."""
    import subprocess

    from pardemo.cluster.templates import Plan, template

    evil = ["$(touch PWN)", "; touch PWN", "`touch PWN`", "a b", "'", '"', "-x", "\\"]
    words = ("show.py", *evil)
    (tmp_path / "show.py").write_text("import json, sys; print(json.dumps(sys.argv[1:]))")
    script = template("torchrun", Plan(program=words, gpus_per_node=0, nodes=1))
    last = script[script.index("show.py") :]
    done = subprocess.run(
        ["bash", "-c", f'exec "$0" {last}', sys.executable], cwd=tmp_path, capture_output=True,
        text=True,
    )  # fmt: skip
    assert json.loads(done.stdout) == evil
    assert not (tmp_path / "PWN").exists()

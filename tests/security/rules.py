"""What sources and notebooks may not do, found in their syntax; who is excused, and why."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CALLS = {  # the end of a dotted name -> what is wrong with it
    "pickle.load": "a pickle is code",
    "pickle.loads": "a pickle is code",
    "pickle.Unpickler": "a pickle is code",
    "cloudpickle.load": "a pickle is code",
    "cloudpickle.loads": "a pickle is code",
    "joblib.load": "a pickle is code",
    "marshal.loads": "marshalled data is code",
    "shelve.open": "a shelf holds pickles",
    "read_pickle": "a pickle is code",
    "checkpoint.load": "its .metadata is a pickle: through cluster.checkpoint only",
    "os.system": "a shell",
    "os.popen": "a shell",
    "subprocess.getoutput": "a shell",
    "subprocess.getstatusoutput": "a shell",
    "create_subprocess_shell": "a shell",
    "pty.spawn": "a shell",
    "eval": "code from text",
    "exec": "code from text",
    "yaml.load": "YAML with objects",
    "yaml.load_all": "YAML with objects",
    "yaml.full_load": "YAML with objects",
    "yaml.unsafe_load": "YAML with objects",
    "rpc.init_rpc": "whoever reaches an rpc port runs code",
    "extractall": "an archive may write anywhere",
    "tempfile.mktemp": "another may make that file first",
}
EXCUSED = {  # (file, call): why it is safe there
    ("pardemo/launch/wire.py", "pickle.loads"): "from the kernel's own ranks, over a socket pair",
    ("pardemo/launch/pickling.py", "pickle.Unpickler"): "from its own ranks, over a socket pair",
    ("pardemo/launch/cell.py", "exec"): "the cell that the learner has just typed",
    ("pardemo/launch/cell.py", "eval"): "its last line",
    ("pardemo/cluster/integrity.py", "pickle.Unpickler"): "allows the classes of a checkpoint only",
    (
        "pardemo/cluster/checkpoint.py",
        "checkpoint.load",
    ): "with that reader, after the files were verified",
}
MAGICS = re.compile(r"^\s*(!|%%(bash|sh|script|system|perl|ruby)\b|%(sx|system|pip|conda)\b)", re.M)


def dotted(node: ast.expr) -> str:
    """`a.b.c` of an expression, or the end of it that can be named."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}".lstrip(".")
    return node.id if isinstance(node, ast.Name) else ""


def faults(source: str, file: str) -> list[str]:
    """What this source may not do: "line N: call (why)"."""
    tree = ast.parse(source)
    names = _aliases(tree)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            found += [(node.lineno, name) for name in map(dotted, node.bases) if name in CALLS]
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        head, _, rest = name.partition(".")
        name = ".".join(filter(None, [names.get(head, head), rest]))
        said = {keyword.arg: keyword.value for keyword in node.keywords}
        found += [(node.lineno, end) for end in CALLS if f".{name}".endswith(f".{end}")]
        if not _is(said.get("shell", ast.Constant(False)), False):
            found.append((node.lineno, "shell=True"))
        if name.endswith("torch.load") and not _is(said.get("weights_only"), True):
            found.append((node.lineno, "torch.load without weights_only=True"))
        if not _is(said.get("allow_pickle", ast.Constant(False)), False):
            found.append((node.lineno, "allow_pickle"))
    return [
        f"{file}: line {line}: {name} ({CALLS.get(name, 'forbidden')})"
        for line, name in found
        if (file, name) not in EXCUSED
    ]


def _aliases(tree: ast.AST) -> dict[str, str]:
    """What imported names stand for: `from pickle import loads as x` -> x: pickle.loads."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.asname: a.name for a in node.names if a.asname}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    found.pop("eval", None)
    return found


def _is(node: ast.expr | None, wanted: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is wanted


def notebook_faults(text: str, file: str) -> list[str]:
    """The same for the code cells of a notebook; shell escapes of IPython too."""
    found = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code":
            continue
        found += [f"{file}: {match[0].strip()} (a shell)" for match in MAGICS.finditer(source)]
        if not MAGICS.search(source):
            found += faults(re.sub(r"^%.*$", "", source, flags=re.M), file)
    return found


def sources() -> Iterator[Path]:
    """Every Python file of the package."""
    yield from sorted((ROOT / "pardemo").rglob("*.py"))


def books() -> Iterator[Path]:
    """Every lesson and benchmark."""
    for folder in ("notebooks", "benchmarks"):
        yield from sorted((ROOT / folder).glob("*.ipynb"))

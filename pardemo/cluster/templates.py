"""Scripts and manifests for the engines people have: Slurm, plain torchrun, Kubernetes in 3 ways.

Every value is checked against an allow-list before it is written, what reaches a shell is quoted,
and manifests are dumped from data, never pasted together. They start torchrun, which starts the
program on every node; Slurm's requeue and Kubernetes' restarts bring a lost job back, and the
program goes on from its newest checkpoint.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pardemo.cluster import manifests
from pardemo.parameters import Refused, nearest

RULES = {
    "name": (r"[a-z]([-a-z0-9]{0,40}[a-z0-9])?", "small letters, digits and dashes: my-run-7"),
    "folder": (r"/(?!.*\.\.)[\w./+=@-]*", "an absolute path of letters, digits and . / _ + = @ -"),
    "time": (
        r"(?=.*[1-9])(\d{1,3}-)?\d{1,2}:[0-5]\d:[0-5]\d",
        "hours:minutes:seconds, or days-hours:..., and more than 0, which Slurm takes for no limit",
    ),
    "partition": (r"[A-Za-z0-9][\w.-]*", "a partition's name"),
    "account": (r"[A-Za-z0-9][\w.-]*", "an account's name"),
    "interface": (r"[A-Za-z0-9][\w.-]{0,14}", "an interface's name: eth0, ib0"),
    "master": (r"[A-Za-z0-9]([A-Za-z0-9.:-]*[A-Za-z0-9])?", "a host name or address"),
    "python": (r"[\w./+=@][\w./+=@-]*", "the path of a Python interpreter"),
    "image": (
        r"[a-z0-9][a-z0-9._/-]*(:[0-9]+/[a-z0-9._/-]+)?(:\w[\w.-]*)?(@sha256:[0-9a-f]{64})?",
        "a container image: registry/name:tag",
    ),
}

LIMITS = {
    "nodes": (1, 10_000), "gpus_per_node": (0, 64), "port": (1024, 65535), "cpus_per_rank": (1, 512)
}  # fmt: skip

EXPOSED = """\
# While it runs, torch listens on every interface of its nodes and asks nobody who he is: run it
# where only those reach the nodes whom you trust (a closed network, a firewall, a NetworkPolicy).
"""


@dataclass(frozen=True)
class Plan:
    """What a template is filled with; Refused, naming the field, for a value that does not fit.

    `folder` is on a file system all nodes share. `program` is what torchrun runs: arguments.
    """

    nodes: int = 2
    gpus_per_node: int = 8
    name: str = "pardemo"
    folder: str = "/shared/pardemo"
    time: str = "01:00:00"
    partition: str | None = None
    account: str | None = None
    interface: str | None = None
    master: str | None = None
    port: int = 29500
    python: str = "python"
    image: str = "example.org/pardemo:latest"
    cpus_per_rank: int = 4
    program: Sequence[str] = field(default=())

    def __post_init__(self) -> None:
        for name, (low, high) in LIMITS.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise Refused(f"{name} must be {low} to {high:,}, not {value!r}")
        for name, (pattern, meaning) in RULES.items():
            value = getattr(self, name)
            if value is not None and not (
                isinstance(value, str) and re.fullmatch(pattern, value, re.ASCII)
            ):
                raise Refused(f"{name} must be {meaning}; not {value!r}")
        for part in self.program:
            if not isinstance(part, str) or any(ord(char) < 32 for char in part):
                raise Refused(f"an argument of the program is one line of text, not {part!r}")

    @property
    def ranks_per_node(self) -> int:
        """One rank per GPU; one per node where there are none."""
        return max(1, self.gpus_per_node)

    @property
    def words(self) -> list[str]:
        """The program, or this project's own."""
        return list(self.program) or ["-m", "pardemo", "run", "--folder", self.folder]


def template(kind: str, plan: Plan) -> str:
    """The script or manifest of `kind`, one of KINDS, ready to use."""
    if kind not in KINDS:
        raise Refused(f"no template {kind!r}; {nearest(kind, KINDS)}")
    first, rest = KINDS[kind](plan).split("\n", 1)
    return f"{first}\n{EXPOSED}{rest}"


def _exports(plan: Plan) -> list[str]:
    said = ["export OMP_NUM_THREADS=" + str(plan.cpus_per_rank)]
    if plan.interface:
        said += [
            "# the interface that leads to the other nodes (see: pardemo doctor)",
            f"export GLOO_SOCKET_IFNAME={shlex.quote(plan.interface)}",
            f"export NCCL_SOCKET_IFNAME={shlex.quote(plan.interface)}",
        ]
    return said


# Bash: torchrun says nothing while it waits for the others. This says it once, beside it.
WAITING = """\
waiting() {   # of the process $1: it starts ranks as soon as all nodes have come
  for _ in $(seq "${SAY_S:-20}"); do
    sleep 1
    [[ -e /proc/$1 && -z "$(cat /proc/$1/task/*/children 2>/dev/null)" ]] || return 0
  done
  echo "$(hostname): no rank runs here after ${SAY_S:-20} s: torchrun waits for other nodes:" \\
    "see what they print; pardemo doctor --nodes says which cannot be reached" >&2
}"""


def _notice_s(limit: str) -> int:
    """Seconds before the time limit at which a job is told: two minutes, a quarter of a short one.

    Slurm tells up to a minute earlier than asked; a job of a minute or two has no time for it.
    """
    days, _, clock = limit.rpartition("-")
    hours, minutes, seconds = map(int, clock.split(":"))
    whole_s = ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
    return max(1, min(120, whole_s // 4))


def _slurm(plan: Plan) -> str:
    head = [
        "#!/bin/bash",
        f"# {plan.nodes} nodes x {plan.ranks_per_node} ranks. Submit with: sbatch THIS_FILE",
        f"#SBATCH --job-name={plan.name}", f"#SBATCH --nodes={plan.nodes}",
        "#SBATCH --ntasks-per-node=1          # one torchrun per node; it starts the ranks",
        f"#SBATCH --cpus-per-task={plan.cpus_per_rank * plan.ranks_per_node}",
        f"#SBATCH --time={plan.time}",
        f"#SBATCH --output={plan.folder}/slurm-%j.out", "#SBATCH --open-mode=append",
        "#SBATCH --requeue                    # a lost node brings the job back; it resumes",
        f"#SBATCH --signal=B:USR1@{_notice_s(plan.time):<13}# s before the limit: save, go again",
        "# A job that stays pending: squeue -j JOB -o %r says why; pardemo doctor names the nodes",
        "# that are drained or down, and how to get them back.",
    ]  # fmt: skip
    if plan.gpus_per_node:
        head.append(f"#SBATCH --gpus-per-node={plan.gpus_per_node}")
    head += [f"#SBATCH --partition={plan.partition}"] if plan.partition else []
    head += [f"#SBATCH --account={plan.account}"] if plan.account else []
    return "\n".join([*head, "", *_slurm_body(plan), ""])


# Bash: what happens when Slurm's USR1 comes, on its way and after the step has ended.
NEAR_THE_END = """\
# Near the time limit Slurm sends USR1: have the ranks save, and start the job again
told='' step=''
near_the_end() {
  told=1
  for _ in $(seq 12); do
    kill -0 "$step" 2>/dev/null || return 0
    scancel --signal=USR1 "$SLURM_JOB_ID" || true   # to the ranks; pardemo run saves
    sleep 5
  done
}
trap near_the_end USR1"""
FRESH_NUMBERS = """\
# Slurm repeats for a minute the signal that ended a step of a node that was silent. A requeued job
# numbers its steps from 0 again: let the last life's two numbers pass, lest it ends the new step
for _ in $(seq $((${SLURM_RESTART_COUNT:-0} % 2 * 2))); do
  srun --nodes=1 --ntasks=1 true || true
done"""
AGAIN = """\
# Where its first node is lost, nobody is left to say so: the job says it when it begins again
[[ "${SLURM_RESTART_COUNT:-0}" == 0 ]] || echo "Slurm has started this job again, on" \\
  "$SLURM_JOB_NODELIST: the program goes on from what it has saved" >&2"""
AFTERWARDS = """\
step=$! code=0
wait "$step" || code=$?
if [[ "$told" && "$code" -gt 128 ]]; then   # USR1 has ended the wait, not the step
  code=0; wait "$step" || code=$?
fi
[[ "$code" != 0 ]] || exit 0
if [[ "$told" && "${SLURM_RESTART_COUNT:-0}" -lt 20 ]]; then   # not for ever
  scontrol requeue "$SLURM_JOB_ID" && sleep 60
  exit 85
fi"""

LOST = """\
# When a node is lost, the others fail before Slurm has noticed. So ask every node; where one is
# silent wait for Slurm: it ends the job and, with --requeue, starts it again
trap '' USR1
silent="a node is silent. If it is lost, Slurm puts this job back into the queue. What it waits"
silent+=" for then: squeue -j $SLURM_JOB_ID -o '%T %r'; which node is down: pardemo doctor"\
"""


def _slurm_body(plan: Plan) -> list[str]:
    first = ['hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")']
    master = '"$(head -n 1 <<<"$hosts")"'
    if plan.master:
        first, master = [], shlex.quote(plan.master)
    return [
        "set -euo pipefail",
        NEAR_THE_END,
        *first,
        f"master={master}                      # rank 0's node; all nodes must reach it",
        "port=$((20000 + SLURM_JOB_ID % 10000))   # two jobs on one node must not meet",
        'taken() { timeout 2 bash -c \': <>"/dev/tcp/$0/$1"\' "$@" 2>/dev/null; }',
        'for _ in {1..50}; do taken "$master" "$port" || break; port=$((port + 1)); done',
        *_exports(plan),
        FRESH_NUMBERS,
        AGAIN,
        WAITING,
        "# each task learns its node's number from Slurm; the rest is the same on all nodes",
        'start="$(declare -f waiting); (waiting \\$\\$ &); "',
        "start+='trap \"\" USR1; '   # for the ranks, which may catch it; not the end of torchrun",
        'start+=\'exec "$0" -m torch.distributed.run --node-rank="$SLURM_NODEID" "$@"\'',
        f'srun --kill-on-bad-exit=1 bash -c "$start" {shlex.quote(plan.python)} \\',
        f"  --nnodes={plan.nodes} --nproc-per-node={plan.ranks_per_node} \\",
        '  --master-addr="$master" --master-port="$port" --rdzv-conf=timeout=300 \\',
        f'  --log-dir={shlex.quote(plan.folder)}/logs-"$SLURM_JOB_ID" \\',
        f"  {shlex.join(plan.words)} &",
        AFTERWARDS,
        LOST,
        f"timeout 60 srun --nodes={plan.nodes} --ntasks-per-node=1 true & asked=$!",
        'for _ in $(seq 10); do kill -0 "$asked" 2>/dev/null && sleep 1 || break; done',
        '! kill -0 "$asked" 2>/dev/null || echo "$silent" >&2',
        'wait "$asked" || sleep 900',
        'exit "$code"                         # a failure is never recorded as COMPLETED',
    ]


def _knocking(host: str, port: int) -> list[str]:
    """Bash: wait until node 0 answers; say so when it does not, and give up at the limit."""
    return [
        "limit=${JOIN_S:-300}                 # seconds to wait for the other nodes",
        'knock() { timeout 2 bash -c \': <>"/dev/tcp/$0/$1"\' "$@" 2>/dev/null; }',
        f'until [[ "$node" == 0 ]] || knock {host} {port}; do',
        f'  silent="nobody answers at {host}:{port}: start this script with 0 there,"',
        '  silent+=" or give another --master and --port; pardemo doctor --nodes says which"',
        '  (( SECONDS < limit )) || { echo "$silent (gave up after $SECONDS s)" >&2; exit 1; }',
        '  (( SECONDS < 10 )) || [[ "${said:-}" ]] || '
        '{ said=1; echo "$silent (waiting for $limit s, see JOIN_S)" >&2; }',
        "  sleep 1",
        "done",
    ]


def _torchrun(plan: Plan) -> str:
    last = plan.nodes - 1
    master = plan.master or "node0"
    return "\n".join(
        [
            "#!/bin/bash",
            f"# {plan.nodes} nodes x {plan.ranks_per_node} ranks, without a scheduler.",
            f"# Start it on every node with the node's number: bash THIS_FILE 0 ... {last}",
            f"# Number 0 must run on {master}, and all nodes must reach its port {plan.port}.",
            "set -euo pipefail",
            f"node=${{1:?give the number of this node, 0 to {last}}}",
            f'[[ "$node" =~ ^[0-9]+$ && "$node" -le {last} ]] || '
            f'{{ echo "a node is 0 to {last}, not $node" >&2; exit 2; }}',
            *_exports(plan),
            *_knocking(shlex.quote(master), plan.port),
            WAITING,
            "(waiting $$ &)",
            "# gloo ranks that are restarted need a store of their own per attempt (torch 2.13)",
            "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
            f"exec {shlex.quote(plan.python)} -m torch.distributed.run \\",
            f"  --nnodes={plan.nodes} --nproc-per-node={plan.ranks_per_node} \\",
            '  --node-rank="$node" --rdzv-conf=timeout="$limit" \\',
            f"  --master-addr={shlex.quote(master)} --master-port={plan.port} \\",
            f"  --log-dir={shlex.quote(plan.folder)}/logs \\",
            f"  {shlex.join(plan.words)}",
            "",
        ]
    )


KINDS: dict[str, Callable[[Plan], str]] = {
    "slurm": _slurm, "torchrun": _torchrun, "kubernetes": manifests.kubernetes,
    "jobset": manifests.jobset, "kubeflow": manifests.kubeflow,
}  # fmt: skip

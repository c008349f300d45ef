"""Command-line verbs of this room: nodes up, down, status, link and run."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any


def add_parsers(verbs: Any) -> None:
    """Add this room's verbs to the subparsers of `pardemo`."""
    _nodes(verbs)
    _run_verb(verbs)
    _cluster(verbs)
    _doctor(verbs)


def _nodes(verbs: Any) -> None:
    nodes = verbs.add_parser("nodes", help="real network nodes on this machine, with a slow link")
    actions = nodes.add_subparsers(dest="action", required=True, metavar="ACTION")
    up = actions.add_parser("up", help="make the nodes; they stand until `nodes down`")
    up.add_argument("--count", type=int, default=2, help="how many nodes (1 to 32)")
    up.add_argument("--rate", default="unlimited", help='"100mbit", "1gbit", "unlimited"')
    up.add_argument("--latency-ms", type=float, help="delay one way, where the kernel has netem")
    up.set_defaults(run=_up)
    down = actions.add_parser("down", help="end the nodes and everything that runs in them")
    down.set_defaults(run=_down)
    status = actions.add_parser("status", help="say which nodes stand, and what their links sent")
    status.set_defaults(run=_status)
    link = actions.add_parser("link", help="change the link while the nodes stand")
    link.add_argument("--rate", default="unlimited", help='"100mbit", "1gbit", "unlimited"')
    link.add_argument("--latency-ms", type=float, help="delay one way, where the kernel has netem")
    link.set_defaults(run=_link)
    run = actions.add_parser("run", help="run a command inside a node: nodes run 0 -- ip addr")
    run.add_argument("node", type=int)
    run.add_argument("command", nargs=argparse.REMAINDER)
    run.set_defaults(run=_run)


def _up(arguments: argparse.Namespace) -> int:
    from pardemo.cluster import holding
    from pardemo.cluster.nodes import Nodes

    if holding.load() is not None:
        return _stands_already()
    nodes = Nodes(arguments.count, arguments.rate, arguments.latency_ms, stay=True)
    try:
        holding.save(nodes.held, new=True)
    except OSError as error:  # another command may have been quicker
        nodes.close()
        if isinstance(error, FileExistsError):
            return _stands_already()
        raise
    nodes.held.stand()
    print(nodes)
    for note in nodes.notes:
        print(f"note: {note}")
    print(
        "enter one:  pardemo nodes run 0 -- bash\n"
        f"end them:   pardemo nodes down    (or: kill {nodes.held.hub_pid}; nothing stays behind)"
    )
    return 0


def _stands_already() -> int:
    from pardemo.cluster import holding

    standing = holding.load()
    said = "" if standing is None else f" (process {standing.hub_pid})"
    print(f"nodes stand already{said}: `pardemo nodes down` ends them", file=sys.stderr)
    return 2


def _down(_: argparse.Namespace) -> int:
    from pardemo.cluster import holding

    held = holding.load()
    if held is not None:
        held.end()
    holding.forget()  # also what an `up` has left that was killed
    print("no nodes stand" if held is None else f"{len(held.holder_pids)} nodes ended")
    return 0


def _status(_: argparse.Namespace) -> int:
    from pardemo.cluster.nodes import Nodes

    nodes = Nodes.standing()
    print(nodes)
    counters = zip(nodes.names, nodes.tx_bytes(), nodes.rx_bytes(), strict=True)
    for name, sent, received in counters:
        print(f"{name}: sent {sent / 1e6:.3f} MB, received {received / 1e6:.3f} MB")
    return 0


def _link(arguments: argparse.Namespace) -> int:
    from pardemo.cluster import holding
    from pardemo.cluster.nodes import Nodes

    nodes = Nodes.standing()
    nodes.set_link(arguments.rate, arguments.latency_ms)
    nodes.held.spec["link"] = (nodes.shape.rate_bits, nodes.shape.latency_ms)
    holding.save(nodes.held)
    print(nodes)
    return 0


def _run(arguments: argparse.Namespace) -> int:
    from pardemo.cluster.nodes import Nodes
    from pardemo.parameters import Refused

    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command:
        raise Refused("say what to run: pardemo nodes run 0 -- ip addr")
    nodes = Nodes.standing()
    argv = nodes.command(arguments.node, command)
    os.execve(argv[0], argv, {**os.environ, **nodes.environment()})


def _run_verb(verbs: Any) -> None:
    run = verbs.add_parser(
        "run", help="train one workload in the world of torchrun or Slurm, with checkpoints"
    )
    run.add_argument("--folder", required=True, help="checkpoints and the record go here")
    run.add_argument("--strategy", default="ddp")
    run.add_argument("--workload", default="mlp")
    run.add_argument("--steps", type=int, default=20)
    run.add_argument("--batch-size", type=int, default=64, help="samples per step, all ranks")
    run.add_argument("--save-every", type=int, default=5, help="steps between checkpoints")
    run.add_argument(
        "--timeout-s", type=float, default=60.0, help="limit of a collective, also in a save"
    )
    run.add_argument("--join-s", type=float, default=60.0, help="limit until all ranks have met")
    run.add_argument("--pause-s", type=float, default=0.0, help="wait after every step")
    run.set_defaults(run=_train)


def _train(arguments: argparse.Namespace) -> int:
    from pardemo.cluster.train import UNFINISHED, Job, run

    names = Job.__dataclass_fields__
    job = Job(**{name: value for name, value in vars(arguments).items() if name in names})
    return 0 if run(job) else UNFINISHED


def _cluster(verbs: Any) -> None:
    cluster = verbs.add_parser("cluster", help="scripts and manifests for clusters")
    actions = cluster.add_subparsers(dest="action", required=True, metavar="ACTION")
    made = actions.add_parser(
        "template", help="print one: cluster template slurm --nodes 4 --program train.py --lr 0.1"
    )
    made.add_argument("kind", help="slurm, torchrun, kubernetes, jobset or kubeflow")
    made.add_argument("--nodes", type=int, default=2)
    made.add_argument("--gpus-per-node", type=int, default=8, help="0: one rank of CPU per node")
    made.add_argument("--cpus-per-rank", type=int, default=4)
    made.add_argument("--port", type=int, default=29500)
    for name, text in (
        ("name", "of the job"), ("folder", "shared by all nodes"), ("time", "limit, 01:00:00"),
        ("partition", "Slurm's"), ("account", "Slurm's"), ("image", "container image"),
        ("interface", "between the nodes, as eth0"), ("master", "address of node 0"),
        ("python", "interpreter on the nodes"),
    ):  # fmt: skip
        made.add_argument(f"--{name}", help=text)
    made.add_argument(
        "--program", nargs=argparse.REMAINDER, default=[],
        help="what torchrun runs: all that follows; by default this project's own `run`",
    )  # fmt: skip
    made.set_defaults(run=_template)


def _template(arguments: argparse.Namespace) -> int:
    from pardemo.cluster.templates import Plan, template

    given = {
        name: value
        for name, value in vars(arguments).items()
        if name in Plan.__dataclass_fields__ and value is not None
    }
    given["program"] = tuple(given["program"])
    print(template(arguments.kind, Plan(**given)), end="")
    return 0


def _doctor(verbs: Any) -> None:
    doctor = verbs.add_parser("doctor", help="can these nodes train together? findings, remedies")
    doctor.add_argument(
        "--nodes", nargs="+", default=[], metavar="HOST:PORT",
        help="all nodes; run the same command on each of them. Meanwhile torch listens on every "
        "interface, for whoever reaches it: a closed network only",
    )  # fmt: skip
    doctor.add_argument("--this", type=int, help="which of them this one is; else by its addresses")
    doctor.add_argument("--timeout-s", type=float, default=30.0, help="wait for the others")
    doctor.add_argument("--no-pairs", action="store_true", help="without the 2-rank all-reduces")
    doctor.set_defaults(run=_examine)


def _examine(arguments: argparse.Namespace) -> int:
    from pardemo.cluster import doctor, reach
    from pardemo.parameters import Refused

    nodes = [reach.parse(text) for text in arguments.nodes]
    if not 0 < arguments.timeout_s <= 86_400:
        raise Refused(f"--timeout-s must be 0 to 86,400 seconds, not {arguments.timeout_s:g}")
    if arguments.this is not None and not 0 <= arguments.this < len(nodes):
        raise Refused(f"--this is 0 to {len(nodes) - 1}, not {arguments.this}")
    if nodes:
        found = reach.examine(nodes, arguments.this, arguments.timeout_s, not arguments.no_pairs)
    else:
        found = iter(doctor.here())
    levels = []
    for finding in found:
        print(finding, flush=True)
        levels.append(finding.level)
    failed, warned = levels.count(doctor.FAIL), levels.count(doctor.WARN)
    what = "these nodes" if nodes else "this machine"
    verdict = f"{what} cannot train together as it is" if failed else f"{what} can train"
    print(f"{verdict}: {failed} failures, {warned} warnings, {levels.count(doctor.OK)} ok")
    return 1 if failed else 0

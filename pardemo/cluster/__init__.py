"""Past one machine: the node lab, torchrun, Slurm, checkpoints, and a doctor for all of them."""

from pardemo.cluster.holding import NodesError
from pardemo.cluster.link import Link, link
from pardemo.cluster.nodes import Nodes, reasons_against

__all__ = ["Link", "Nodes", "NodesError", "link", "reasons_against"]

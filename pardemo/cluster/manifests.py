"""Manifests for Kubernetes: a plain indexed Job, a JobSet, and a TrainJob of Kubeflow Trainer.

Each is data until it is printed, so that no value can change its structure. They are checked
against their published schemas by the tests, and have not been run on a cluster.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from pardemo.cluster.templates import Plan


def kubernetes(plan: Plan) -> str:
    """A headless Service, so that pods find each other by name, and an Indexed Job."""
    service = {
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": plan.name},
        "spec": {"clusterIP": "None", "selector": {"app": plan.name},
                 "publishNotReadyAddresses": True,
                 "ports": [{"name": "rendezvous", "port": plan.port}]},
    }  # fmt: skip
    pod = {"subdomain": plan.name, **_pod(plan, f"{plan.name}-0.{plan.name}")}
    job = {
        "apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": plan.name},
        "spec": _job(plan, pod, 3 * plan.nodes),
    }  # fmt: skip
    return _said(plan) + yaml.safe_dump_all([service, job], sort_keys=False)


def jobset(plan: Plan) -> str:
    """A JobSet of one indexed Job: when a pod fails, all of them start again together."""
    first = f"{plan.name}-node-0-0.{plan.name}"  # JobSet's name for pod 0, in its own subdomain
    manifest = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet",
        "metadata": {"name": plan.name},
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {"maxRestarts": 3},
            "replicatedJobs": [
                {"name": "node", "replicas": 1,
                 "template": {"spec": _job(plan, _pod(plan, first), 0)}}
            ],
        },
    }  # fmt: skip
    needs = "# The cluster needs the JobSet controller.\n"
    return _said(plan) + needs + yaml.safe_dump(manifest, sort_keys=False)


def _said(plan: Plan) -> str:
    return (
        f"# {plan.nodes} pods x {plan.ranks_per_node} ranks: kubectl apply -f THIS_FILE\n"
        "# Validated against the published schema, not run. The claim named below must exist and\n"
        "# be shared (ReadWriteMany). /dev/shm is in memory: the default of 64 MB is too small.\n"
    )


def _job(plan: Plan, pod: dict[str, Any], restarts: int) -> dict[str, Any]:
    """One pod per node; `restarts` pods may fail before the Job does."""
    return {
        "completions": plan.nodes, "parallelism": plan.nodes, "completionMode": "Indexed",
        "backoffLimit": restarts,
        "template": {"metadata": {"labels": {"app": plan.name}}, "spec": pod},
    }  # fmt: skip


def _pod(plan: Plan, master: str) -> dict[str, Any]:
    """One node: torchrun, told its number by the Job's index."""
    command = [
        plan.python, "-m", "torch.distributed.run", f"--nnodes={plan.nodes}",
        f"--nproc-per-node={plan.ranks_per_node}", "--node-rank=$(JOB_COMPLETION_INDEX)",
        f"--master-addr={master}", f"--master-port={plan.port}", *_literal(plan.words),
    ]  # fmt: skip
    container = {
        "name": "trainer", "image": plan.image, "command": command, "env": _environment(plan),
        "ports": [{"containerPort": plan.port, "protocol": "TCP"}],
        "resources": _resources(plan),
        "volumeMounts": [
            {"name": "shm", "mountPath": "/dev/shm"}, {"name": "shared", "mountPath": plan.folder}
        ],
    }  # fmt: skip
    return {
        "restartPolicy": "Never", "containers": [container],
        "volumes": [
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
            {"name": "shared", "persistentVolumeClaim": {"claimName": plan.name}},
        ],
    }  # fmt: skip


def _literal(words: list[str]) -> list[str]:
    """Kubernetes replaces $(NAME) in a command; $$(NAME) is the text itself."""
    return [word.replace("$(", "$$(") for word in words]


def kubeflow(plan: Plan) -> str:
    """A TrainJob of Kubeflow Trainer v2 with its torch-distributed runtime."""
    manifest = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1", "kind": "TrainJob",
        "metadata": {"name": plan.name},
        "spec": {
            "runtimeRef": {"name": "torch-distributed"},
            "trainer": {
                "image": plan.image, "numNodes": plan.nodes, "numProcPerNode": plan.ranks_per_node,
                "command": ["torchrun", *_literal(plan.words)], "env": _environment(plan),
                "resourcesPerNode": _resources(plan),
            },
        },
    }  # fmt: skip
    said = (
        "# For a cluster with Kubeflow Trainer v2: kubectl apply -f THIS_FILE. Not run here.\n"
        "# The runtime torch-distributed tells torchrun the nodes and where they meet.\n"
    )
    return said + yaml.safe_dump(manifest, sort_keys=False)


def _environment(plan: Plan) -> list[dict[str, str]]:
    pairs = {"OMP_NUM_THREADS": str(plan.cpus_per_rank)}
    if plan.interface:
        pairs |= {"GLOO_SOCKET_IFNAME": plan.interface, "NCCL_SOCKET_IFNAME": plan.interface}
    return [{"name": name, "value": value} for name, value in pairs.items()]


def _resources(plan: Plan) -> dict[str, Any]:
    limits = {"cpu": str(plan.cpus_per_rank * plan.ranks_per_node)}
    if plan.gpus_per_node:
        limits["nvidia.com/gpu"] = str(plan.gpus_per_node)
    return {"limits": limits}

"""Templates are ready to use, hold nothing that was not checked, and quote what reaches a shell."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api import models as trainer_models

from pardemo.cluster.templates import FRESH_NUMBERS, KINDS, Plan, template
from pardemo.parameters import Refused

ROOT = Path(__file__).parents[2]
FIELDS = ["name", "folder", "time", "partition", "interface", "master", "image"]
BAD = ["x; touch PWN", "$(touch PWN)", "`id`", "a\nb", "-rf", "../../etc", "a b", "x'y", 'x"y', ""]


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("bad", BAD)
def test_a_value_that_is_not_on_the_list_is_refused(name: str, bad: str) -> None:
    with pytest.raises(Refused, match=name):
        Plan(**{name: bad})  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [bad for bad in BAD if "/" not in bad])
def test_an_interpreter_is_a_path(bad: str) -> None:
    with pytest.raises(Refused, match="python"):
        Plan(python=bad)


@pytest.mark.parametrize(
    ("name", "bad"), [("nodes", 0), ("gpus_per_node", -1), ("port", 80), ("nodes", "2")]
)
def test_a_number_out_of_range_is_refused(name: str, bad: object) -> None:
    with pytest.raises(Refused, match=name):
        Plan(**{name: bad})  # type: ignore[arg-type]


def test_an_unknown_kind_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(Refused, match="did you mean 'slurm'"):
        template("slrum", Plan())


@pytest.mark.parametrize("kind", KINDS)
def test_what_it_opens_to_the_network_is_said_at_its_head(kind: str) -> None:
    """Broken on purpose: what the templates themselves make says nothing of it."""
    said = "torch listens on every interface of its nodes"
    assert said not in KINDS[kind](Plan())
    assert said in " ".join(template(kind, Plan()).splitlines()[:3])


@pytest.mark.parametrize("kind", ["slurm", "torchrun"])
def test_scripts_are_valid_bash_and_arguments_arrive_as_they_were(
    kind: str, tmp_path: Path
) -> None:
    odd = ["train.py", "--note", "it's $HOME; `id`", "--lr", "0.1"]
    text = template(kind, Plan(nodes=2, gpus_per_node=0, program=odd, folder=str(tmp_path)))
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    answers = {"torchrun": "true", "slurm": "false"}[kind]  # node 0 is there; the port is free
    for name, body in (
        ("scontrol", "echo first; echo second"), ("srun", 'shift; exec "$@"'), ("timeout", answers),
    ):  # fmt: skip
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
    for name in ("python", "scontrol", "srun", "timeout"):
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["bash", "-s", "1"], input=text, text=True, capture_output=True, cwd=tmp_path,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "n[1-2]",
             "SLURM_JOB_ID": "10042", "SLURM_NODEID": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-5:] == odd
    assert "--node-rank=1" in lines
    assert ("--master-addr=first" in lines) == (kind == "slurm")
    assert ("--master-port=20042" in lines) == (kind == "slurm")


def test_the_script_of_torchrun_wants_the_number_of_its_node(tmp_path: Path) -> None:
    text = template("torchrun", Plan(nodes=2, folder=str(tmp_path)))
    for given in ([], ["2"], ["x; id"]):
        done = subprocess.run(["bash", "-s", *given], input=text, text=True, capture_output=True)
        assert done.returncode != 0
        assert "node" in done.stderr


def test_gpus_are_asked_for_only_where_there_are_any() -> None:
    assert "--gpus-per-node=8" in template("slurm", Plan())
    assert "gpu" not in template("slurm", Plan(gpus_per_node=0)).replace("gpus_per_node", "")
    assert "nvidia.com/gpu: '4'" in template("kubernetes", Plan(gpus_per_node=4))
    assert "nvidia" not in template("kubernetes", Plan(gpus_per_node=0))


def test_manifests_say_what_was_asked_for() -> None:
    service, job = yaml.safe_load_all(template("kubernetes", Plan(nodes=3, name="seven")))
    assert (service["kind"], service["spec"]["clusterIP"]) == ("Service", "None")
    assert (job["spec"]["completions"], job["spec"]["parallelism"]) == (3, 3)
    pod = job["spec"]["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"] == "seven"
    assert "--master-addr=seven-0.seven" in pod["containers"][0]["command"]
    (train,) = yaml.safe_load_all(template("kubeflow", Plan(nodes=3, gpus_per_node=4)))
    assert (train["spec"]["trainer"]["numNodes"], train["spec"]["trainer"]["numProcPerNode"]) == (
        3,
        4,
    )


def problems(manifest: dict[str, Any]) -> list[str]:
    """What the published schema of this kind of manifest has against it."""
    if manifest["kind"] in ("Service", "Job"):
        try:
            kubernetes_validate.validate(manifest, "1.37", strict=True)
        except kubernetes_validate.ValidationError as error:
            return [str(error)]
        return []
    name = {"JobSet": "JobsetV1alpha2JobSet", "TrainJob": "TrainerV1alpha1TrainJob"}
    try:
        known = getattr(trainer_models, name[manifest["kind"]]).from_dict(manifest)
    except ValueError as error:
        return [str(error)]
    return [] if known.to_dict() == manifest else ["it has fields that the schema does not know"]


@pytest.mark.parametrize("kind", ["kubernetes", "jobset", "kubeflow"])
@pytest.mark.parametrize("gpus", [0, 8])
def test_manifests_fit_the_published_schema_and_wrong_ones_do_not(kind: str, gpus: int) -> None:
    plan = Plan(nodes=3, gpus_per_node=gpus, interface="eth0", program=("x.py", "--a"))
    for manifest in yaml.safe_load_all(template(kind, plan)):
        assert problems(manifest) == []
        assert problems({**manifest, "spec": {**manifest["spec"], "paralelism": 2}})
        key = "ports" if manifest["kind"] == "Service" else next(iter(manifest["spec"]))
        assert problems({**manifest, "spec": {**manifest["spec"], key: 3.5}})


def test_pods_of_a_jobset_meet_at_the_first_and_restart_together() -> None:
    (manifest,) = yaml.safe_load_all(template("jobset", Plan(nodes=3, name="seven")))
    (job,) = manifest["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert (spec["completions"], spec["backoffLimit"]) == (3, 0)
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] > 0
    command = spec["template"]["spec"]["containers"][0]["command"]
    assert "--master-addr=seven-node-0-0.seven" in command
    assert "--node-rank=$(JOB_COMPLETION_INDEX)" in command


@pytest.mark.parametrize("kind", ["kubernetes", "jobset", "kubeflow"])
def test_kubernetes_replaces_nothing_in_the_program(kind: str) -> None:
    text = template(kind, Plan(program=("x.py", "$(JOB_COMPLETION_INDEX)")))
    assert "- $$(JOB_COMPLETION_INDEX)" in text


def test_the_command_prints_the_template() -> None:
    argv = [sys.executable, "-m", "pardemo.cluster", "cluster", "template", "slurm", "--nodes", "3"]
    argv += ["--program", "x.py", "--a"]
    done = subprocess.run(argv, text=True, capture_output=True, cwd=ROOT)
    assert done.stdout == template("slurm", Plan(nodes=3, program=("x.py", "--a")))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_starts_the_program_that_was_given(kind: str) -> None:
    assert "train.py" in template(kind, Plan(program=("train.py",)))
    assert "pardemo" in template(kind, Plan())


@pytest.mark.parametrize(("restarts", "passed"), [("", 0), ("0", 0), ("1", 2), ("2", 0), ("3", 2)])
def test_a_requeued_job_lets_the_step_numbers_of_its_last_life_pass(
    restarts: str, passed: int
) -> None:
    script = "set -euo pipefail\nsrun() { echo step; return 1; }\n" + FRESH_NUMBERS
    given = {"SLURM_RESTART_COUNT": restarts} if restarts else {}
    done = subprocess.run(
        ["bash", "-s"], input=script, env={"PATH": os.environ["PATH"], **given},
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout.count("step"), done.stderr) == (0, passed, "")

"""Kubernetes accepts what deployment/kubernetes holds and what Prefect makes of it; runs in pods end in good order."""

import asyncio
import json
import math
import os
import re
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.states import Cancelling, Pending
from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

from flows import worker
from flows.cli import PREFECT_SETTINGS
from flows.deploy import POOLS
from tests.deployment.conftest import Fleet, Process, wait_for
from tests.flows.processes import descendants, runs_module

FOLDER = Path(__file__).parents[2] / "deployment" / "kubernetes"
VERSION = "1.37"


def template(pool: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((FOLDER / f"{pool}.json").read_text())
    return loaded


def manifests() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / "workers.yaml").read_text()))


def job(pool: str, **values: Any) -> dict[str, Any]:
    """The job that a worker of Prefect's makes of a template for a run of a stage."""

    async def configured() -> KubernetesWorkerJobConfiguration:
        variables = {"command": "python -m flows.engine", **values}
        # It is asked for blocks and variables that a template names, and these name none.
        nobody = PrefectClient("http://127.0.0.1:9/api")
        made: KubernetesWorkerJobConfiguration
        made = await KubernetesWorkerJobConfiguration.from_template_and_values(template(pool), variables, client=nobody)
        return made

    configuration = asyncio.run(configured())
    configuration.prepare_for_flow_run(FlowRun(flow_id=uuid.uuid4(), name="base on a pool"))
    manifest: dict[str, Any] = configuration.job_manifest
    # Prefect insists on these where Kubernetes does not know them, and leaves them out.
    for key in ("parallelism", "completions"):
        del manifest["spec"]["template"]["spec"][key]
    return manifest


@pytest.mark.parametrize(("pool", "device"), [("cuda", "nvidia.com/gpu"), ("tpu", "google.com/tpu")])
def test_jobs_are_what_kubernetes_knows(pool: str, device: str) -> None:
    manifest = job(pool, env={"HF_HUB_OFFLINE": "1"})
    kubernetes_validate.validate(manifest, VERSION, strict=True)
    pod = manifest["spec"]["template"]["spec"]
    container = pod["containers"][0]
    environment = {one["name"]: one["value"] for one in container["env"]}
    assert (environment["CAIRN_WORKER"], environment["HF_HUB_OFFLINE"]) == (pool, "1")
    # What `cairn worker` starts runs with, but for what is for the worker itself and for servers.
    ours = {**PREFECT_SETTINGS, **worker._SETTINGS}
    assert {name: value for name, value in ours.items() if not re.match("PREFECT_(WORKER|SERVER)_", name)}.items() <= (
        environment.items()
    )
    # What cancels a run inside of a pod, and has an evicted one go on elsewhere.
    assert "prefect flow-run execute" in " ".join(container["args"])
    assert environment["PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR"] == "reschedule"
    assert manifest["spec"]["backoffLimit"] == 0
    assert pod["terminationGracePeriodSeconds"] > 30, "what Prefect gives a run"
    assert container["resources"]["limits"][device] == container["resources"]["requests"][device]
    assert container["envFrom"] == [{"secretRef": {"name": "cairn"}}]
    pod["terminationGraceSeconds"] = 5
    with pytest.raises(kubernetes_validate.ValidationError, match="terminationGraceSeconds"):
        kubernetes_validate.validate(manifest, VERSION, strict=True)


def test_a_tpu_job_asks_for_a_slice_of_one_node() -> None:
    properties = template("tpu")["variables"]["properties"]
    chips = {topology: math.prod(map(int, topology.split("x"))) for topology in properties["topology"]["enum"]}
    assert list(chips.values()) == properties["chips"]["enum"]
    assert chips[properties["topology"]["default"]] == properties["chips"]["default"]
    pod = job("tpu", topology="2x4", chips=8)["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "2x4",
    }
    assert pod["containers"][0]["resources"]["limits"]["google.com/tpu"] == 8


def test_workers_in_a_cluster_are_what_kubernetes_knows() -> None:
    names = {manifest["metadata"]["name"] for manifest in manifests()}
    for manifest in manifests():
        kubernetes_validate.validate(manifest, VERSION, strict=True)
        if manifest["kind"] != "Deployment":
            continue
        pod = manifest["spec"]["template"]["spec"]
        arguments = pod["containers"][0]["args"]
        assert manifest["spec"]["selector"]["matchLabels"] == manifest["spec"]["template"]["metadata"]["labels"]
        assert arguments[-1] in POOLS
        if arguments[0] == "cairn":
            assert pod["terminationGracePeriodSeconds"] > worker._GRACE_SECONDS
        else:
            assert (FOLDER / f"{arguments[-1]}.json").is_file()
            assert pod["serviceAccountName"] in names
    spoilt = manifests()[3]
    spoilt["spec"]["replicas"] = "one"
    with pytest.raises(kubernetes_validate.ValidationError, match="one"):
        kubernetes_validate.validate(spoilt, VERSION, strict=True)


def pod(fleet: Fleet) -> Process:
    """What a job's container does for the stage that waits, with the environment that its template has."""
    run = wait_for(lambda: next((one for one in fleet.runs() if one.state and one.state.is_scheduled()), None))
    with fleet.client() as client:
        client.set_flow_run_state(run.id, Pending())
    container = job("cuda")["spec"]["template"]["spec"]["containers"][0]
    environment = {**fleet.environment, **{one["name"]: one["value"] for one in container["env"]}}
    places = {"PREFECT__FLOW_RUN_ID": str(run.id), "PREFECT_API_URL": fleet.server.url}
    # This machine has a processor for sure.
    places |= {"CAIRN_WORKER": "cpu", "CAIRN_CACHE": fleet.environment["CAIRN_CACHE"]}
    places["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with (fleet.folder / "pod.log").open("ab") as log:
        process = subprocess.Popen(
            container["args"],
            cwd=fleet.folder,
            env={**environment, **places},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    fleet.started.append(process)
    return process


def is_training(process: Process) -> int | None:
    return next((pid for pid in descendants(process.pid) if runs_module(pid, "tasks.child")), None)


def test_an_evicted_pod_and_a_cancelled_one_write_checkpoints(fleet: Fleet, undisturbed: str) -> None:
    run = fleet.run()
    evicted = pod(fleet)
    fleet.training()
    evicted.send_signal(signal.SIGTERM)
    assert evicted.wait(60) == 0, fleet.text("pod.log")
    # It waits for another pod, and the pipeline for it.
    assert fleet.states() == ["AwaitingRetry"]
    cancelled = pod(fleet)
    wait_for(lambda: is_training(cancelled), what="a stage's process")
    with fleet.client() as client:
        client.set_flow_run_state(fleet.runs()[0].id, Cancelling())
    assert cancelled.wait(60) == 0, fleet.text("pod.log")
    run.wait(60)
    assert fleet.states() == ["Cancelled"]
    again = fleet.run(log="again.log")
    last = pod(fleet)
    fleet.finish(again, log="again.log")
    assert last.wait(60) == 0, fleet.text("pod.log")
    assert fleet.states() == ["Cancelled", "Completed"]
    assert "going on from the checkpoint" in fleet.stage_log()
    assert fleet.published() == undisturbed

"""The files for containers fit the server: its options, its addresses, and the time that it takes to end."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from llama_te_infer.serve.app import OPEN_PATHS
from llama_te_infer.serve.command import make_parser

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
MANIFESTS: dict[str, Any] = {
    path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "examples" / "kubernetes").glob("*.yaml")
}
POD = MANIFESTS["deployment"]["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
# The images' entry point; what a user gives comes behind it.
ENTRY = ["--host", "0.0.0.0"]


def test_images_run_as_a_user_without_rights() -> None:
    stages = DOCKERFILE.split("\nFROM ")[1:]
    final = [stage for stage in stages if "ENTRYPOINT" in stage]
    assert [stage.split("\n")[0].rpartition(" ")[2] for stage in final] == ["cpu", "gpu"]
    for stage in final:
        assert f"USER {POD['securityContext']['runAsUser']}:" in stage and "HEALTHCHECK" in stage
        assert '"llama-te-serve", ' + ", ".join(f'"{each}"' for each in ENTRY) in stage
        # What the base image has at first, or pip may compile, is not in the stage that people run.
        assert "apt-get" not in stage and "COPY packages" not in stage
    # A plain `docker build` makes the last stage.
    assert stages[-1] is final[-1]
    paths = re.findall(r"http://127\.0\.0\.1:8000(/\w+)", DOCKERFILE)
    assert paths == ["/health"] * 2 and set(paths) < set(OPEN_PATHS)


def test_compose_gives_the_server_time_to_drain() -> None:
    parser = make_parser()
    for service in COMPOSE["services"].values():
        options = parser.parse_args([*ENTRY, *service["command"]])
        assert float(service["stop_grace_period"].removesuffix("s")) > options.drain_timeout + 5
        assert service["read_only"] and service["cap_drop"] == ["ALL"]
        assert (ROOT / "docker" / service["build"]["context"] / service["build"]["dockerfile"]).exists()
    (device,) = COMPOSE["services"]["serve"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia" and device["capabilities"] == ["gpu"]


def test_kubernetes_gives_the_server_time_to_drain() -> None:
    options = make_parser().parse_args([*ENTRY, *CONTAINER["args"]])
    before = float(CONTAINER["lifecycle"]["preStop"]["exec"]["command"][-1])
    assert POD["terminationGracePeriodSeconds"] > before + options.drain_timeout + 5


def test_kubernetes_asks_the_servers_addresses() -> None:
    asked = {name: CONTAINER[name]["httpGet"]["path"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert asked == {"startupProbe": "/ready", "readinessProbe": "/ready", "livenessProbe": "/health"}
    assert set(asked.values()) < set(OPEN_PATHS)
    (port,) = CONTAINER["ports"]
    assert port["containerPort"] == make_parser().parse_args(["model"]).port
    assert MANIFESTS["service"]["spec"]["ports"][0]["targetPort"] == port["name"]
    # Pods answer through the service, and have the folder with models.
    labels = MANIFESTS["deployment"]["spec"]["template"]["metadata"]["labels"]
    assert MANIFESTS["service"]["spec"]["selector"].items() <= labels.items()
    claims = [volume["persistentVolumeClaim"]["claimName"] for volume in POD["volumes"] if "emptyDir" not in volume]
    assert claims == [MANIFESTS["models"]["metadata"]["name"]]
    assert MANIFESTS["autoscaler"]["spec"]["scaleTargetRef"]["name"] == MANIFESTS["deployment"]["metadata"]["name"]


def test_kubernetes_runs_the_server_without_rights() -> None:
    assert CONTAINER["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert POD["securityContext"]["runAsNonRoot"] and not POD["automountServiceAccountToken"]
    container = CONTAINER["securityContext"]
    assert container["readOnlyRootFilesystem"] and not container["allowPrivilegeEscalation"]
    assert container["capabilities"] == {"drop": ["ALL"]}
    # Without its secret the pod does not start, so it is never open by mistake.
    assert [source["secretRef"]["name"] for source in CONTAINER["envFrom"]] == ["llama-te-keys"]

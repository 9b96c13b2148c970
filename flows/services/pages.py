"""Addresses of pages: what a run has made in MLflow, and runs in Prefect."""

import os
from typing import NamedTuple
from urllib.parse import quote

from flows.services.processes import MLFLOW, read_state
from flows.services.status import running_url
from flows.services.up import DEFAULT_HOST, DEFAULT_PORTS
from plumbline.addresses import without_credentials
from plumbline.project import Project
from tasks.experiments import VIEW


class MlflowPages(NamedTuple):
    """Addresses in an MLflow server."""

    server: str
    up: bool
    """Whether the server is on, or was named; else `plumbline up` starts it there."""
    experiment_id: str

    def run(self, run_id: str) -> str:
        """The page of a run."""
        return f"{self.server}/#/experiments/{self.experiment_id}/runs/{run_id}"

    def runs(self) -> str:
        """The table of the project's runs, with the metrics that they are compared by."""
        return f"{self.server}/#/experiments/{self.experiment_id}/runs?viewStateShareKey={VIEW}"

    def model(self, model_id: str) -> str:
        """The page of a logged model."""
        return f"{self.server}/#/experiments/{self.experiment_id}/models/{model_id}"

    def version(self, name: str, version: str) -> str:
        """The page of a version of a registered model."""
        return f"{self.server}/#/models/{quote(name, safe='')}/versions/{version}"

    @property
    def how_to_open(self) -> str:
        """What to do before the addresses answer; empty where they do."""
        if self.up:
            return ""
        return f"MLflow is not up: `plumbline up` starts it at {self.server}, where its links lead."


def mlflow_pages(project: Project, experiment_id: str) -> MlflowPages:
    """The pages of the server that is named or on; else of the one that `plumbline up` starts."""
    named = os.environ.get("MLFLOW_TRACKING_URI", "")
    if named.startswith(("http://", "https://")):
        return MlflowPages(without_credentials(named).rstrip("/"), True, experiment_id)
    if url := running_url(project, MLFLOW):
        return MlflowPages(url, True, experiment_id)
    before = read_state(project.home).services.get(MLFLOW)
    known = before.address.url if before and before.address else None
    default = f"http://{DEFAULT_HOST}:{DEFAULT_PORTS[MLFLOW]}"
    return MlflowPages(known or default, False, experiment_id)


def flow_run_page(flow_run_id: str) -> str:
    """The page of a flow run, for pages of the same Prefect server."""
    return f"/runs/flow-run/{flow_run_id}"

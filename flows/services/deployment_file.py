"""prefect.yaml: what is deployed, read before anything starts. Imports no framework."""

from pathlib import Path
from typing import Any

import yaml

from plumbline.errors import ParamsError


def read_deployments(root: Path) -> dict[str, list[str]]:
    """The deployments of a project's prefect.yaml by name, each with the names of its schedules.

    Raises:
        ParamsError: there is none, or it is not what Prefect expects.
    """
    path = root / "prefect.yaml"
    try:
        found: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ParamsError(
            f"{path} is gone: expected the project's deployments. `git checkout prefect.yaml` "
            "brings it back."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ParamsError(f"prefect.yaml: broken YAML: {error}") from None
    listed = found.get("deployments") if isinstance(found, dict) else None
    if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
        raise ParamsError("prefect.yaml: expected a list `deployments` of mappings")
    deployments: dict[str, list[str]] = {}
    for one in listed:
        name = one.get("name")
        if not isinstance(name, str) or not name:
            raise ParamsError("prefect.yaml: expected each of the deployments to have a `name`")
        if name in deployments:
            raise ParamsError(f"prefect.yaml: expected different names, got {name} twice")
        deployments[name] = _schedules(name, one.get("schedules") or [])
    return deployments


def _schedules(deployment: str, schedules: Any) -> list[str]:
    """The slugs of schedules; without one it could not be told which of them was changed."""
    if not isinstance(schedules, list):
        raise ParamsError(f"prefect.yaml: {deployment}: expected `schedules` to be a list")
    slugs = [one.get("slug") for one in schedules if isinstance(one, dict)]
    if len(slugs) < len(schedules) or not all(isinstance(s, str) and s for s in slugs):
        raise ParamsError(f"prefect.yaml: {deployment}: expected each schedule to have a `slug`")
    return [str(slug) for slug in slugs]

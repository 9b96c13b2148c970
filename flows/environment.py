"""The environment that every command sets up before it imports a framework."""

import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

from plumbline.project import Project


def prepare_environment(project: Project) -> None:
    """Point Prefect, MLflow and the numeric libraries at the project; what the user set wins."""
    home = project.home
    defaults = {
        "PREFECT_HOME": str(home / "prefect"),
        "PREFECT_LOCAL_STORAGE_PATH": str(home / "results"),
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        # The command line shows its own progress; the log of a run stays in the Prefect UI.
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
        "PREFECT_LOGGING_EXTRA_LOGGERS": "plumbline",
        "MLFLOW_TRACKING_URI": database_uri(home),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_DATASETS_CACHE": str(home / "datasets"),
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        # Bars of libraries; the steps draw their own.
        "TQDM_DISABLE": "1",
        "DVC_NO_ANALYTICS": "1",
        "MPLCONFIGDIR": str(home / "matplotlib"),
        # Threads that wait by spinning for long halve the speed of everything beside them, and
        # a busy neighbour makes them ten times slower themselves; not to spin at all costs half.
        "GOMP_SPINCOUNT": "2000",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    _hide_credentials()


def _hide_credentials() -> None:
    """Take user and password of a server out of its address, which MLflow puts into messages."""
    parts = urlsplit(os.environ["MLFLOW_TRACKING_URI"])
    if parts.scheme in ("http", "https") and "@" in parts.netloc:
        for name, value in (("USERNAME", parts.username), ("PASSWORD", parts.password)):
            if value:
                os.environ[f"MLFLOW_TRACKING_{name}"] = unquote(value)
        where = parts._replace(netloc=parts.netloc.rpartition("@")[2])
        os.environ["MLFLOW_TRACKING_URI"] = where.geturl()


def database_uri(home: Path) -> str:
    """The MLflow store of a project."""
    return f"sqlite:///{home / 'mlflow.db'}"

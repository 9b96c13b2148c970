"""Calling a flow from a command."""

from pathlib import Path

import pytest
from prefect.settings import get_current_settings

from flows.services.calling import calling


def test_a_called_flow_sends_no_heartbeats(
    tmp_path: Path, prefect_api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", prefect_api)
    assert get_current_settings().flows.heartbeat_frequency is not None
    with calling(tmp_path):
        assert get_current_settings().flows.heartbeat_frequency is None
    assert get_current_settings().flows.heartbeat_frequency is not None

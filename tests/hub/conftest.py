import pytest

from tests.hub.live import point_at
from tests.hub_server import HubServer


@pytest.fixture
def hub(monkeypatch, tmp_path_factory):
    """A Hub that works; its write token is in the environment."""
    with HubServer() as server:
        point_at(server.environment(tmp_path_factory.mktemp("home")), monkeypatch)
        yield server

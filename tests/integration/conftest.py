"""What tests against real servers share."""

import pytest

from tests.integration.vllm_server import start_server


@pytest.fixture(scope="session")
def vllm_servers(tmp_path_factory):
    """Makes a server, and keeps it for all tests of the session."""
    held = []

    def running():
        if not held or not held[-1].process.alive:
            held.append(start_server(tmp_path_factory.mktemp("vllm")))
        return held[-1]

    yield running
    for server in held:
        server.process.kill()


@pytest.fixture
def vllm_server(vllm_servers):
    """The real vLLM server of this session; its weights are those of its files, version 0."""
    return vllm_servers()

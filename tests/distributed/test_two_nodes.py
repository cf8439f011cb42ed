"""Two machines, as two network namespaces that share nothing but a cable, train as one process."""

import json
import os
import shutil
import subprocess

import pytest
from safetensors.torch import load_file

from tests.distributed import launch
from tests.models import max_difference

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("ip") is None, reason="there is no ip command (package iproute2)"),
    pytest.mark.skipif(getattr(os, "geteuid", lambda: -1)() != 0, reason="only root can make network namespaces"),
]


def ip(*arguments):
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True, timeout=30)
    return done.stdout


@pytest.fixture
def nodes():
    """Names of two namespaces, in which eth0 has the addresses 10.0.0.1 and 10.0.0.2."""
    names = [f"lookbehind-{os.getpid()}-{i}" for i in range(2)]
    made = []
    try:
        for name in names:
            try:
                ip("netns", "add", name)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"no network namespace can be made here: {error.stderr.strip()}")
            made.append(name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
        for i, name in enumerate(names):
            ip("-n", name, "address", "add", f"10.0.0.{i + 1}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
        yield names
    finally:
        for name in made:
            ip("netns", "delete", name)


def bytes_sent(node):
    (link,) = json.loads(ip("-n", node, "-s", "-j", "link", "show", "eth0"))
    return link["stats64"]["tx"]["bytes"]


def test_two_nodes_equal_one_process(tmp_path, nodes):
    command = launch.documented_commands("distributed.md")[2]
    own_rank = command.index("--node_rank") + 1
    commands = {
        tmp_path / node: ["ip", "netns", "exec", node]
        + [*command[:own_rank], str(i), *command[own_rank + 1 :], *launch.EXACT]
        for i, node in enumerate(nodes)
    }
    launch.run(commands, GLOO_SOCKET_IFNAME="eth0")
    two = load_file(tmp_path / nodes[0] / "runs" / "digits" / "model.safetensors")
    assert max_difference(two, launch.one_process(tmp_path / "one")) <= 1e-10
    gradient = sum(w.nbytes for w in two.values())
    for node in nodes:  # k+1 = 3 gradients in each of 4 steps went over the cable
        assert bytes_sent(node) > 12 * gradient
    assert not list((tmp_path / nodes[1]).rglob("*.safetensors"))  # the first machine saves

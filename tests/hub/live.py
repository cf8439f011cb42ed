"""A Hub on loopback for what runs in this process too, as `load_in_fresh_process` has it for another."""

import json
import os
import subprocess
import sys

import pytest
from huggingface_hub import constants

from tests.hub_server import HubServer

# Loads models and prints the logits for given inputs, as JSON.
LOADING = """
import json, sys
import torch, transformers, peft
found = []
for cls, name, inputs in json.load(sys.stdin):
    model = getattr(peft if "Peft" in cls else transformers, cls).from_pretrained(name).eval()
    with torch.no_grad():
        found.append(model(**{key: torch.tensor(value) for key, value in inputs.items()}).logits.tolist())
print(json.dumps(found))
"""


def point_at(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Children of this process find the Hub by their environment, this process by what it has read from its own.

    Args:
        environment: of `HubServer`.
        monkeypatch: puts all back.
    """
    url, home = environment["HF_ENDPOINT"], environment["HF_HOME"]
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {"ENDPOINT": url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_OFFLINE": False}.items():
        monkeypatch.setattr(constants, name, value)
    # two that older versions lack
    hosts = getattr(constants, "HF_URL_HOSTS", frozenset())
    monkeypatch.setattr(constants, "HF_URL_HOSTS", hosts | {"127.0.0.1"}, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", os.path.join(home, "hub"))
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", url)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)


def load_in_fresh_process(hub: HubServer, home, *models):
    """The logits of models on the Hub, given as (class, id, inputs)."""
    environment = os.environ | hub.environment(home, token=None) | {"OMP_NUM_THREADS": "1"}
    environment.pop("HF_TOKEN", None)
    done = subprocess.run(
        [sys.executable, "-c", LOADING], input=json.dumps(models), env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])

"""Programs under test."""


def set_caches(monkeypatch, folder):
    """Nothing outside of the folder, and no Hub."""
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", folder / "cache")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("evaluate.config.HF_EVALUATE_OFFLINE", True)

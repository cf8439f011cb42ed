"""The loss around trained models: those of the demo, one seed, on planes through their weights."""

from collections.abc import Mapping
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

from hf_lookbehind.measures import loss_plane
from hf_lookbehind.measures.landscape import LossPlane
from hf_lookbehind.scripts.demo.__main__ import DEMO_METHODS, RECIPE, Demo, read_recipe

SEED = 0
SHOWN = ("adamw", "sam-x3", "lookbehind-sam")
REACH = 0.5  # of the planes, in lengths of a filter
LEVELS = (0.75, 1, 1.25, 1.5, 2, 2.5, 3, 4)


def trained(folder: Path, max_steps: int = -1) -> tuple[dict[str, nn.Module], Tensor, Tensor]:
    """Train the demo's models of its first seed; returns them by label, and the test split's pixels and labels.

    Args:
        folder: where the models go; it must exist.
        max_steps: ends every training early, for a trial; -1: not.
    """
    demo, recipe, models = Demo(folder, max_steps), read_recipe(RECIPE), {}
    demo.pretrain()
    for method in DEMO_METHODS:
        if method.name in SHOWN:
            demo.fine_tune(method, recipe[method.name], SEED, folder / method.name)
            models[method.label] = AutoModelForImageClassification.from_pretrained(folder / method.name)
    return models, *demo.test_images()


def planes(models: Mapping[str, nn.Module], pixels: Tensor, labels: Tensor, points: int = 15) -> dict[str, LossPlane]:
    """The test loss of each model on points x points weights around its own, along the same two directions."""
    batches = [{"pixel_values": pixels, "labels": labels}]
    ticks = torch.linspace(-REACH, REACH, points, dtype=torch.float64).tolist()
    return {name: loss_plane(model, batches, ticks, seed=SEED) for name, model in models.items()}


def planes_picture(found: Mapping[str, LossPlane]) -> Figure:
    """The planes side by side, on one scale of colours."""
    figure = Figure(figsize=(6.4, 3.1), layout="constrained")
    panels = figure.subplots(1, len(found), sharex=True, sharey=True)
    filled = []
    for axes, (name, plane) in zip(panels, found.items(), strict=True):
        filled.append(axes.contourf(plane.x, plane.y, plane.losses, levels=LEVELS, cmap="viridis_r", extend="both"))
        axes.contour(plane.x, plane.y, plane.losses, levels=LEVELS, colors="w", linewidths=0.5)
        axes.plot(0, 0, color="w", marker="+", markersize=9, markeredgewidth=1.8)
        axes.set_title(name, fontsize=12)
        axes.set_aspect("equal")
        axes.set_xlabel("first direction", fontsize=11)
    panels[0].set_ylabel("second direction", fontsize=11)
    bar = figure.colorbar(filled[0], ax=panels, location="bottom", shrink=0.7, aspect=30)
    bar.set_ticks(LEVELS, labels=[f"{level:g}" for level in LEVELS])
    bar.set_label("test loss", fontsize=11)
    return figure

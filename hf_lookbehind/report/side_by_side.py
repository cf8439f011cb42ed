"""Models measured side by side: a table, a CSV and pictures of what was found of each."""

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .tables import format_plus_minus, format_table

CSV_NAME, NOISE_NAME, FORMS_NAME = "flatness.csv", "flatness.png", "compression.png"

# Of a model: `model`, `metric`, `value`, and what was measured: `weight_noise` (records of sigma, mean and sd),
# `compression` (of form and value), `sharpness` (of rho and rise), `hessian_eigenvalues` (numbers).
Record = Mapping[str, Any]


def results_table(records: Sequence[Record]) -> str:
    """A row per model, empty where something was not measured of it."""
    rows = []
    for record in records:
        row: dict[str, Any] = {"model": record["model"], record["metric"]: f"{record['value']:.4g}"}
        for noise in record.get("weight_noise", ()):
            row[f"noise {noise['sigma']:g}"] = format_plus_minus(noise["mean"], noise["sd"], digits=3)
        for made in record.get("compression", ()):
            row[made["form"]] = f"{made['value']:.4g}"
        for point in record.get("sharpness", ()):
            row[f"rise at rho {point['rho']:g}"] = f"{point['rise']:.3g}"
        for i, value in enumerate(record.get("hessian_eigenvalues", ()), 1):
            row[f"eigenvalue {i}"] = f"{value:.4g}"
        rows.append(row)
    return format_table(rows, {name: name for row in rows for name in row})


def write_csv(records: Sequence[Record], folder: Path) -> None:
    """A row per number."""
    with (folder / CSV_NAME).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["model", "measure", "at", "value", "sd"])
        for record in records:
            name = record["model"]
            writer.writerow([name, record["metric"], "", record["value"], ""])
            writer.writerows(
                [name, record["metric"], f"sigma={noise['sigma']:g}", noise["mean"], noise["sd"]]
                for noise in record.get("weight_noise", ())
            )
            writer.writerows(
                [name, record["metric"], f"form={made['form']}", made["value"], ""]
                for made in record.get("compression", ())
            )
            writer.writerows(
                [name, "sharpness", f"rho={point['rho']:g}", point["rise"], ""]
                for point in record.get("sharpness", ())
            )
            writer.writerows(
                [name, "hessian_eigenvalue", i, value, ""]
                for i, value in enumerate(record.get("hessian_eigenvalues", ()), 1)
            )


def draw(records: Sequence[Record], noise_kind: str, folder: Path) -> dict[str, str]:
    """A picture of the noise and one of the compression, where there are such; returns alternative texts by name."""
    drawn = {}
    of_each: tuple[tuple[str, str, Callable[..., None], str], ...] = (
        ("weight_noise", NOISE_NAME, _draw_noise, f"against {noise_kind} weight noise; bars: 1 sd over the draws"),
        ("compression", FORMS_NAME, _draw_forms, "with compressed weights"),
    )
    for measure, name, draw_them, said in of_each:
        measured = [record for record in records if measure in record]
        if measured:
            draw_them(measured, noise_kind, folder / name)
            models = " and ".join(record["model"] for record in measured)
            drawn[name] = f"{records[0]['metric']} of {models} {said}"
    return drawn


def _draw_noise(records: Sequence[Record], kind: str, path: Path) -> None:
    from .plots import plot_accuracy_against_noise

    curves = {}
    for record in records:
        noise = record["weight_noise"]
        points = [(0.0, record["value"], 0.0), *((n["sigma"], n["mean"], n["sd"]) for n in noise if n["sigma"])]
        curves[record["model"]] = tuple(zip(*points, strict=True))
    plot_accuracy_against_noise(curves, path, xlabel=rf"{kind} weight noise $\sigma$", ylabel=records[0]["metric"])


def _draw_forms(records: Sequence[Record], _: str, path: Path) -> None:
    from .plots import plot_forms

    curves = {}
    for record in records:
        values = {"as trained": record["value"]} | {made["form"]: made["value"] for made in record["compression"]}
        curves[record["model"]] = (list(values), list(values.values()), [0.0] * len(values))
    plot_forms(curves, path, ylabel=records[0]["metric"], legend="model")

"""Tables of models for the terminal."""

from __future__ import annotations

from rich.table import Table

from maestro_scale import datasets
from maestro_scale.escaping import console_text
from maestro_scale.interop.published import PUBLISHED
from maestro_scale.model.maestro import Maestro
from maestro_scale.model.sizes import SIZES


def published_table() -> Table:
    """Name, sensors, size, license and source of every published model."""
    table = Table("name", "sensors (of the preset)", "size", "license of the weights", "source")
    for model in PUBLISHED.values():
        sensors = ", ".join(s.name for s in datasets.spec(model.dataset).sensors)
        size = SIZES[model.size]
        table.add_row(
            model.name,
            f"of {model.dataset}: {sensors}",
            f"{model.size} ({size.width} x {size.depth})",
            model.license or "see its model card",
            model.address,
        )
    return table


def sensor_table(model: Maestro, name: str, step: int | None) -> Table:
    """What a model reads, a row per dataset and sensor."""
    config = model.config
    size = next((known for known, s in SIZES.items() if s == config.size), "size")
    counted = sum(p.numel() for p in model.parameters())
    title = f"{name}: {size} {config.size.width} x {config.size.depth}, {counted:,} parameters"
    title += "" if step is None else f", {step:,} steps"
    if model.finetuned is not None:
        title += f", predicts {model.finetuned.target}"
    table = Table(
        "dataset", "sensor", "bands", "dates", "pixels", "patch", "extent (m)", title=console_text(title)
    )
    for view in config.views:
        # The configuration of a head for maps has no extent of its own.
        crop_m = view.crop_m or (model.finetuned.spec.crop_m if model.finetuned else None)
        extent = f"{crop_m:g}" if crop_m else ""
        for s in view.sensors:
            numbers = map(str, (len(s.bands), s.num_dates, s.image_size, s.patch))
            table.add_row(console_text(view.dataset), console_text(s.name), *numbers, extent)
    return table

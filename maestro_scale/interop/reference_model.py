"""Model configuration of a reference checkpoint: widths and depths from tensor shapes, sensors from parameter names.

Shapes do not determine everything: image sizes, dates, scales and the position grid come from a dataset's preset, the
number of heads from the table of sizes. If a choice remains, the error names the option that makes it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from maestro_scale.datasets.spec import DatasetSpec, Sensor, Target
from maestro_scale.interop.export import ExportError
from maestro_scale.model.config import Fusion, ModelConfig
from maestro_scale.model.sizes import SIZES, Size

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class ConversionHints:
    """Properties of a checkpoint that the user states; None: determine from the file, or raise an error."""

    heads: int | None = None
    decoder_heads: int | None = None
    fusion: str | None = None
    leave_out: tuple[str, ...] = ()


def sensor_names(state: State) -> tuple[str, ...]:
    """Names of the sensors, in the order of the file."""
    names = tuple(k.removeprefix("mask_token.") for k in state if k.startswith("mask_token."))
    if not names:
        raise ExportError("the file contains no mask tokens under model.: is it a MAESTRO checkpoint?")
    return names


def model_config(
    state: State, spec: DatasetSpec, hints: ConversionHints, hyper: Mapping[str, object]
) -> ModelConfig:
    """Configuration of the model with the state dict ``state``, its sensors described by ``spec``.

    Raises:
        ExportError: a sensor is unknown to ``spec`` or differs from it, or the shapes leave a choice; names the option.
    """
    sensors = tuple(_sensor(state, spec, name) for name in sensor_names(state) if name not in hints.leave_out)
    order = {s.name: i for i, s in enumerate(spec.sensors)}
    sensors = tuple(sorted(sensors, key=lambda s: order[s.name]))
    if not sensors:
        raise ExportError("every sensor is left out: leave at least one")
    fusion = _fusion(state, sensors, hints, hyper)
    sensors = _with_group_names(state, sensors) if fusion == "group" else sensors
    inter_depth = _depth(state, "encoder_inter")
    target, loss = _loss(hyper)
    names = {s.name for s in sensors}
    config = ModelConfig(
        sensors=sensors,
        size=_size(state, hints, inter_depth),
        pos_grid=spec.pos_grid,
        fusion=fusion,
        inter_depth=inter_depth,
        spectral="token" if any(len(s.token_groups) > 1 for s in sensors) else "joint",
        target=target,
        loss=loss,
        ref_sensor=spec.ref_sensor if spec.ref_sensor in names else None,
        crop_m=spec.crop_m,
        dataset=spec.name,
    )
    wanted = [t for t in _child_names(state, "heads") if f"heads.{t}" not in hints.leave_out]
    return dataclasses.replace(config, heads=tuple(_head(state, spec, t) for t in wanted))


def matching_specs(state: State, specs: Iterable[DatasetSpec]) -> list[DatasetSpec]:
    """The ``specs`` that match the most sensors of the file, by name, patch size and number of bands."""
    scored = []
    for spec in specs:
        known = {s.name: s for s in spec.sensors if s.name in sensor_names(state)}
        # A dataset with a sensor of the same name but another patch or number of bands does not match at all.
        matches = all(_matches(state, sensor) for sensor in known.values())
        scored.append((len(known) if matches else 0, spec))
    best = max((n for n, _ in scored), default=0)
    return [spec for n, spec in scored if n == best and n > 0]


# -- sensors -----------------------------------------------------------------------------------------------------------


def _sensor(state: State, spec: DatasetSpec, name: str) -> Sensor:
    known = {s.name: s for s in spec.sensors}
    if name not in known:
        raise ExportError(
            f"the checkpoint has a sensor {name!r} that {spec.name} does not have (it has {', '.join(known)}): "
            f"leave it out with --leave-out {name}, or describe the model with --like CONFIG.json"
        )
    sensor = known[name]
    tokens = _token_shapes(state, sensor)
    bands, patch = sum(c for c, _ in tokens), tokens[0][1]
    if bands != len(sensor.bands) or sensor.image_size % patch:
        raise ExportError(
            f"sensor {name}: the checkpoint has patches of {patch} pixels and {bands} bands, but {spec.name} has "
            f"image_size {sensor.image_size} and {len(sensor.bands)} bands: name another --dataset, "
            "or describe the model with --like CONFIG.json"
        )
    groups = tuple(c for c, _ in tokens) if len(tokens) > 1 else ()
    return dataclasses.replace(sensor, patch=patch, token_groups=groups, embed=_embed(state, sensor))


def _embed(state: State, sensor: Sensor) -> str:
    # Older files embed every sensor under its own name.
    for name in (sensor.embed, sensor.name):
        if f"patch_embed.{name}.patchify_bands.0.conv.weight" in state:
            return name
    raise ExportError(f"sensor {sensor.name}: the checkpoint has no patch_embed.{sensor.embed}")


def _token_shapes(state: State, sensor: Sensor) -> list[tuple[int, int]]:
    """(bands, patch) of each token at a position."""
    prefix = f"patch_embed.{_embed(state, sensor)}.patchify_bands"
    shapes: list[tuple[int, int]] = []
    while (weight := state.get(f"{prefix}.{len(shapes)}.conv.weight")) is not None:
        shapes.append((weight.shape[1], weight.shape[-1]))
    return shapes


def _matches(state: State, sensor: Sensor) -> bool:
    try:
        tokens = _token_shapes(state, sensor)
    except ExportError:
        return False
    return sum(c for c, _ in tokens) == len(sensor.bands) and all(p == sensor.patch for _, p in tokens)


# -- sequences ---------------------------------------------------------------------------------------------------------


def _fusion(
    state: State, sensors: tuple[Sensor, ...], hints: ConversionHints, hyper: Mapping[str, object]
) -> Fusion:
    stated = hints.fusion or hyper.get("fusion_mode") or hyper.get("multimodal")
    for fusion in get_args(Fusion):
        if fusion == stated:
            return fusion
    if isinstance(stated, str):
        raise ExportError(
            f"the checkpoint has fusion {stated!r}; supported are {', '.join(get_args(Fusion))}"
        )
    encoders = set(_child_names(state, "encoder"))
    if encoders == {"shared"}:
        return "shared"
    by_sensor = {s.name for s in sensors} <= encoders
    if not by_sensor or {s.group for s in sensors} == {s.name for s in sensors}:
        return "group"
    if _depth(state, "encoder_inter"):
        return "mod"
    raise ExportError(
        "the checkpoint has one encoder per sensor: pass --fusion mod or --fusion monotemp, its shapes are the same"
    )


def _with_group_names(state: State, sensors: tuple[Sensor, ...]) -> tuple[Sensor, ...]:
    """The sensors with their groups renamed as in the file, if exactly one group has another name there."""
    encoders = set(_child_names(state, "encoder"))
    groups = dict.fromkeys(s.group for s in sensors)
    absent = [g for g in groups if g not in encoders]
    others = sorted(encoders - set(groups) - set(sensor_names(state)))
    if not absent:
        return sensors
    if len(absent) > 1 or len(others) != 1:
        raise ExportError(
            f"the checkpoint has encoders {', '.join(sorted(encoders))}, the sensors are in the groups "
            f"{', '.join(groups)}: describe the model with --like CONFIG.json"
        )
    return tuple(dataclasses.replace(s, group=others[0]) if s.group == absent[0] else s for s in sensors)


# -- dimensions --------------------------------------------------------------------------------------------------------


def _size(state: State, hints: ConversionHints, inter_depth: int) -> Size:
    encoder, decoder = (
        f"encoder.{_child_names(state, 'encoder')[0]}",
        f"decoder.{_child_names(state, 'decoder')[0]}",
    )
    width, inner, mlp = _widths(state, encoder)
    decoder_width, decoder_inner, decoder_mlp = _widths(state, decoder)
    depth = _depth(state, encoder) + inter_depth
    known = [s for s in SIZES.values() if (s.width, s.depth, s.heads * s.dim_head) == (width, depth, inner)]
    decoder_known = decoder_inner == 512
    heads: int | None
    if not _has_projection(state, encoder):
        heads = 1  # the reference omits the output projection if there is one head
    else:
        heads = hints.heads or (known[0].heads if known else None)
    decoder_heads = hints.decoder_heads or (16 if decoder_known else None)
    heads = _checked_heads("--heads", heads, inner)
    decoder_heads = _checked_heads("--decoder-heads", decoder_heads, decoder_inner)
    return Size(
        width=width,
        depth=depth,
        heads=heads,
        dim_head=inner // heads,
        mlp_ratio=mlp // width,
        decoder_depth=_depth(state, decoder),
        decoder_width=decoder_width,
        decoder_heads=decoder_heads,
        decoder_dim_head=decoder_inner // decoder_heads,
        decoder_mlp_ratio=decoder_mlp // width,
    )


def _checked_heads(option: str, heads: int | None, channels: int) -> int:
    if heads is None:
        raise ExportError(
            f"the checkpoint's attention has {channels} channels; the number of heads does not follow from shapes: "
            f"pass {option}"
        )
    if channels % heads:
        raise ExportError(f"{option} {heads} does not divide the checkpoint's {channels} channels")
    return heads


def _widths(state: State, stack: str) -> tuple[int, int, int]:
    """(width, attention channels, MLP width)."""
    try:
        qkv = state[f"{stack}.layers.0.0.to_qkv.weight"]
        return qkv.shape[1], qkv.shape[0] // 3, state[f"{stack}.layers.0.1.net.1.weight"].shape[0]
    except KeyError as error:
        raise ExportError(f"the checkpoint lacks {error.args[0]}: is it a MAESTRO checkpoint?") from None


def _has_projection(state: State, stack: str) -> bool:
    return f"{stack}.layers.0.0.to_out.0.weight" in state


def _depth(state: State, stack: str) -> int:
    prefix = f"{stack}.layers."
    return len({k[len(prefix) :].partition(".")[0] for k in state if k.startswith(prefix)})


def _child_names(state: State, kind: str) -> list[str]:
    """Names directly below ``kind.``, in the order of the file."""
    names = list(dict.fromkeys(k.split(".")[1] for k in state if k.startswith(f"{kind}.")))
    if not names and kind != "heads":
        raise ExportError(f"the checkpoint has no {kind}: is it a MAESTRO checkpoint?")
    return names


# -- training objective ------------------------------------------------------------------------------------------------


def _loss(hyper: Mapping[str, object]) -> tuple[Literal["patch_group", "none"], Literal["l1", "l2"]]:
    """(target normalisation, loss) from the name that the reference uses for both."""
    names: dict[object, tuple[Literal["patch_group", "none"], Literal["l1", "l2"]]] = {
        "l1": ("none", "l1"),
        "l2": ("none", "l2"),
        "l1_norm": ("patch_group", "l1"),
        "l2_norm": ("patch_group", "l2"),
    }
    return names.get(hyper.get("loss"), ("patch_group", "l1"))


def _head(state: State, spec: DatasetSpec, name: str) -> Target:
    segmentation = f"heads.{name}.conv.weight" in state
    last = state.get(f"heads.{name}.{'conv' if segmentation else 'linear'}.weight")
    kind = "segmentation" if segmentation else "multilabel"
    for target in spec.targets:
        classes = target.num_outputs if segmentation else len(target.classes)
        outputs = None if last is None else last.shape[0]
        if target.kind == kind and outputs and outputs % classes == 0:
            side = math.isqrt(outputs // classes)
            if side * side * classes == outputs and (segmentation or side == 1):
                return dataclasses.replace(target, name=name)
    raise ExportError(
        f"no target of {spec.name} has the shape of the checkpoint's head {name!r}: leave it out with "
        f"--leave-out heads.{name}"
    )

"""What an authors' state dict says of its model: widths and depths from shapes, sensors by the names of their parts.

Shapes do not hold everything: image sizes, dates, scales and the ground grid come from the preset of a dataset, the
number of heads from the table of sizes. Where either leaves a choice, an error asks for it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from maestro_scale.datasets.spec import DatasetSpec, Sensor, Target
from maestro_scale.interop.export import ExportError
from maestro_scale.model.config import ModelConfig
from maestro_scale.model.sizes import SIZES, Size

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class ConversionHints:
    """What a user says about a checkpoint beyond its file; None: find out, or ask."""

    heads: int | None = None
    decoder_heads: int | None = None
    fusion: str | None = None
    leave_out: tuple[str, ...] = ()


def sensor_names(state: State) -> tuple[str, ...]:
    """Names of the sensors, in the order of the file."""
    names = tuple(k.removeprefix("mask_token.") for k in state if k.startswith("mask_token."))
    if not names:
        raise ExportError("the file holds no mask tokens under model.: is it a MAESTRO checkpoint?")
    return names


def model_config(
    state: State, spec: DatasetSpec, hints: ConversionHints, hyper: Mapping[str, object]
) -> ModelConfig:
    """The configuration behind ``state``, its sensors seen as in ``spec``.

    Raises:
        ExportError: a sensor is unknown to ``spec`` or differs from it, or shapes leave a choice; says what to pass.
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
    wanted = [t for t in _parts(state, "heads") if f"heads.{t}" not in hints.leave_out]
    return dataclasses.replace(config, heads=tuple(_head(state, spec, t) for t in wanted))


def matching_specs(state: State, specs: Iterable[DatasetSpec]) -> list[DatasetSpec]:
    """Of ``specs``, those that most of the file's sensors agree with in name, patch and bands."""
    scored = []
    for spec in specs:
        own = {s.name: s for s in spec.sensors}
        agree = [n for n in sensor_names(state) if n in own and _agrees(state, own[n])]
        scored.append((len(agree) if len(agree) == len(own.keys() & set(sensor_names(state))) else 0, spec))
    best = max((n for n, _ in scored), default=0)
    return [spec for n, spec in scored if n == best and n > 0]


# -- sensors -----------------------------------------------------------------------------------------------------------


def _sensor(state: State, spec: DatasetSpec, name: str) -> Sensor:
    own = {s.name: s for s in spec.sensors}
    if name not in own:
        raise ExportError(
            f"the checkpoint has a sensor {name!r} that {spec.name} does not know (it knows {', '.join(own)}): "
            f"leave it out with --leave-out {name}, or describe the model with --like CONFIG.json"
        )
    sensor = own[name]
    tokens = _token_shapes(state, sensor)
    bands, patch = sum(c for c, _ in tokens), tokens[0][1]
    if bands != len(sensor.bands) or sensor.image_size % patch:
        raise ExportError(
            f"sensor {name}: the checkpoint embeds patches of {patch} pixels and {bands} bands, but {spec.name} has "
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
    """(bands, patch) of every token of a place."""
    prefix = f"patch_embed.{_embed(state, sensor)}.patchify_bands"
    shapes = []
    while (weight := state.get(f"{prefix}.{len(shapes)}.conv.weight")) is not None:
        shapes.append((weight.shape[1], weight.shape[-1]))
    return shapes


def _agrees(state: State, sensor: Sensor) -> bool:
    try:
        tokens = _token_shapes(state, sensor)
    except ExportError:
        return False
    return sum(c for c, _ in tokens) == len(sensor.bands) and all(p == sensor.patch for _, p in tokens)


# -- sequences ---------------------------------------------------------------------------------------------------------


def _fusion(
    state: State, sensors: tuple[Sensor, ...], hints: ConversionHints, hyper: Mapping[str, object]
) -> str:
    told = hints.fusion or hyper.get("fusion_mode") or hyper.get("multimodal")
    if isinstance(told, str):
        return told
    encoders = set(_parts(state, "encoder"))
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
    """The groups of the preset under the names they have in the file, where one of them is called otherwise."""
    encoders = set(_parts(state, "encoder"))
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
    encoder, decoder = f"encoder.{_parts(state, 'encoder')[0]}", f"decoder.{_parts(state, 'decoder')[0]}"
    width, inner, mlp = _widths(state, encoder)
    decoder_width, decoder_inner, decoder_mlp = _widths(state, decoder)
    depth = _depth(state, encoder) + inter_depth
    known = [s for s in SIZES.values() if (s.width, s.depth, s.heads * s.dim_head) == (width, depth, inner)]
    decoder_known = decoder_inner == 512
    if not _has_projection(state, encoder):
        heads = 1
    else:
        heads = hints.heads or (known[0].heads if known else None)
    decoder_heads = hints.decoder_heads or (16 if decoder_known else None)
    for option, count, channels in (
        ("--heads", heads, inner),
        ("--decoder-heads", decoder_heads, decoder_inner),
    ):
        if count is None:
            raise ExportError(
                f"the checkpoint's attention is {channels} channels wide, which shapes do not divide into heads: "
                f"pass {option}"
            )
        if channels % count:
            raise ExportError(f"{option} {count} does not divide the checkpoint's {channels} channels")
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


def _parts(state: State, kind: str) -> list[str]:
    """Names below ``kind.``, in the order of the file."""
    names = list(dict.fromkeys(k.split(".")[1] for k in state if k.startswith(f"{kind}.")))
    if not names and kind != "heads":
        raise ExportError(f"the checkpoint has no {kind}: is it a MAESTRO checkpoint?")
    return names


# -- what it was trained for -------------------------------------------------------------------------------------------


def _loss(hyper: Mapping[str, object]) -> tuple[str, str]:
    told = hyper.get("loss")
    names = {"l1": ("none", "l1"), "l2": ("none", "l2"), "l1_norm": ("patch_group", "l1")}
    return {**names, "l2_norm": ("patch_group", "l2")}.get(told, ("patch_group", "l1"))


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

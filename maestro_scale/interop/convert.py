"""Conversion of Lightning checkpoints of IGNF/MAESTRO to exported models, without loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from maestro_scale import datasets, untrusted
from maestro_scale.datasets.spec import DatasetSpec
from maestro_scale.errors import shorten
from maestro_scale.interop.export import CONFIG, ExportError, write_model
from maestro_scale.interop.reference_keys import from_reference
from maestro_scale.interop.reference_model import ConversionHints, matching_specs, model_config
from maestro_scale.interop.restricted import load_untrusted
from maestro_scale.interop.transfer import TransferredPart, TransferStatus, summarize_transfer
from maestro_scale.model.config import ModelConfig
from maestro_scale.model.finetuned import Finetuned
from maestro_scale.model.maestro import Maestro
from maestro_scale.shards.errors import ManifestError
from maestro_scale.shards.format.manifest import check_spec

PREFIXES = {"raw": "model.", "ema": "ema_model."}
OWN = "maestro_scale"
"""Key of a checkpoint that this project wrote: the configuration of the model."""


@dataclass(frozen=True)
class ConvertOptions:
    """Choices that the file does not determine.

    weights: ``raw`` or ``ema``, the moving average.
    dataset: name of the dataset whose preset describes the sensors; None: the one that matches the file.
    like: config.json of an exported model that describes the model, instead of a dataset and of tensor shapes.
    """

    weights: Literal["raw", "ema"] = "raw"
    dataset: str | None = None
    like: Path | None = None
    hints: ConversionHints = dataclasses.field(default_factory=ConversionHints)


def convert(
    checkpoint: Path, out: Path, options: ConvertOptions | None = None
) -> tuple[TransferredPart, ...]:
    """Write ``out/model.safetensors`` and ``out/config.json`` from a Lightning checkpoint.

    Returns which parts were loaded and which were left out.

    Raises:
        ExportError: the file is not such a checkpoint or would run code; a parameter is missing; or the model has no
            parameter for something in the file that was not left out explicitly. Nothing is written then.
    """
    options = options or ConvertOptions()
    content = load_untrusted(checkpoint)
    if not isinstance(content, Mapping) or not isinstance(content.get("state_dict"), Mapping):
        raise ExportError(f"{checkpoint}: contains no state_dict, so it is not a Lightning checkpoint")
    if not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content["state_dict"].items()):
        raise ExportError(f"{checkpoint}: its state_dict contains something else than tensors by name")
    hyper = content.get("hyper_parameters")
    state = _select_weights(checkpoint, content["state_dict"], options.weights)
    own = content.get(OWN)
    if own is not None and options.like is None and options.dataset is None:
        config = _own_config(checkpoint, own)
    else:
        config = _config(checkpoint, state, options, hyper if isinstance(hyper, Mapping) else {})
    finetuned = _own_finetuned(checkpoint, own) if own is not None and options.like is None else None
    try:
        with torch.device("meta"):
            like = Maestro(config, decodes=finetuned is None).state_dict()
    except (RuntimeError, ValueError, ArithmeticError, LookupError) as error:
        raise _unfit(checkpoint, error) from None
    segmentation = frozenset(t.name for t in config.heads if t.kind == "segmentation")
    try:
        converted, missing, unused = from_reference(state, like, segmentation)
    except ValueError as error:
        raise ExportError(f"{checkpoint}: {error}") from None
    except _UNFIT as error:
        raise _unfit(checkpoint, error) from None
    unexplained = [k for k in unused if not _is_left_out(k, options.hints.leave_out)]
    if missing or unexplained:
        listed = "; ".join(
            f"{what} {', '.join(names)}"
            for what, names in (("missing are", missing), ("the model has no", unexplained))
            if names
        )
        raise ExportError(
            f"{checkpoint}: does not fit a {config.fusion} model of {config.dataset or 'these sensors'}: {listed}. "
            "Leave sensors or heads out with --leave-out, or describe the model with --like CONFIG.json"
        )
    trained: dict[str, Any] = {"source": checkpoint.name, "weights": options.weights}
    counts = {"step": content.get("global_step"), "epoch": content.get("epoch")}
    trained |= {name: count if type(count) is int else None for name, count in counts.items()}
    write_model(out, converted, config, trained, finetuned)
    statuses: list[tuple[str, TransferStatus, int, str]]
    statuses = [(k, "loaded", v.numel(), "") for k, v in converted.items()]
    statuses += [(k, "unused", state[k].numel(), "left out as requested") for k in unused]
    return summarize_transfer(statuses)


# What reading widths, depths and names from the shapes of any tensors can raise.
_UNFIT = (LookupError, ArithmeticError, RuntimeError, TypeError)


def _unfit(checkpoint: Path, error: Exception) -> ExportError:
    return ExportError(
        f"{checkpoint}: its tensors are not those of a MAESTRO model ({type(error).__name__}: {shorten(str(error))})"
    )


def is_exported_model(path: Path) -> bool:
    """Whether ``path`` is a folder with an exported model."""
    return (path / CONFIG).is_file()


def _select_weights(checkpoint: Path, state: Mapping[str, Any], weights: str) -> dict[str, Tensor]:
    prefix = PREFIXES[weights]
    chosen = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
    if not chosen:
        there = [f"--weights {name}" for name, p in PREFIXES.items() if any(k.startswith(p) for k in state)]
        raise ExportError(
            f"{checkpoint}: contains no {weights} weights (keys under {prefix}); "
            f"{'use ' + there[0] if there else 'is it a MAESTRO checkpoint?'}"
        )
    if unknown := sorted(k for k in state if not k.startswith(tuple(PREFIXES.values()))):
        listed = ", ".join(key[:100] for key in unknown[:5])
        raise ExportError(
            f"{checkpoint}: its state_dict contains keys that a MAESTRO model does not have: {listed}"
        )
    return chosen


def _config(
    checkpoint: Path, state: dict[str, Tensor], options: ConvertOptions, hyper: Mapping[str, Any]
) -> ModelConfig:
    if options.like is not None:
        try:
            return ModelConfig.from_dict(untrusted.field_of(untrusted.read_json(options.like), dict, "model"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ExportError(
                f"{options.like}: is not the config.json of an exported model ({error})"
            ) from None
    try:
        return model_config(state, _spec(state, options.dataset), options.hints, hyper)
    except (ExportError, ValueError) as error:
        raise ExportError(f"{checkpoint}: {error}") from None
    except _UNFIT as error:
        raise _unfit(checkpoint, error) from None


def _own_config(checkpoint: Path, own: Any) -> ModelConfig:
    try:
        return ModelConfig.from_dict(untrusted.field_of(own, dict, "model"))
    except (ValueError, TypeError, ArithmeticError) as error:
        raise ExportError(
            f"{checkpoint}: {OWN}.model is not a configuration that this version supports ({error}); describe the "
            "model with --like CONFIG.json or --dataset NAME"
        ) from None


def _own_finetuned(checkpoint: Path, own: Any) -> Finetuned | None:
    if not isinstance(own, dict) or "finetuned" not in own:
        return None
    try:
        found = untrusted.from_builtins(Finetuned, own["finetuned"])
        check_spec(found.spec)
    except (ValueError, TypeError, ArithmeticError, ManifestError) as error:
        raise ExportError(f"{checkpoint}: {OWN}.finetuned: {error}; update maestro_scale") from None
    return found


def _spec(state: dict[str, Tensor], dataset: str | None) -> DatasetSpec:
    if dataset is not None:
        try:
            return datasets.full_spec(dataset)
        except KeyError as error:
            raise ExportError(error.args[0]) from None
    found = matching_specs(state, [datasets.full_spec(name) for name in datasets.known()])
    if len(found) != 1:
        which = " and ".join(s.name for s in found) if found else "none"
        raise ExportError(
            f"of the datasets {', '.join(datasets.known())}, {which} fits its sensors: pass --dataset NAME"
        )
    return found[0]


def _is_left_out(key: str, names: tuple[str, ...]) -> bool:
    """Whether an unused reference key belongs to a sensor or part that the user left out."""
    kind, part, *_ = [*key.split("."), ""]
    return part in names or f"{kind}.{part}" in names

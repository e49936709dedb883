"""The baselines by name: ``--baseline NAME[:ARGUMENT[,option=value,…]]``. To add one, add a row to ``BASELINES``."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from maestro_scale.errors import did_you_mean
from maestro_scale.evaluation.results import ORACLE, EvaluationError

if TYPE_CHECKING:  # imported where an encoder is built: names and help texts need no torch
    from maestro_scale.datasets.spec import DatasetSpec
    from maestro_scale.evaluation.baselines.baseline import Baseline
    from maestro_scale.evaluation.baselines.plugin import PluginBaseline
    from maestro_scale.model.maestro import Maestro
    from maestro_scale.recipe import Recipe

Build = Callable[[str, "Recipe", "DatasetSpec"], "Maestro | Baseline"]
"""(argument, recipe, resolved spec) → the encoder."""


@dataclass(frozen=True)
class BaselineKind:
    """A row of the table. ``argument``: what follows the colon; empty if nothing may.

    ``build``: makes the encoder; or ``module:Class`` of an external encoder (``protocol.ExternalEncoder``), whose
    options hold the argument by its name in lower case. ``published``: its weights were trained by others.
    """

    argument: str
    build: Build | str
    help: str
    published: bool = True


def _statistics(argument: str, recipe: Recipe, spec: DatasetSpec) -> Baseline:
    from maestro_scale.evaluation.baselines.statistics import ChannelStatistics

    return ChannelStatistics(spec)


def _untrained(argument: str, recipe: Recipe, spec: DatasetSpec) -> Maestro:
    from maestro_scale.model.maestro import Maestro
    from maestro_scale.recipe import build_model_config

    return Maestro(build_model_config(recipe, [spec])).initialise(recipe.seed).eval()


def _image(argument: str, recipe: Recipe, spec: DatasetSpec) -> Baseline:
    from maestro_scale.evaluation.baselines.image import ImageEncoder, load_backbone

    return ImageEncoder(spec, load_backbone(argument), argument).eval()


def _python(argument: str, recipe: Recipe, spec: DatasetSpec) -> Baseline:
    from maestro_scale.evaluation.baselines.content import content_digest
    from maestro_scale.evaluation.baselines.protocol import parse_options

    path, options = parse_options(argument)
    name = f"python:{path}"
    encoder = _external(name, _load_class(path), spec, options)
    encoder.code = content_digest(f"python:{argument}")
    return encoder


_PACKAGE = __package__
_UNTRAINED = "the recipe's model with its initial weights"

BASELINES: Mapping[str, BaselineKind] = {
    "statistics": BaselineKind(
        "", _statistics, "mean and deviation of every band per patch", published=False
    ),
    "untrained": BaselineKind("", _untrained, _UNTRAINED, published=False),
    "random": BaselineKind("", _untrained, "the same as untrained", published=False),
    "image": BaselineKind(
        "WEIGHTS", _image, "a vision transformer of transformers: a folder, or a name on the hub"
    ),
    "presto": BaselineKind(
        "WEIGHTS", f"{_PACKAGE}.presto:Presto", "Presto (arXiv 2304.14065): its default_model.pt"
    ),
    "galileo": BaselineKind(
        "WEIGHTS", f"{_PACKAGE}.galileo:Galileo", "Galileo (arXiv 2502.09356): its encoder.pt"
    ),
    "torchgeo": BaselineKind(
        "MODEL", f"{_PACKAGE}.torchgeo:TorchGeo", "a model of torchgeo, where it is installed"
    ),
    "terratorch": BaselineKind(
        "MODEL", f"{_PACKAGE}.terratorch:TerraTorch", "a backbone of terratorch, where it is installed"
    ),
    "python": BaselineKind("pkg.module:Class", _python, "any encoder with the interface of ExternalEncoder"),
}
"""The oracle is not among them: it is a mode, see ``oracle/``."""

UNTRAINED = ("untrained", "random")
"""The baselines whose network is that of the recipe."""


def baseline_names() -> list[str]:
    """``NAME`` or ``NAME:ARGUMENT`` of every baseline."""
    table = [f"{name}:{kind.argument}" if kind.argument else name for name, kind in BASELINES.items()]
    return [*table, ORACLE]


def has_published_weights(encoder: str) -> bool:
    """Whether an encoder, as named in results, is a baseline whose weights were trained by others."""
    kind = BASELINES.get(encoder.partition(":")[0])
    return kind is not None and kind.published and ":" in encoder


def short_name(encoder: str) -> str:
    """An encoder, as named in results, without folders: ``presto:/data/model.pt`` → ``presto:model.pt``.

    Image encoders are known by the name of their weights alone.
    """
    head, _, argument = encoder.partition(":")
    last = encoder.rstrip("/").rpartition("/")[2]
    return f"{head}:{last}" if head in BASELINES and head != "image" and "/" in argument else last


def baseline_kind(name: str) -> BaselineKind:
    """The row of ``--baseline NAME``.

    EvaluationError for an unknown name, or an argument that is missing or superfluous.
    """
    head, _, argument = name.partition(":")
    kind = BASELINES.get(head)
    if kind is None:
        raise EvaluationError(
            f"no baseline is called {name!r}{did_you_mean(head, BASELINES)}; there are: {', '.join(baseline_names())}"
        )
    if bool(argument) != bool(kind.argument):
        expected = f"{head}:{kind.argument}" if kind.argument else head
        raise EvaluationError(f"--baseline {name}: write {expected}")
    return kind


def build_baseline(name: str, recipe: Recipe, spec: DatasetSpec) -> Maestro | Baseline:
    """The encoder of ``--baseline NAME`` for a resolved spec.

    EvaluationError as of ``baseline_kind``, or for an encoder that cannot be built.
    """
    kind = baseline_kind(name)
    head, _, argument = name.partition(":")
    if not isinstance(kind.build, str):
        return kind.build(argument, recipe, spec)
    from maestro_scale.evaluation.baselines.protocol import parse_options

    value, options = parse_options(argument)
    return _external(
        f"{head}:{value}", _load_class(kind.build), spec, {kind.argument.lower(): value, **options}
    )


def _external(name: str, cls: Any, spec: DatasetSpec, options: Mapping[str, str]) -> PluginBaseline:
    """Build an external encoder. EvaluationError, with its name, where it raises one."""
    from torch import nn

    from maestro_scale.evaluation.baselines.inputs import sensor_inputs
    from maestro_scale.evaluation.baselines.plugin import PluginBaseline

    try:
        encoder = cls(sensor_inputs(spec), options)
    except EvaluationError as error:
        raise EvaluationError(f"--baseline {name}: {error}") from None
    if not isinstance(encoder, nn.Module):
        raise EvaluationError(f"--baseline {name}: {type(encoder).__name__} is not a torch.nn.Module")
    return PluginBaseline(name, spec, encoder, options)


def _load_class(path: str) -> Any:
    """The class ``pkg.module:Class``. EvaluationError where there is none."""
    module_name, _, class_name = path.partition(":")
    if not module_name or not class_name.isidentifier():
        raise EvaluationError(f"--baseline python:{path}: write python:pkg.module:Class")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise EvaluationError(
            f"--baseline python:{path}: {module_name} cannot be imported ({error}); is its folder on PYTHONPATH?"
        ) from None
    except Exception as error:  # of the user's code
        reason = f"{type(error).__name__}: {error}".splitlines()[0].removesuffix(": ")
        raise EvaluationError(
            f"--baseline python:{path}: {module_name} cannot be imported ({reason}); correct the module or its package"
        ) from error
    found = getattr(module, class_name, None)
    if found is None:
        classes = [n for n, v in vars(module).items() if isinstance(v, type)]
        raise EvaluationError(
            f"--baseline python:{path}: {module_name} has no class {class_name}{did_you_mean(class_name, classes)}"
        )
    from torch import nn

    if not (isinstance(found, type) and issubclass(found, nn.Module)):  # os:system would be called otherwise
        raise EvaluationError(f"--baseline python:{path}: {class_name} is not a torch.nn.Module")
    return found

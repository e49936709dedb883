"""Estimates the memory of a rank in a training step: DeepSpeed's tensors, activations, and batches on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from maestro_scale.datasets.spec import DatasetSpec
from maestro_scale.model.activations import activation_bytes
from maestro_scale.model.config import ModelConfig
from maestro_scale.model.cost import num_parameters
from maestro_scale.recipe import Recipe
from maestro_scale.stream.packing import num_bytes
from maestro_scale.stream.transform import Transform
from maestro_scale.training.footprint import Footprint, footprint

# Fraction of a device's memory. The rest is left to the CUDA context, NCCL, cuBLAS workspaces and fragmentation.
USABLE_MEMORY = 0.9


@dataclass(frozen=True)
class StepMemory:
    """Peak bytes of a rank in a training step. ``activations``: what forward and backward need beyond the engine's
    tensors. ``batches``: input on the device. ``on_cpu``: offloaded tensors share the device's memory."""

    footprint: Footprint
    activations: int
    batches: int
    on_cpu: bool = False

    @property
    def device(self) -> int:
        """Bytes on the device."""
        offloaded = self.footprint.host if self.on_cpu else 0
        return self.footprint.device + offloaded + self.activations + self.batches


class MemoryEstimator:
    """Memory of a recipe's step, for its model and datasets.

    ``parameters``: number of trainable parameters. ``sample_bytes``: of a sample in a batch, by dataset.
    """

    def __init__(self, config: ModelConfig, specs: Sequence[DatasetSpec]) -> None:
        self.config = config
        self.parameters = num_parameters(config)
        names = [view.dataset for view in config.views]
        self._views = {name: config.for_dataset(name) for name in names}
        self.sample_bytes = {
            name: num_bytes(Transform(spec).fields, 1) for name, spec in zip(names, specs, strict=True)
        }

    def step(self, recipe: Recipe, world_size: int, device: str) -> StepMemory:
        """The memory of a step of ``recipe``, whose micro-batch is a number, on ``world_size`` ranks of a device type.

        A step is of one dataset of the mixture: the one that needs the most.
        """
        engine = recipe.deepspeed_config(world_size, device)
        held = footprint(
            self.parameters, world_size, engine, recipe.num_micro_batches(world_size), recipe.optim.ema > 0
        )
        share = recipe.train.global_batch // world_size
        micro_batch, precision = recipe.train.samples_per_micro_batch, recipe.train.precision_on(device)
        needs = []
        for name, view in self._views.items():
            activations = activation_bytes(view, recipe.masking.ratio, precision, micro_batch)
            # The micro-batches of this step, and those of the next one, which are copied while this one computes.
            needs.append((activations, 2 * share * self.sample_bytes[name]))
        activations, batches = max(needs, key=sum)
        return StepMemory(held, activations, batches, on_cpu=device == "cpu")

"""Stand-in for the authors' code, whose package is not a dependency."""

from __future__ import annotations

import inspect

import torch


class TheirModule(torch.nn.Module):
    """A stand-in for ``SSLModule`` of maestro/train/model.py (6a30075): the arguments of its constructor, what it reads
    of them, and parameters of the shapes given by ``datasets`` in the place of their DatasetsConfig."""

    SIZES = ("tiny", "small", "medium", "large")

    def __init__(
        self,
        datasets,
        mask,
        interpolate,
        fusion_mode,
        inter_depth,
        model,
        model_size,
        type_head="attentive",
        loss="l2_norm",
        use_date_enc=True,
        use_ema=False,
    ) -> None:
        super().__init__()
        assert (model, interpolate, type_head, use_date_enc) == ("mae", "nearest", "attentive", True)
        assert model_size in self.SIZES
        assert loss in ("l1", "l2", "l1_norm", "l2_norm")
        assert not inter_depth or fusion_mode in ("mod", "group")
        assert 1 - (1 - mask.mask_ratio) / 3**mask.mask_scale == 0.75
        assert (mask.mask_mod, mask.mask_bands, mask.mask_dates, mask.mask_loc) == (0.25, None, 0.25, 0.25)
        self.weights = {f"model.{name}": torch.empty(shape) for name, shape in datasets.items()}
        if use_ema:
            self.weights |= {f"ema_{name}": w.clone() for name, w in self.weights.items()}

    @classmethod
    def load_from_checkpoint(cls, path, strict, **given):
        """As Lightning's: hyper-parameters that the constructor takes, then the state."""
        content = torch.load(path, weights_only=False)
        taken = inspect.signature(cls).parameters
        module = cls(**{k: v for k, v in content["hyper_parameters"].items() if k in taken} | given)
        assert not strict
        assert content["state_dict"].keys() == module.weights.keys()
        for name, weight in module.weights.items():
            assert content["state_dict"][name].shape == weight.shape, name
            weight.copy_(content["state_dict"][name])
        return module

"""Galileo (Tseng et al., arXiv 2502.09356): a transformer over space, time and sensors, with its published weights.

Own implementation of its encoder, from the paper and the interface of the published weights
(github.com/nasaharvest/galileo, MIT).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maestro_scale.evaluation.baselines.protocol import JOINT, Images, SensorInput, check_options
from maestro_scale.evaluation.baselines.series import (
    MAX_STEPS,
    UNTRAINED,
    BandGroup,
    SeriesReader,
    cartesian,
    month_table,
    ndvi,
)
from maestro_scale.evaluation.baselines.transformer import (
    Block,
    initialise_linear,
    load_weights,
    num_blocks,
    read_weights,
)
from maestro_scale.evaluation.results import EvaluationError

_HEADS = {128: 8, 192: 3, 768: 12}  # by width, of the published nano, tiny and base; the weights do not tell
_KERNEL = 8  # pixels per side of the stored patch embeddings, and the largest patch
_BASE_RESOLUTION_M = 10.0
_NANO = (128, 4)  # width and depth without weights

# (mean, standard deviation) in the published units: dB, reflectance times 10,000, m and degrees.
_MOMENTS = {
    "VV": (-11.728724389184965, 4.887145774840316),
    "VH": (-18.85558188024017, 5.730270320384293),
    "B2": (1395.3408730676722, 917.7041440370853),
    "B3": (1338.4026921784578, 913.2988423581528),
    "B4": (1343.09883810357, 1092.678723527555),
    "B5": (1543.8607982512297, 1047.2206083460424),
    "B6": (2186.2022069512263, 1048.0101611156767),
    "B7": (2525.0932853316694, 1143.6903026819996),
    "B8": (2410.3377187373408, 1098.979177731649),
    "B8A": (2750.2854646886753, 1204.472755085893),
    "B11": (2234.911100061487, 1145.9774063078878),
    "B12": (1474.5311266077113, 980.2429840007796),
    "elevation": (673.0152819503361, 983.0697298296237),
    "slope": (5.930092668915115, 8.167406789813247),
}


def _group(name: str, *bands: str) -> BandGroup:
    """Values of two standard deviations below and above the mean become 0 and 1."""
    scale = 1e-4 if name.startswith("S2") else 1.0  # to reflectance
    moments = [_MOMENTS[b] for b in bands]
    return BandGroup(
        name,
        bands,
        tuple(scale * (mean - 2 * deviation) for mean, deviation in moments),
        tuple(scale * 4 * deviation for _, deviation in moments),
    )


GROUPS = (
    _group("S1", "VV", "VH"),
    _group("S2_RGB", "B2", "B3", "B4"),
    _group("S2_Red_Edge", "B5", "B6", "B7"),
    _group("S2_NIR_10m", "B8"),
    _group("S2_NIR_20m", "B8A"),
    _group("S2_SWIR", "B11", "B12"),
    BandGroup("NDVI", ("B8", "B4"), (0.0, 0.0), (1.0, 1.0)),
)
_TERRAIN = _group("SRTM", "elevation", "slope")
# Channels of the groups that our datasets do not have; the published weights do.
_SPACE = {"SRTM": 2, "DW": 9, "WC": 5}
_TIME = {"ERA5": 2, "TC": 3, "VIIRS": 1}
_STATIC = {"LS": 1, "location": 3, "DW_static": 9, "WC_static": 5}


class _FlexibleEmbed(nn.Module):
    """A patch embedding whose kernel is resized to the patch: by the pseudo-inverse of bicubic resizing (FlexiViT,
    arXiv 2212.08013, section 3)."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, _KERNEL, _KERNEL)

    def forward(self, x: Tensor, patch: int, resize: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, H/P, W/P, E); ``resize``: of ``_kernel_resize``."""
        kernel = (self.proj.weight.flatten(2) @ resize.T).unflatten(-1, (patch, patch))
        return F.conv2d(x, kernel, self.proj.bias, stride=patch).permute(0, 2, 3, 1)


class GalileoNetwork(nn.Module):
    """The encoder, with the parameter names of the published weights; queries, keys and values are one layer."""

    pos_embed: Tensor
    resize: Tensor

    def __init__(self, width: int, depth: int, heads: int, patch: int) -> None:
        super().__init__()
        quarter = width // 4
        self.patch, self.quarter = patch, quarter
        self.space_time_embed = nn.ModuleDict(
            {g.name: _FlexibleEmbed(1 if g.name == "NDVI" else len(g.bands), width) for g in GROUPS}
        )
        self.space_embed = nn.ModuleDict({n: _FlexibleEmbed(c, width) for n, c in _SPACE.items()})
        self.time_embed = nn.ModuleDict({n: nn.Linear(c, width) for n, c in _TIME.items()})
        self.static_embed = nn.ModuleDict({n: nn.Linear(c, width) for n, c in _STATIC.items()})
        self.s_t_channel_embed = nn.Parameter(torch.zeros(len(GROUPS), quarter))
        self.sp_channel_embed = nn.Parameter(torch.zeros(len(_SPACE), quarter))
        self.t_channel_embed = nn.Parameter(torch.zeros(len(_TIME), quarter))
        self.st_channel_embed = nn.Parameter(torch.zeros(len(_STATIC), quarter))
        self.blocks = nn.ModuleList(Block(width, heads, 4 * width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.register_buffer("pos_embed", _sincos(torch.arange(MAX_STEPS).float(), quarter))
        self.month_embed = nn.Embedding.from_pretrained(month_table(quarter), freeze=True)
        self.register_buffer("resize", _kernel_resize(patch), persistent=False)

    def forward(
        self,
        groups: Mapping[str, Tensor],
        months: Tensor,
        resolution_m: float,
        valid: Mapping[str, Tensor] | None = None,
        terrain: Tensor | None = None,
        xyz: Tensor | None = None,
    ) -> Tensor:
        """(B, L, E): per patch the mean of the tokens of all groups and dates.

        ``groups``: (B, T, C, H, W) by name; ``months``: (B, T); ``resolution_m``: of a pixel; ``valid``: by name
        (B, T), and ``location`` (B,), a group that is not in it is valid; ``terrain``: (B, 2, H, W); ``xyz``: (B, 3).
        """
        valid = valid or {}
        size, steps = months.shape
        side = next(iter(groups.values())).shape[-1] // self.patch
        space = self._space(side, resolution_m, months.device)
        month = self.month_embed(months)
        tokens, masks = [], []  # of each group (B, L, n, E) and (B, n)
        for number, g in enumerate(GROUPS):
            if g.name not in groups:
                continue
            x = self.space_time_embed[g.name](groups[g.name].flatten(0, 1), self.patch, self.resize)
            x = x.flatten(1, 2).unflatten(0, (size, steps)).transpose(1, 2)  # (B, L, T, E)
            shape = (size, side**2, steps, -1)
            encoding = [
                self.s_t_channel_embed[number].expand(*shape),
                self.pos_embed[:steps].expand(*shape),
                month[:, None].expand(*shape),
                space[None, :, None].expand(*shape),
            ]
            tokens.append(x + torch.cat(encoding, dim=-1))
            masks.append(valid.get(g.name))
        if terrain is not None:
            x = self.space_embed["SRTM"](terrain, self.patch, self.resize).flatten(1, 2)
            zeros = torch.zeros(side**2, 2 * self.quarter, device=x.device)
            encoding = [self.sp_channel_embed[0].expand(side**2, -1), zeros, space]
            tokens.append((x + torch.cat(encoding, dim=-1))[:, :, None])
            masks.append(None)
        return self._pool(tokens, masks, xyz, valid.get("location"))

    def _pool(
        self, tokens: list[Tensor], masks: list[Tensor | None], xyz: Tensor | None, known: Tensor | None
    ) -> Tensor:
        """The transformer over all tokens, then the mean per patch, with the location in every patch."""
        x = torch.cat(tokens, dim=2)
        size, num_patches, per_patch, _ = x.shape
        mask = torch.cat(
            [
                x.new_ones(size, t.shape[2], dtype=torch.bool) if m is None else m
                for t, m in zip(tokens, masks, strict=True)
            ],
            dim=1,
        )
        sequence = x.flatten(1, 2)
        attended = mask[:, None].expand(-1, num_patches, -1).flatten(1)
        if xyz is not None:
            zeros = torch.zeros(3 * self.quarter, device=x.device)
            location = self.static_embed["location"](xyz) + torch.cat([self.st_channel_embed[1], zeros])
            sequence = torch.cat([sequence, location[:, None]], dim=1)
            known = torch.ones_like(mask[:, 0]) if known is None else known
            attended = torch.cat([attended, known[:, None]], dim=1)
        for block in self.blocks:
            sequence = block(sequence, attended)
        sequence = self.norm(sequence)
        weights = mask.to(x)[:, None, :, None]
        total = (sequence[:, : num_patches * per_patch].unflatten(1, (num_patches, per_patch)) * weights).sum(
            dim=2
        )
        count = weights.sum(dim=2)
        if xyz is not None and known is not None:
            share = known.to(x)[:, None, None]
            total, count = total + sequence[:, -1:] * share, count + share
        return total / count.clamp_min(1)

    def _space(self, side: int, resolution_m: float, device: torch.device) -> Tensor:
        """(L, E/4): the place of every patch, in patches times their extent in units of 10 m."""
        at = torch.arange(side, device=device).float() * (resolution_m * self.patch / _BASE_RESOLUTION_M)
        half = self.quarter // 2
        columns, rows = _sincos(at.repeat(side), half), _sincos(at.repeat_interleave(side), half)
        return torch.cat([columns, rows], dim=1)


class Galileo(nn.Module):
    """Galileo as an external encoder: patches of the main sensor's pixels; R = 1, key ``JOINT``.

    Options: ``weights``: path of the published ``encoder.pt``, or ``untrained`` (nano); ``dates``: as of SeriesReader;
    ``patch``: pixels per side of a patch, 1 to 8 (default: the sensor's).
    """

    def __init__(self, sensors: Mapping[str, SensorInput], options: Mapping[str, str]) -> None:
        super().__init__()
        check_options(options, ("weights", "dates", "patch"))
        self._reader = SeriesReader(sensors, GROUPS, options.get("dates", "auto"))
        main = self._reader.main
        patch = _patch(main, options.get("patch"))
        self._size, self._resolution_m = main.size, main.resolution_m
        if options["weights"] == UNTRAINED:
            self.width, depth = _NANO
            self.network = GalileoNetwork(self.width, depth, _HEADS[self.width], patch)
            self.reinitialise()
        else:
            path = Path(options["weights"])
            state = _with_fused_attention(read_weights(path))
            self.width = len(state.get("norm.weight", ()))
            if self.width not in _HEADS:
                raise EvaluationError(f"{path}: is not the weights of Galileo's encoder (nano, tiny or base)")
            self.network = GalileoNetwork(self.width, num_blocks(state), _HEADS[self.width], patch)
            load_weights(self.network, state, path, "Galileo's encoder")
        elevation = self._reader.elevation
        terrain = [elevation[0].name] if elevation else []
        self.adaptation = (
            f"Galileo: {self._reader.describe(sensors.values(), terrain)}; "
            f"{f'SRTM from {terrain[0]}; ' if terrain else ''}groups that the dataset lacks are left out; images of "
            f"{self._size}x{self._size} pixels of {self._resolution_m:g} m (others averaged or repeated), patches of "
            f"{patch}x{patch}; coordinates of the tile, masked where the shards have none"
        )

    def tokens(self, images: Images) -> dict[str, Tensor]:
        """{JOINT: (B, 1, L, E)}."""
        reader, groups, valid = self._reader, {}, {}
        for name in reader.found:
            series = reader.read(images, name, self._size)
            groups[name] = ndvi(series.values) if name == "NDVI" else series.values
            if series.valid is not None:
                valid[name] = series.valid
        terrain = reader.terrain(images, self._size, self._size * self._resolution_m)
        xyz, valid["location"] = cartesian(images.latlon)
        tokens = self.network(
            groups,
            reader.months(images),
            self._resolution_m,
            valid,
            None if terrain is None else _TERRAIN.normalised(terrain),
            xyz,
        )
        return {JOINT: tokens[:, None]}

    def reinitialise(self) -> None:
        """Random initial weights, as in the original code."""
        initialise_linear(self.network)
        for name, parameter in self.network.named_parameters():
            if name.endswith("channel_embed"):
                nn.init.zeros_(parameter)


def _patch(sensor: SensorInput, option: str | None) -> int:
    """Pixels per side of a patch. EvaluationError where it does not fit the sensor."""
    text = option if option is not None else str(sensor.size // sensor.grid)
    patch = int(text) if text.isdecimal() else 0
    if not 1 <= patch <= _KERNEL or sensor.size % patch:
        raise EvaluationError(
            f"a patch of {text} pixels: sensor {sensor.name} has {sensor.size}x{sensor.size} pixels; use a divisor, at "
            f"most {_KERNEL}: patch=N"
        )
    return patch


def _with_fused_attention(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published state dict with the layers q, k and v of each block as one, and without ``.backbone`` in names."""
    plain = {name.replace(".backbone", ""): tensor for name, tensor in state.items()}
    fused = {}
    for name, tensor in plain.items():
        if ".attn.q." in name:
            parts = [plain.get(name.replace(".attn.q.", f".attn.{letter}.")) for letter in "qkv"]
            fused[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat([p for p in parts if p is not None])
        elif ".attn.k." not in name and ".attn.v." not in name:
            fused[name] = tensor
    return fused


def _kernel_resize(patch: int) -> Tensor:
    """(P², 64): maps a kernel of 8x8 to one of PxP that gives on resized patches what the kernel gave before."""
    if patch == _KERNEL:
        return torch.eye(_KERNEL**2)
    basis = torch.eye(_KERNEL**2).view(-1, 1, _KERNEL, _KERNEL)
    resized = F.interpolate(basis, (patch, patch), mode="bicubic", antialias=True)
    return torch.linalg.pinv(resized.flatten(1))


def _sincos(positions: Tensor, width: int) -> Tensor:
    """(n, width): sines, then cosines. The rates of the published model are 10000^-(i / 2·width), i < width / 2."""
    rates = 10000.0 ** -(torch.arange(width // 2, device=positions.device) / width / 2.0)
    angles = positions[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)

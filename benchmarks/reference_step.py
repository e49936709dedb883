"""A MAESTRO step as the reference implementation computes it, for comparison: the same parameters, the same loss.

It differs from ``maestro_scale.model`` only in the computation. Masks are drawn on the host, sensor by sensor, until no
sequence is masked completely. Patches are convolutions with GroupNorm. Positions are pooled from the fine position grid
in every forward pass. Attention is multiplication, scaling, softmax and multiplication. Pixels are predicted, masked by
a boolean image and selected. Written from the published description; it contains no code of the reference.

Shapes: B batch, D dates, G token groups, R = G*D token grids, L tokens per grid, E width, P patch side, C bands.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from maestro_scale.datasets.spec import Sensor
from maestro_scale.model.embed import MaskTokens, PatchEmbed, network_input
from maestro_scale.model.encodings import date_encoding
from maestro_scale.model.maestro import Maestro
from maestro_scale.model.masking import MaskingConfig, num_masked
from maestro_scale.model.sequences import Sequence, pack, sequences, unpack
from maestro_scale.model.targets import target_groups
from maestro_scale.model.transformer import Block, Transformer
from maestro_scale.stream.batch import Batch

Grids = dict[str, Tensor]


def reference_loss(
    model: Maestro, batch: Batch, masking: MaskingConfig, hidden: Grids | None = None
) -> Tensor:
    """The pretraining loss of ``batch``; scalar. ``hidden``: masks (rows, N) by sequence; None: drawn."""
    view = model.view(batch.dataset)
    images = {s.name: network_input(s, batch.pixels[s.name]) for s in view.sensors}
    tokens = {s.name: _embed(model, s, images[s.name]) for s in view.sensors}
    tokens = {s.name: tokens[s.name] + _encoding(model, "enc", s, batch) for s in view.sensors}
    hidden = hidden if hidden is not None else host_masks(model, batch, masking)
    device = batch.ref_date.device
    encoded: Grids = {}
    order: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    for q in sequences(view):
        mask = hidden[q.name].to(device)
        hidden_first = mask.float().argsort(dim=1, descending=True, stable=True)
        num_masked = int(mask[0].sum())
        visible, _ = hidden_first[:, num_masked:].sort(dim=1)
        rows = torch.arange(len(mask), device=device)[:, None]
        encoded[q.name] = _run(model.encoders[q.encoder], pack(q, tokens)[rows, visible])
        order[q.name] = hidden_first[:, :num_masked].sort(dim=1).values, visible, rows
    if model.inter is not None:
        joined = _run(model.inter, torch.cat(list(encoded.values()), dim=1))
        encoded = dict(zip(encoded, joined.split([x.shape[1] for x in encoded.values()], dim=1), strict=True))
    losses, weights = [], []
    for q in sequences(view):
        decoded = _decode(model, q, encoded[q.name], order[q.name], batch)
        grids = unpack(view, q, decoded)
        masked = unpack(view, q, hidden[q.name].to(device))
        for s in q.sensors:
            predicted = _pixels(model, s, grids[s.name])
            pixel_mask = _pixel_mask(model, s, masked[s.name])
            error = _target(model, s, images[s.name]) - predicted
            error = error.abs() if view.loss == "l1" else error.square()
            weights.append(s.num_dates * s.grid**2)
            losses.append(weights[-1] * torch.masked_select(error, pixel_mask).mean())
    return torch.stack(losses).sum() / sum(weights)


def host_masks(model: Maestro, batch: Batch, masking: MaskingConfig) -> Grids:
    """Masks drawn on the host; {sequence: (rows, N) bool}."""
    view, size = model.view(batch.dataset), len(batch)
    structure: Grids = {}
    redraw = True
    while redraw:
        drawn = {}
        for q in sequences(view):
            for s in q.sensors:
                groups = len(view.token_groups(s))
                mask = torch.zeros(size, groups, s.num_dates, s.grid**2, dtype=torch.bool)
                if len(q.sensors) > 1:
                    mask |= torch.rand(size, 1, 1, 1) < masking.modality
                if s.num_dates > 1:
                    mask |= torch.rand(size, 1, s.num_dates, 1) < masking.date
                mask |= torch.rand(size, 1, 1, s.grid**2) < masking.location
                drawn[s.name] = mask.flatten(1, 2)
        redraw = False
        for q in sequences(view):
            fresh = pack(q, drawn)
            old = structure.get(q.name, torch.ones_like(fresh))
            structure[q.name] = torch.where(old.all(dim=1, keepdim=True), fresh, old)
            redraw |= bool(structure[q.name].all(dim=1).any())
    hidden = {}
    for name, mask in structure.items():
        noise = torch.rand(mask.shape) * (1 - mask.float())
        ranks = noise.argsort(dim=1).argsort(dim=1)
        hidden[name] = ranks < num_masked(masking.ratio, mask.shape[1])
    return hidden


def _embed(model: Maestro, sensor: Sensor, image: Tensor) -> Tensor:
    groups = model.config.token_groups(sensor)
    embeds = [m for m in model.patch_embed[sensor.embed].children() if isinstance(m, PatchEmbed)]
    parts = []
    for embed, bands in zip(embeds, image.split(list(groups), dim=2), strict=True):
        x = rearrange(bands, "b d c h w -> (b d) c h w").to(embed.proj.weight.dtype)
        kernel = embed.proj.weight.view(-1, x.shape[1], sensor.patch, sensor.patch)
        x = F.conv2d(x, kernel, embed.proj.bias, stride=sensor.patch)
        if model.config.norm == "group":
            x = F.group_norm(x, 1, embed.norm.weight, embed.norm.bias)
        x = rearrange(x, "(b d) e h w -> b d (h w) e", d=sensor.num_dates)
        parts.append(x if model.config.norm == "group" else embed.norm(x))
    return torch.cat(parts, dim=1)


def _encoding(model: Maestro, role: str, sensor: Sensor, batch: Batch) -> Tensor:
    """Position and date encoding, pooled from the fine grid; (B, R, L, width)."""
    view = model.view(batch.dataset)
    fine = model.positions[role].get(view.pos_grid, view.pos_grid, batch.ref_date)
    image = rearrange(fine, "(h w) e -> 1 e h w", h=view.pos_grid)
    if view.pos_grid % sensor.grid:
        side = sensor.grid * max(round(view.pos_grid / sensor.grid), 1)
        image = F.interpolate(image, size=(side, side), mode="bilinear")
    place = rearrange(F.avg_pool2d(image, image.shape[-1] // sensor.grid), "1 e h w -> 1 1 (h w) e")
    when = date_encoding(batch.dates[sensor.name], batch.ref_date)
    when = when.repeat(1, len(view.token_groups(sensor)), 1)[:, :, None]
    return place + F.pad(when, (place.shape[-1] - when.shape[-1], 0))


def _run(stack: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(stack, Transformer)
    for block in stack.blocks:
        assert isinstance(block, Block)
        x = x + _attention(block, block.attn_norm(x))
        x = x + block.down(F.gelu(block.up(block.mlp_norm(x))))
    return stack.norm(x)


def _attention(block: Block, x: Tensor) -> Tensor:
    q, k, v = (
        rearrange(part, "b n (h d) -> b h n d", h=block.attn.heads)
        for part in block.attn.qkv(x).chunk(3, dim=-1)
    )
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)
    return block.attn.out(rearrange(weights @ v, "b h n d -> b n (h d)"))


def _decode(
    model: Maestro, q: Sequence, encoded: Tensor, order: tuple[Tensor, Tensor, Tensor], batch: Batch
) -> Tensor:
    masked, visible, rows = order
    blanks = {}
    for s in q.sensors:
        token = model.mask_token[s.name]
        assert isinstance(token, MaskTokens)
        vectors = token.vectors.repeat_interleave(s.num_dates, dim=0)
        blanks[s.name] = vectors[None, :, None].expand(len(batch), -1, s.grid**2, -1)
    blank = pack(q, blanks)
    seen = model.to_decoder[q.encoder](encoded)
    x = torch.zeros(*blank.shape, dtype=seen.dtype, device=seen.device)
    x[rows, masked] = blank[rows, masked].to(seen.dtype)
    x[rows, visible] = seen
    x = x + pack(q, {s.name: _encoding(model, "dec", s, batch) for s in q.sensors}).to(x.dtype)
    return _run(model.decoders[q.encoder], x)


def _pixels(model: Maestro, sensor: Sensor, grids: Tensor) -> Tensor:
    groups = model.config.token_groups(sensor)
    linears = [m for m in model.to_pixels[sensor.embed].children() if isinstance(m, nn.Linear)]
    parts = []
    for linear, tokens in zip(linears, grids.chunk(len(groups), dim=1), strict=True):
        x = rearrange(tokens, "b d (h w) e -> (b d) e h w", h=sensor.grid)
        x = F.conv2d(x, linear.weight[:, :, None, None], linear.bias)
        x = rearrange(x, "n (p q c) h w -> n c (h p) (w q)", p=sensor.patch, q=sensor.patch)
        parts.append(rearrange(x, "(b d) c h w -> b d c h w", d=sensor.num_dates))
    return torch.cat(parts, dim=2)


def _pixel_mask(model: Maestro, sensor: Sensor, hidden: Tensor) -> Tensor:
    groups = model.config.token_groups(sensor)
    parts = [
        repeat(m, "b d (h w) -> b d c (h p) (w q)", h=sensor.grid, c=c, p=sensor.patch, q=sensor.patch)
        for m, c in zip(hidden.chunk(len(groups), dim=1), groups, strict=True)
    ]
    return torch.cat(parts, dim=2)


def _target(model: Maestro, sensor: Sensor, image: Tensor) -> Tensor:
    p = sensor.patch
    patches = rearrange(image, "b d c (h p) (w q) -> b d (h w) (p q) c", p=p, q=p)
    parts = []
    for part in patches.split(list(target_groups(model.config, sensor) or [patches.shape[-1]]), dim=-1):
        if target_groups(model.config, sensor):
            mean, var = part.mean(dim=(-2, -1), keepdim=True), part.var(dim=(-2, -1), keepdim=True)
            part = (part - mean) / (var + 1e-6) ** 0.5
        parts.append(part)
    return rearrange(
        torch.cat(parts, dim=-1), "b d (h w) (p q) c -> b d c (h p) (w q)", h=sensor.grid, p=p, q=p
    )

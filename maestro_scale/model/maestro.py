"""The MAESTRO network: a masked autoencoder for multimodal, multitemporal tiles (arXiv 2508.10894).

The model is a pure function of its weights and the batch; random numbers come with the batch (``Batch.noise``). Order
of a forward pass: network input, patches, patch embedding and encodings, selection of the visible tokens, one encoder
per sequence, inter-group blocks over all sequences, one decoder per sequence, error sums over the masked pixels.

Shapes: B batch, D dates, G token groups, R = G*D token grids, L tokens per grid, E width, P patch side, C bands.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from maestro_scale.datasets.spec import Sensor, Target, Tile
from maestro_scale.model.config import ModelConfig
from maestro_scale.model.embed import MaskTokens, PatchEmbed, network_input, patchify
from maestro_scale.model.encodings import PositionTables, token_encoding
from maestro_scale.model.heads import build_head
from maestro_scale.model.initialise import initialise
from maestro_scale.model.masking import Mask, masks_by_sensor
from maestro_scale.model.sequences import pack, sequences, unpack
from maestro_scale.model.targets import combine_losses, error_sum
from maestro_scale.model.transformer import Transformer, gather_tokens
from maestro_scale.stream.batch import Batch
from maestro_scale.stream.tile import tile_batch


@dataclass(frozen=True)
class Embedding:
    """``tokens[sensor]``: (B, R, L, E). ``vector``: (B, S*E), the mean tokens of the S sensors given, concatenated in
    the model's order."""

    tokens: dict[str, Tensor]
    vector: Tensor


class Maestro(nn.Module):
    """The autoencoder with its heads. Parameters are NaN until ``initialise(seed)`` is called or weights are loaded, so
    that a forgotten one shows in the first loss."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self._views = {v.dataset: config.for_dataset(v.dataset) for v in config.views}
        size = config.size
        encoders = dict.fromkeys(q.encoder for view in self._views.values() for q in sequences(view))

        def encoder(depth: int) -> Transformer:
            return Transformer(
                size.width,
                depth,
                size.heads,
                size.dim_head,
                size.width * size.mlp_ratio,
                recompute_every=config.recompute_every,
                backend=config.attention,
            )

        def decoder() -> Transformer:
            return Transformer(
                size.decoder_width,
                size.decoder_depth,
                size.decoder_heads,
                size.decoder_dim_head,
                size.width * size.decoder_mlp_ratio,
                recompute_every=config.recompute_every,
                backend=config.attention,
            )

        # Sensors of several datasets share weights by these names.
        by_embed = {s.embed: s for s in config.all_sensors}
        by_name = {s.name: s for s in config.all_sensors}
        self.patch_embed = nn.ModuleDict(
            {
                name: nn.ModuleList(
                    PatchEmbed(c, s.patch, size.width, config.norm) for c in config.token_groups(s)
                )
                for name, s in by_embed.items()
            }
        )
        self.encoders = nn.ModuleDict({name: encoder(size.depth - config.inter_depth) for name in encoders})
        self.inter = encoder(config.inter_depth) if config.inter_depth else None
        same = size.width == size.decoder_width  # the authors' model has no projection then
        self.to_decoder = nn.ModuleDict(
            {name: nn.Identity() if same else nn.Linear(size.width, size.decoder_width) for name in encoders}
        )
        self.mask_token = nn.ModuleDict(
            {n: MaskTokens(len(config.token_groups(s)), size.decoder_width) for n, s in by_name.items()}
        )
        self.decoders = nn.ModuleDict({name: decoder() for name in encoders})
        self.to_pixels = nn.ModuleDict(
            {
                name: nn.ModuleList(
                    nn.Linear(size.decoder_width, s.patch**2 * c) for c in config.token_groups(s)
                )
                for name, s in by_embed.items()
            }
        )
        self.heads = nn.ModuleDict({t.name: self._head(t) for t in config.heads})
        self.positions = {
            "enc": PositionTables(size.width),
            "dec": PositionTables(size.decoder_width),
        }
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.fill_(math.nan)

    # -- building ------------------------------------------------------------------------------------------------

    def _head(self, target: Target) -> nn.Module:
        ref = next((s for s in self.config.sensors if s.name == self.config.ref_sensor), None)
        side = self.config.target_side(target) if target.kind == "segmentation" else 0
        return build_head(target, self.config.size.width, self.config.pool, ref, side)

    def compile_blocks(self, backend: str = "inductor") -> Maestro:
        """Compile each block with ``torch.compile`` at its first call; returns itself.

        Per block, not the whole model: blocks of equal shapes share their compiled code, so compilation stays short.
        """
        for stack in self.modules():
            if isinstance(stack, Transformer):
                for block in stack.blocks:
                    block.compile(backend=backend)
        return self

    def initialise(self, seed: int) -> Maestro:
        """Fill every parameter as :func:`maestro_scale.model.initialise.initialise` does; returns itself."""
        initialise(self, seed)
        return self

    # -- encoding ------------------------------------------------------------------------------------------------

    def encode(self, batch: Batch, masks: dict[str, Mask] | None = None) -> dict[str, Tensor]:
        """Encoded tokens: {sensor: (B, R, L, E)}; with masks the visible ones only, {sequence: (rows, K, E)}."""
        view = self.view(batch.dataset)
        inputs = self._patches(view, batch.pixels)
        return self._encode(view, inputs, batch.dates, batch.ref_date, masks)

    def view(self, dataset: str) -> ModelConfig:
        """The configuration for ``dataset``; KeyError if a model of several datasets does not know it."""
        return self._views.get(dataset) or self.config.for_dataset(dataset)

    def _patches(self, view: ModelConfig, pixels: dict[str, Tensor]) -> dict[str, Tensor]:
        return {s.name: patchify(network_input(s, pixels[s.name]), s.patch) for s in view.sensors}

    def _encode(
        self,
        view: ModelConfig,
        patches: dict[str, Tensor],
        dates: dict[str, Tensor],
        ref_date: Tensor,
        masks: dict[str, Mask] | None,
    ) -> dict[str, Tensor]:
        tokens = {
            s.name: self._embed(view, s, patches[s.name], dates[s.name], ref_date) for s in view.sensors
        }
        encoded = {}
        for q in sequences(view):
            x = pack(q, tokens)
            if masks is not None:
                x = gather_tokens(x, masks[q.name].visible_index)
            encoded[q.name] = self.encoders[q.encoder](x)
        if self.inter is not None:
            mixed = self.inter(torch.cat(list(encoded.values()), dim=1))
            parts = mixed.split([x.shape[1] for x in encoded.values()], dim=1)
            encoded = dict(zip(encoded, parts, strict=True))
        if masks is not None:
            return encoded
        return {k: v for q in sequences(view) for k, v in unpack(view, q, encoded[q.name]).items()}

    def _embed(
        self, view: ModelConfig, sensor: Sensor, patches: Tensor, dates: Tensor, ref_date: Tensor
    ) -> Tensor:
        groups = view.token_groups(sensor)
        parts = patches.split(list(groups), dim=-1)
        embeds = cast(nn.ModuleList, self.patch_embed[sensor.embed])  # ModuleDict is typed for plain Modules
        # Encodings are computed in fp32 and cast once, to the dtype of the tokens.
        tokens = torch.cat([e(p) for e, p in zip(embeds, parts, strict=True)], dim=1)
        return tokens + self._encoding("enc", view, sensor, dates, ref_date).to(tokens.dtype)

    def _encoding(
        self, role: str, view: ModelConfig, sensor: Sensor, dates: Tensor, ref_date: Tensor
    ) -> Tensor:
        table = self.positions[role].get(sensor.grid, view.pos_grid, dates.device)
        return token_encoding(table, dates, ref_date, len(view.token_groups(sensor)))

    # -- reconstructing ------------------------------------------------------------------------------------------

    def reconstruct(self, batch: Batch, masks: dict[str, Mask]) -> dict[str, Tensor]:
        """{sensor: (B, D, L, P*P, C)}: predictions for every patch, in the units of the (normalised) target."""
        view = self.view(batch.dataset)
        inputs = self._patches(view, batch.pixels)
        encoded = self._encode(view, inputs, batch.dates, batch.ref_date, masks)
        return self._decode(view, encoded, batch.dates, batch.ref_date, masks)

    def _decode(
        self,
        view: ModelConfig,
        encoded: dict[str, Tensor],
        dates: dict[str, Tensor],
        ref_date: Tensor,
        masks: dict[str, Mask],
        masked_only: bool = False,
    ) -> dict[str, Tensor]:
        """Predictions by sensor. ``masked_only``: those of visible tokens are not computed, and undefined."""
        predictions = {}
        for q in sequences(view):
            mask = masks[q.name]
            visible = self.to_decoder[q.encoder](encoded[q.name])
            mask_tokens = pack(
                q, {s.name: self.mask_token[s.name](len(ref_date), s.num_dates, s.grid**2) for s in q.sensors}
            ).to(visible.dtype)
            index = mask.visible_index[:, :, None].expand(-1, -1, visible.shape[-1])
            # scatter, not boolean indexing: static shapes and no host synchronisation (invariant 11).
            x = mask_tokens.scatter(1, index, visible)
            x = x + pack(
                q, {s.name: self._encoding("dec", view, s, dates[s.name], ref_date) for s in q.sensors}
            ).to(x.dtype)
            if masked_only and mask.masked_index.shape[1]:
                # The loss needs masked tokens only: the last block skips the queries and MLP of the others.
                decoded = self.decoders[q.encoder](x, mask.masked_index)
                index = mask.masked_index[:, :, None].expand(-1, -1, decoded.shape[-1])
                decoded = decoded.new_zeros(x.shape).scatter(1, index, decoded)
            else:
                decoded = self.decoders[q.encoder](x)
            for name, tokens in unpack(view, q, decoded).items():
                predictions[name] = self._to_pixels(next(s for s in q.sensors if s.name == name), tokens)
        return {s.name: predictions[s.name] for s in view.sensors}

    def _to_pixels(self, sensor: Sensor, tokens: Tensor) -> Tensor:
        groups = self.config.token_groups(sensor)
        parts = tokens.chunk(len(groups), dim=1)
        linears = cast(nn.ModuleList, self.to_pixels[sensor.embed])
        pixels = [
            linear(t).unflatten(-1, (sensor.patch**2, c))
            for linear, t, c in zip(linears, parts, groups, strict=True)
        ]
        return torch.cat(pixels, dim=-1)

    # -- loss ----------------------------------------------------------------------------------------------------

    def forward(self, batch: Batch, masks: dict[str, Mask], counts: Tensor) -> tuple[Tensor, Tensor]:
        """This batch's share of the global loss, and its error sums (S,) per sensor, in fp32.

        ``counts`` (S,): masked values of each sensor in the whole *global* batch. As each part is divided by global
        counts, the shares of all micro-batches and ranks add up to the same loss, however the batch is split
        (invariant 4); a mean of means would depend on the split.
        """
        view = self.view(batch.dataset)
        return self.loss_of_tensors(view, batch.pixels, batch.dates, batch.ref_date, masks, counts)

    def loss_of_tensors(
        self,
        view: ModelConfig,
        pixels: dict[str, Tensor],
        dates: dict[str, Tensor],
        ref_date: Tensor,
        masks: dict[str, Mask],
        counts: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """``forward`` without the batch's host data (keys, names): a function of the view and tensors of static shapes
        only, so that it can be compiled as one graph."""
        patches = self._patches(view, pixels)
        encoded = self._encode(view, patches, dates, ref_date, masks)
        predictions = self._decode(view, encoded, dates, ref_date, masks, masked_only=True)
        masked = masks_by_sensor(view, masks)
        sums = torch.stack(
            [error_sum(view, s, predictions[s.name], patches[s.name], masked[s.name]) for s in view.sensors]
        )
        # The sums are for metrics; detached, so that keeping them does not keep the graph.
        return combine_losses(view, sums, counts), sums.detach()

    def loss(self, dataset: str, sums: Tensor, counts: Tensor) -> Tensor:
        """The loss (or a part's share of it) from error sums (S,) and the ``counts`` (S,) of the global batch; fp32."""
        return combine_losses(self.view(dataset), sums, counts)

    def embed(
        self, data: Batch | Tile, crop_m: float | None = None, tile_m: float | None = None
    ) -> Embedding:
        """Embeddings of a batch or a tile, without masks: token grids per sensor, one vector per sample.

        Sensors may be missing, and a sensor may have any number of dates. ``crop_m``: ground extent of the images in
        metres, if it is not that of training. ``tile_m``: extent of a tile, whose central ``crop_m`` are used (None:
        the tile has the extent of training).

        Raises:
            ValueError: the model does not support a sensor, its bands or the extent; the message says what it does.
            DatasetError: the tile has no data for the model.
        """
        if isinstance(data, Tile):
            view = self.view(self.config.dataset)
            share = 1.0 if tile_m is None else (crop_m or view.crop_m or tile_m) / tile_m
            data = tile_batch(data, view.sensors, self.config.dataset, min(share, 1.0))
            data = data.to(next(self.parameters()).device)
        view = self.view(data.dataset).adapted_to({k: tuple(v.shape) for k, v in data.pixels.items()}, crop_m)
        tokens = self._encode(view, self._patches(view, data.pixels), data.dates, data.ref_date, None)
        return Embedding(tokens, torch.cat([t.mean(dim=(1, 2)) for t in tokens.values()], dim=1))

    def predict(self, batch: Batch) -> dict[str, Tensor]:
        """{target: logits} of all heads."""
        tokens = self.encode(batch)
        return {name: head(tokens) for name, head in self.heads.items()}

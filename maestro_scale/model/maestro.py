"""The MAESTRO network: a masked autoencoder for multimodal, multitemporal tiles (arXiv 2508.10894).

The model is a pure function of its weights and the batch; random numbers come with the batch (``Batch.noise``). Order
of a forward pass: network input, patches, patch embedding and encodings, selection of the visible tokens, one encoder
per sequence, inter-group blocks over all sequences, one decoder per sequence, error sums over the masked pixels.

Shapes: B batch, D dates, G token groups, R = G*D token grids, L tokens per grid, E width, P patch side, C bands.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maestro_scale.datasets.spec import Target, Tile
from maestro_scale.model.compiled import Backend, CompiledStep, compiled_block
from maestro_scale.model.config import CompileMode, ModelConfig
from maestro_scale.model.constants import ConstantCache
from maestro_scale.model.decoders import DECODERS, build_head
from maestro_scale.model.embed import (
    MaskTokens,
    PatchEmbed,
    PatchEmbeddings,
    PixelProjections,
    Projections,
    input_patches,
)
from maestro_scale.model.encodings import PositionTables
from maestro_scale.model.finetuned import (
    Finetuned,
    Prediction,
    assembled,
    crops_of,
    label_factor,
    predict_target,
    sized,
)
from maestro_scale.model.initialise import initialise
from maestro_scale.model.layout import Layout
from maestro_scale.model.masking import Mask, counted_by_sensor
from maestro_scale.model.sequences import Sequence, by_sensor, has_equal_patches, pack, sequences
from maestro_scale.model.targets import combine_losses, error_sum, masked_token_errors, weighted_loss
from maestro_scale.model.transformer import Block, Transformer, gather_tokens
from maestro_scale.stream.batch import Batch
from maestro_scale.stream.tensors import Pixels, tensors_batch
from maestro_scale.stream.tile import tile_batch

# Modules that read the parameters of their children. ZeRO 3 gathers parameters in hooks of each module's forward, so
# the engine has to register these parameters with the module.
GATHER_UNITS = (Block, PatchEmbeddings, Projections, PixelProjections)


@dataclass(frozen=True)
class Embedding:
    """``tokens[sensor]``: (B, R, L, E). ``vector``: (B, S*E), the mean tokens of the S sensors given, concatenated in
    the model's order."""

    tokens: dict[str, Tensor]
    vector: Tensor


class Maestro(nn.Module):
    """The autoencoder with its heads. Parameters are NaN until ``initialise(seed)`` is called or weights are loaded, so
    that a forgotten one shows in the first loss.

    ``decodes``: False for a finetuned network, which has no parameters to reconstruct pixels with.
    """

    def __init__(self, config: ModelConfig, decodes: bool = True) -> None:
        super().__init__()
        self.config = config
        self.finetuned: Finetuned | None = None
        self._views = {v.dataset: config.for_dataset(v.dataset) for v in config.views}
        self._compiled_step: CompiledStep | None = None
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
        self.patch_embed = PatchEmbeddings(
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
        self.to_decoder = Projections(
            {name: nn.Identity() if same else nn.Linear(size.width, size.decoder_width) for name in encoders}
        )
        self.mask_token = nn.ModuleDict(
            {n: MaskTokens(len(config.token_groups(s)), size.decoder_width) for n, s in by_name.items()}
        )
        self.decoders = nn.ModuleDict({name: decoder() for name in encoders})
        self.to_pixels = PixelProjections(
            {
                name: nn.ModuleList(
                    nn.Linear(size.decoder_width, s.patch**2 * c) for c in config.token_groups(s)
                )
                for name, s in by_embed.items()
            }
        )
        if not decodes:
            for unused in (self.to_decoder, self.mask_token, self.decoders, self.to_pixels):
                unused.clear()
        self.heads = nn.ModuleDict({t.name: self._head(t) for t in config.heads})
        self.positions = {
            "enc": PositionTables(size.width),
            "dec": PositionTables(size.decoder_width),
        }
        self._layouts: ConstantCache[Layout] = ConstantCache(8)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.fill_(math.nan)

    # -- building ------------------------------------------------------------------------------------------------

    def _head(self, target: Target) -> nn.Module:
        ref = next((s for s in self.config.sensors if s.name == self.config.ref_sensor), None)
        side = self.config.target_side(target) if target.is_map else 0
        names = [s.name for s in self.config.sensors]
        size, decoder, num_depths = self.config.size, self.config.decoder, len(self.head_depths)
        return build_head(target, size.width, self.config.pool, ref, side, decoder, names, num_depths)

    @property
    def head_depths(self) -> tuple[int, ...]:
        """The blocks whose tokens the heads read."""
        return DECODERS[self.config.decoder].depths(self.config.size.depth)

    def compile_training(
        self, mode: CompileMode, cuda_graphs: bool = False, backend: Backend = "inductor"
    ) -> Maestro:
        """Compile forward and backward pass of ``forward`` at the first calls, see docs/training.md; returns itself.

        Calls without gradients, and all other methods, run in eager mode: their shapes vary. ``cuda_graphs``: record
        the mode ``step`` as CUDA graphs.
        """
        if mode == "step":
            self._compiled_step = CompiledStep(cuda_graphs, backend)
        if mode == "blocks":
            block = compiled_block(backend)
            for stack in self.modules():
                if isinstance(stack, Transformer):
                    stack.compiled_block = block
        return self

    def initialise(self, seed: int) -> Maestro:
        """Fill every parameter as :func:`maestro_scale.model.initialise.initialise` does; returns itself."""
        initialise(self, seed)
        return self

    # -- encoding ------------------------------------------------------------------------------------------------

    def encode(self, batch: Batch, masks: dict[str, Mask] | None = None) -> dict[str, Tensor]:
        """Encoded tokens: {sensor: (B, R, L, E)}; with masks the visible ones only, {sequence: (rows, K, E)}."""
        view = self.view(batch.dataset)
        encoded = self._encode(
            self.layout(view, masks, batch.ref_date), batch.pixels, batch.dates, batch.ref_date, masks
        ).tokens
        return encoded if masks is not None else by_sensor(view, encoded)

    def view(self, dataset: str) -> ModelConfig:
        """The configuration for ``dataset``, or for its tiles that lack sensors; KeyError if a model of several
        datasets does not know it."""
        return self._views.get(dataset) or self.config.for_dataset(dataset)

    def layout(self, view: ModelConfig, masks: dict[str, Mask] | None, like: Tensor) -> Layout:
        """The constants of a forward pass, on the device of ``like``; they depend on the masks' shapes only."""
        visible = None if masks is None else tuple(m.visible_index.shape[1] for m in masks.values())
        return self._layouts.get((view, visible), like, lambda: Layout.of(view, self.positions, masks, like))

    def _encode(
        self,
        layout: Layout,
        pixels: dict[str, Tensor],
        dates: dict[str, Tensor],
        ref_date: Tensor,
        masks: dict[str, Mask] | None,
    ) -> _Encoded:
        packed, patches, order, date_rows = self._inputs(layout, pixels, dates, ref_date, masks)
        encoded = {q.name: self.encoders[q.encoder](packed[q.name]) for q in layout.sequences}
        if self.inter is not None:
            mixed = self.inter(torch.cat(list(encoded.values()), dim=1))
            parts = mixed.split([x.shape[1] for x in encoded.values()], dim=1)
            encoded = dict(zip(encoded, parts, strict=True))
        return _Encoded(encoded, patches, order, date_rows)

    def tokens_at_depths(
        self,
        layout: Layout,
        pixels: dict[str, Tensor],
        dates: dict[str, Tensor],
        ref_date: Tensor,
        depths: Items[int],
    ) -> list[dict[str, Tensor]]:
        """Tokens after the blocks ``depths`` (from 0, ascending), {sensor: (B, R, L, E)} each; no token is masked.

        Each is normalised as the last block of its stack is: those of block ``depth - 1`` are what ``encode`` returns.
        """
        packed = self._inputs(layout, pixels, dates, ref_date, None).tokens
        num_own = self.config.size.depth - self.config.inter_depth  # blocks before the inter-group ones
        # The inter-group blocks continue from the last of the others.
        own = [d for d in depths if d < num_own]
        needed = {*own, num_own - 1}
        stacks = {}
        for q in layout.sequences:
            stack = self.encoders[q.encoder]
            assert isinstance(stack, Transformer)
            stacks[q.name] = stack.at_depths(packed[q.name], needed)
        found = [
            {name: outputs[i] for name, outputs in stacks.items()}
            for i, d in enumerate(sorted(needed))
            if d in own
        ]
        if self.inter is not None and len(own) < len(depths):
            last = [outputs[-1] for outputs in stacks.values()]
            deeper = self.inter.at_depths(torch.cat(last, dim=1), {d - num_own for d in depths})
            sizes = [x.shape[1] for x in last]
            found += [dict(zip(stacks, x.split(sizes, dim=1), strict=True)) for x in deeper]
        return [by_sensor(layout.view, tokens) for tokens in found]

    def _inputs(
        self,
        layout: Layout,
        pixels: dict[str, Tensor],
        dates: dict[str, Tensor],
        ref_date: Tensor,
        masks: dict[str, Mask] | None,
    ) -> _Encoded:
        """The encoders' inputs: embedded patches with their encodings."""
        patches = {s.name: input_patches(s, pixels[s.name]) for s in layout.view.sensors}
        tokens = self.patch_embed(layout.view, patches)
        order = None if masks is None else layout.order(masks)
        date_rows = layout.date_rows(dates, ref_date, order)
        packed = {}
        for q in layout.sequences:
            x = pack(q, tokens)
            packed[q.name] = x if masks is None else gather_tokens(x, masks[q.name].visible_index)
        sizes = [x.shape[0] * x.shape[1] // ref_date.shape[0] for x in packed.values()]
        first = next(iter(packed.values()))
        num_encoded = sum(sizes)  # the visible tokens come first in ``order``
        encodings = layout.encoding(
            "enc", date_rows[:, :num_encoded], None if order is None else order[:, :num_encoded], first.dtype
        ).split(sizes, dim=1)
        inputs = {
            q.name: packed[q.name] + e.reshape(packed[q.name].shape)
            for q, e in zip(layout.sequences, encodings, strict=True)
        }
        return _Encoded(inputs, patches, order, date_rows)

    # -- reconstructing ------------------------------------------------------------------------------------------

    def reconstruct(self, batch: Batch, masks: dict[str, Mask]) -> dict[str, Tensor]:
        """{sensor: (B, D, L, P*P, C)}: predictions for every patch, in the units of the (normalised) target."""
        view = self.view(batch.dataset)
        layout = self.layout(view, masks, batch.ref_date)
        encoded = self._encode(layout, batch.pixels, batch.dates, batch.ref_date, masks)
        decoded = self._decode(layout, encoded, masks, {q.name: 0 for q in layout.sequences})
        return self._predict_pixels(view, {name: _in_order(x, masks[name]) for name, x in decoded.items()})

    @property
    def _residual_dtype(self) -> torch.dtype:
        """Dtype of the residual stream: that of the parameters, fp32 under autocast."""
        return next(self.mask_token.parameters()).dtype

    def _decode(
        self, layout: Layout, encoded: _Encoded, masks: dict[str, Mask], skip: dict[str, int]
    ) -> dict[str, Tensor]:
        """{sequence: (rows, N - skip, width)}: decoded tokens, the visible ones first, without the first ``skip``.

        Attention does not depend on the order of tokens, so the visible and the masked ones are joined, not sorted.
        """
        assert encoded.order is not None  # decoding needs masks
        names = [q.encoder for q in layout.sequences]
        projected = self.to_decoder(names, [encoded.tokens[q.name] for q in layout.sequences])
        visible = dict(zip(encoded.tokens, projected, strict=True))
        encoding = layout.encoding("dec", encoded.dates, encoded.order, self._residual_dtype)
        visible_sizes = [x.shape[0] * x.shape[1] // len(encoding) for x in visible.values()]
        masked_sizes = [m.masked_index.numel() // len(encoding) for m in (masks[n] for n in visible)]
        parts = encoding.split(visible_sizes + masked_sizes, dim=1)
        kinds = layout.kinds[encoded.order[:, sum(visible_sizes) :]].split(masked_sizes, dim=1)
        decoded = {}
        for i, q in enumerate(layout.sequences):
            x, index = visible[q.name], masks[q.name].masked_index
            vectors = torch.cat([self.mask_token[s.name]() for s in q.sensors])
            # One vector for all, or that of each token's sensor and token group.
            masked = parts[i + len(names)] + (F.embedding(kinds[i], vectors) if len(vectors) > 1 else vectors)
            x = torch.cat([x + parts[i].reshape(x.shape), masked.reshape(*index.shape, x.shape[-1])], dim=1)
            decoded[q.name] = self.decoders[q.encoder](x, skip[q.name])
        return decoded

    def _predict_pixels(self, view: ModelConfig, decoded: dict[str, Tensor]) -> dict[str, Tensor]:
        """{sequence: (rows, N, width)}, in order -> {sensor: (B, D, L, P*P, C)}, for the sensors of these sequences."""
        tokens = by_sensor(view, decoded)
        sensors = [s for s in view.sensors if s.name in tokens]
        groups = {s.name: view.token_groups(s) for s in sensors}
        parts = [t for s in sensors for t in tokens[s.name].chunk(len(groups[s.name]), dim=1)]
        flat = iter(
            self.to_pixels(
                [s.embed for s in sensors for _ in groups[s.name]],
                [i for s in sensors for i in range(len(groups[s.name]))],
                parts,
            )
        )
        return {
            s.name: torch.cat([next(flat).unflatten(-1, (s.patch**2, c)) for c in groups[s.name]], dim=-1)
            for s in sensors
        }

    # -- loss ----------------------------------------------------------------------------------------------------

    def forward(self, batch: Batch, masks: dict[str, Mask], counts: Tensor) -> tuple[Tensor, Tensor]:
        """This batch's share of the global loss, and its error sums per sensor (2 S,), in fp32: those of the S
        predictions, then those of predicting zero.

        ``counts`` (S,): masked values of each sensor in the whole *global* batch. As each part is divided by global
        counts, the shares of all micro-batches and ranks add up to the same loss, however the batch is split
        (invariant 4); a mean of means would depend on the split.
        """
        if self._compiled_step is not None and torch.is_grad_enabled():
            return self._compiled_step(self, batch, masks, counts)
        layout = self.layout(self.view(batch.dataset), masks, batch.ref_date)
        return self.loss_of_tensors(layout, batch.pixels, batch.dates, batch.ref_date, masks, counts)

    def loss_of_tensors(
        self,
        layout: Layout,
        pixels: dict[str, Tensor],
        dates: dict[str, Tensor],
        ref_date: Tensor,
        masks: dict[str, Mask],
        counts: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """``forward`` without the batch's host data (keys, names): a function of tensors of static shapes and the
        layout's constants only, so that it can be compiled as one graph."""
        view = layout.view
        encoded = self._encode(layout, pixels, dates, ref_date, masks)
        # The loss needs masked tokens only: the last block of a decoder skips the queries and MLP of the others.
        skip = {
            q.name: masks[q.name].visible_index.shape[1] if masks[q.name].masked_index.shape[1] else 0
            for q in layout.sequences
        }
        decoded = self._decode(layout, encoded, masks, skip)
        direct = [q for q in layout.sequences if skip[q.name] and has_equal_patches(view, q)]
        sums = self._token_errors(layout, direct, decoded, encoded.patches, masks) if direct else {}
        others = {q.name: decoded[q.name] for q in layout.sequences if q not in direct}
        if others:
            in_order = {name: _in_order(x, masks[name]) for name, x in others.items()}
            masked = counted_by_sensor(view, masks)
            for name, prediction in self._predict_pixels(view, in_order).items():
                sensor = next(s for s in view.sensors if s.name == name)
                sums[name] = error_sum(view, sensor, prediction, encoded.patches[name], masked[name])
        errors = torch.stack([sums[s.name][0] for s in view.sensors])
        # For metrics: detached, as they must not keep the graph; in one tensor, which one collective sums.
        zero = torch.stack([sums[s.name][1] for s in view.sensors])
        return weighted_loss(layout.loss_weights, errors, counts), torch.cat([errors.detach(), zero])

    def _token_errors(
        self,
        layout: Layout,
        seqs: list[Sequence],
        decoded: dict[str, Tensor],
        patches: dict[str, Tensor],
        masks: dict[str, Mask],
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """As ``error_sum``, of sequences whose tokens have equal patches, from their decoded masked tokens.

        Which of the tokens are those of which sensor is known on the device only, so with several sensors, the pixels
        of every token are predicted with the weights of each, and those of its own sensor count.
        """
        pairs = [(q, s) for q in seqs for s in q.sensors]
        found = iter(
            self.to_pixels([s.embed for _, s in pairs], [0] * len(pairs), [decoded[q.name] for q, _ in pairs])
        )
        sums: dict[str, tuple[Tensor, Tensor]] = {}
        for q in seqs:
            index = masks[q.name].masked_index
            # In the layout of memory, (C, P*P): a view.
            flat = pack(q, {s.name: patches[s.name].transpose(-1, -2).flatten(-2) for s in q.sensors})
            bands = len(q.sensors[0].bands)
            target = gather_tokens(flat, index).unflatten(-1, (bands, -1)).transpose(-1, -2)
            weights = layout.of_sensor[q.name][index] if len(q.sensors) > 1 else None
            complete = masks[q.name].complete
            if complete is not None:
                counts = complete.gather(1, index)[:, :, None].float()
                weights = counts if weights is None else weights * counts
            predictions = [next(found) for _ in q.sensors]
            errors, zero = masked_token_errors(layout.view, q.sensors[0], predictions, target, weights)
            names = (s.name for s in q.sensors)
            sums.update(zip(names, zip(errors.unbind(), zero.unbind(), strict=True), strict=True))
        return sums

    def loss(self, dataset: str, sums: Tensor, counts: Tensor) -> Tensor:
        """The loss (or a part's share) from the sums of ``forward`` and the ``counts`` of the global batch; fp32."""
        return combine_losses(self.view(dataset), sums[: len(counts)], counts)

    def embed(
        self,
        data: Batch | Tile | Pixels,
        crop_m: float | None = None,
        tile_m: float | None = None,
        dates: Mapping[str, Tensor] | None = None,
        ref_date: Tensor | None = None,
    ) -> Embedding:
        """Embeddings of a batch, a tile or tensors, without masks: token grids per sensor, one vector per sample.

        Sensors may be missing, and a sensor may have any number of dates. ``crop_m``: ground extent of the images in
        metres, if it is not that of training. ``tile_m``: extent of a tile, whose central ``crop_m`` are used (None:
        the tile has the extent of training). ``dates``, ``ref_date``: of tensors, see ``tensors.named_inputs``.

        Raises:
            TypeError: data of another kind.
            ValueError: the model does not support a sensor, its bands or the extent; the message says what it does.
            DatasetError: the tile has no data for the model.
        """
        if isinstance(data, Tile):
            view = sized(self.view(self.config.dataset), self.finetuned)
            share = 1.0 if tile_m is None else (crop_m or view.crop_m or tile_m) / tile_m
            data = tile_batch(data, view.sensors, self.config.dataset, min(share, 1.0))
            data = data.to(self._device)
        else:
            data = self._batch_of(data, dates, ref_date)
        view = sized(self.view(data.dataset), self.finetuned)
        view = view.adapted_to({k: tuple(v.shape) for k, v in data.pixels.items()}, crop_m)
        layout = self.layout(view, None, data.ref_date)
        encoded = self._encode(layout, data.pixels, data.dates, data.ref_date, None)
        tokens = by_sensor(view, encoded.tokens)
        return Embedding(tokens, torch.cat([t.mean(dim=(1, 2)) for t in tokens.values()], dim=1))

    @property
    def _device(self) -> torch.device:
        return next(self.parameters()).device

    def _batch_of(
        self, data: Batch | Pixels, dates: Mapping[str, Tensor] | None, ref_date: Tensor | None
    ) -> Batch:
        """A batch as it is (anything with its fields is one), tensors as a batch."""
        if isinstance(data, Batch):
            return data
        if hasattr(data, "pixels"):
            return cast(Batch, data)
        dataset = self.config.dataset
        sensors = self.view(dataset).sensors
        return tensors_batch(dataset, sensors, data, dates, ref_date).to(self._device)

    def head_outputs(self, batch: Batch, view: ModelConfig | None = None) -> dict[str, Tensor]:
        """{target: logits} of all heads; of a regression in units of its standard deviation (``Standardised``).

        ``view``: for another number of dates, or fewer sensors, than those of the batch's dataset.
        """
        view, depths = view or self.view(batch.dataset), self.head_depths
        layout = self.layout(view, None, batch.ref_date)
        if len(depths) > 1:
            by_depth = self.tokens_at_depths(layout, batch.pixels, batch.dates, batch.ref_date, depths)
            return {name: head(by_depth) for name, head in self.heads.items()}
        encoded = self._encode(layout, batch.pixels, batch.dates, batch.ref_date, None)
        tokens = by_sensor(view, encoded.tokens)
        return {name: head(tokens) for name, head in self.heads.items()}

    @torch.no_grad()
    def predict(
        self,
        data: Batch | Tile | Pixels,
        target: str | None = None,
        dates: Mapping[str, Tensor] | None = None,
        ref_date: Tensor | None = None,
    ) -> Prediction:
        """What a finetuned model predicts for a batch, a tile or tensors of the extent of its crop.

        A tile is prepared as evaluation does: dates are selected, and maps are put together from crops that cover it.
        ``target``: of a model with several heads. ``dates``, ``ref_date``: as of ``embed``.

        Raises:
            TypeError, DatasetError: as ``embed``.
            ValueError: as ``embed``; or the model has no such head, as it was not finetuned.
        """
        head = self._target(target)
        if isinstance(data, Tile) and self.finetuned is not None:
            batch, grid = crops_of(data, self.finetuned)
            found = self._predicted(batch.to(self._device), head)
            resolution_m = head.resolution_m or self.finetuned.spec.crop_m
            return assembled(found, grid, resolution_m) if head.is_map else found
        if isinstance(data, Tile):
            sensors = self.view(self.config.dataset).sensors
            data = tile_batch(data, sensors, self.config.dataset).to(self._device)
        else:
            data = self._batch_of(data, dates, ref_date)
        return self._predicted(data, head)

    def _predicted(self, batch: Batch, target: Target) -> Prediction:
        shapes = {name: tuple(x.shape) for name, x in batch.pixels.items()}
        view = self.view(batch.dataset).adapted_to(shapes)
        outputs = self.head_outputs(batch, view)[target.name]
        known = self.finetuned
        factor = label_factor(known.spec, target, outputs.shape[-1]) if known and target.is_map else 1
        return predict_target(target, self.heads[target.name], outputs, factor)

    def _target(self, name: str | None) -> Target:
        heads = {t.name: t for t in self.config.heads}
        if not heads:
            raise ValueError(
                "the model has no head to predict with: finetune it (evaluate.py --mode finetune) and export that run, "
                "or use embed"
            )
        if name is None and len(heads) == 1:
            return next(iter(heads.values()))
        if name not in heads:
            raise ValueError(f"target {name!r}: the model predicts {', '.join(heads)}; name one of them")
        return heads[name]


class _Encoded(NamedTuple):
    """``tokens[sequence]``: (rows, K, E). ``patches[sensor]``. ``order`` and ``dates``: the tokens' indices and date
    rows, as in :class:`Layout`; ``order`` is None without masks."""

    tokens: dict[str, Tensor]
    patches: dict[str, Tensor]
    order: Tensor | None
    dates: Tensor


def _in_order(decoded: Tensor, mask: Mask) -> Tensor:
    """Decoded tokens, visible ones first or masked ones only, in the order of the sequence; others are zero."""
    rows, tokens = mask.masked.shape
    index = mask.masked_index
    if decoded.shape[1] == tokens:
        index = torch.cat([mask.visible_index, index], dim=1)
    # scatter, not boolean indexing: static shapes and no host synchronisation (invariant 11).
    index = index[:, :, None].expand(-1, -1, decoded.shape[-1])
    return decoded.new_zeros(rows, tokens, decoded.shape[-1]).scatter(1, index, decoded)

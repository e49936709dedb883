"""Synthetic scenes: a landscape, imaged by any optical or radar sensor on any date.

A :class:`Scene` is a pure function of (seed, index). It is defined in metres on the ground and nanometres of the
spectrum and then sampled, so that sensors of different resolution and bands are consistent.

The signal to learn is the table of :mod:`.classes`: season, texture, radar structure, or two of them together. What
hides it: every tile has its own illumination, soil, understorey, vigour and season (nuisances common to its classes),
every date its own atmosphere or moisture, every parcel and pixel its own pigments, leaf area and moisture.

Shapes: T dates, C bands or polarisations, K classes, V variants, S parcels, H×W pixels (row 0 is north). All values
float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from maestro_scale.datasets.synthetic import optical, photo, radar
from maestro_scale.datasets.synthetic.classes import Variant, variants_of
from maestro_scale.datasets.synthetic.fields import Fields, Grid, fractal, octaves, plane_wave
from maestro_scale.datasets.synthetic.ground import Ground
from maestro_scale.datasets.synthetic.landscape import Landscape
from maestro_scale.datasets.synthetic.vegetation import BAND_NM, Nuisance, signatures

_RADAR_SPACINGS = octaves(40.0, 5.0)
_RADAR_DB = 2.1  # of the persistent pattern
_RADAR_PARCEL_DB = (0.9, 0.3)  # of parcels: of both polarisations, and of one
_RADAR_ROUGHNESS = -0.1
_SHARED = 0.5  # share of its variance that both orbits and polarisations have in common
_RELIEF_SPACINGS = octaves(1280.0, 20.0)


@dataclass(frozen=True)
class Scene:
    """A square of ``extent_m`` metres with 1–3 dominant classes out of ``num_classes`` (at most 20).

    ``num_parcels``: for large scenes, this many fields, of a sixth as many classes, instead. ``window_m``: width of the
    square in the middle that sensors and labels cover; 0: the whole scene.
    Every method is deterministic and independent of earlier calls. Raises ValueError for more classes than there are
    signatures.
    """

    seed: int
    index: int
    extent_m: float
    num_classes: int
    num_parcels: int = 0
    window_m: float = 0.0

    def __post_init__(self) -> None:
        variants_of(self.num_classes)

    def rng(self, purpose: str) -> np.random.Generator:
        """The random stream of this scene for one purpose; purposes do not affect each other (first 8 bytes count)."""
        counter = int.from_bytes(purpose.encode()[:8].ljust(8), "little")
        key = np.array([self.seed, self.index], np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, 0, counter], np.uint64)))

    # ---- the map

    @cached_property
    def tile(self) -> Nuisance:
        """What all classes of the tile have in common."""
        return Nuisance.draw(self.rng("nuisance"), fields=self.num_parcels > 0)

    @cached_property
    def landscape(self) -> Landscape:
        """The parcels and their classes."""
        return Landscape(self.extent_m, self.num_classes, self.num_parcels, self.rng("regions"))

    @property
    def variants(self) -> tuple[Variant, ...]:
        """(K,) the variant of each class in this tile."""
        return self.landscape.variant_of_class

    def cover(self, resolution_m: float, margin_m: float = 0.0) -> np.ndarray:
        """(H, W) uint8 class at each pixel's centre; ``margin_m`` widens the view on every side."""
        return self.landscape.cover(self._grid(resolution_m, margin_m))

    def fractions(self, resolution_m: float) -> np.ndarray:
        """(K, H, W) share of every class in each pixel; sums to one over K."""
        return self.landscape.class_shares(self._parcel_shares(resolution_m))

    def shares(self) -> np.ndarray:
        """(K,) area share of every class; sums to one."""
        return self.fractions((self.window_m or self.extent_m) / 60).mean(axis=(1, 2))

    def relief(self, resolution_m: float) -> np.ndarray:
        """(H, W) height of the terrain relative to the scene's mean level, in units of its standard deviation."""
        amplitudes = fractal(_RELIEF_SPACINGS, 1.0)[None]
        fields = Fields(self.rng("relief"), self.extent_m, _RELIEF_SPACINGS, amplitudes)
        return fields.sample(self._grid(resolution_m))[0]

    # ---- sensors

    def optical(
        self, days: np.ndarray, bands: Sequence[str], resolution_m: float, snow: np.ndarray, cloud: np.ndarray
    ) -> np.ndarray:
        """(T, C, H, W) reflectance on ``days`` (T,), under ``snow`` and ``cloud`` (T, H, W) in 0–1."""
        rng = self.rng("optical")
        nm = np.array([BAND_NM[b] for b in bands], np.float32)
        parcels = self._parcel_shares(resolution_m)
        shares, present = self._present(parcels)
        pure = signatures(self.tile, days, nm, present)[0].astype(np.float32)
        values = optical.image(
            self._ground, self.tile, rng, pure, shares, parcels, days, bands, self._grid(resolution_m)
        )
        optical.add_veils(values, rng, bands, snow, cloud)
        optical.add_noise(values, rng)
        return values

    def weather(
        self, days: np.ndarray, resolution_m: float, most: float = 1.0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Snow and cloud cover (T, H, W) in 0–1: clear, broken or overcast by date, more in winter.

        Dates with more than ``most`` of cloud are clear instead, as if the release had chosen others.
        """
        snow, cloud = optical.weather(self.rng, days, self._grid(resolution_m))
        cloud[cloud.mean(axis=(1, 2)) > most] = 0
        return snow, cloud

    def photo(self, day: int, bands: Sequence[str], resolution_m: float, margin_m: float = 0.0) -> np.ndarray:
        """(C, H, W) brightness in 0–1 as a camera gives it: cover, texture, light, balance and noise."""
        rng, grid = self.rng("photo"), self._grid(resolution_m, margin_m)
        nm = np.array([BAND_NM[b] for b in bands], np.float32)
        parcels = self.landscape.parcels(grid)
        of_parcel = [self.variants[k] for k in self.landscape.classes]
        pure = signatures(self.tile, np.array([day]), nm, of_parcel)[0][:, 0].astype(np.float32)  # (S, C)
        relative = self._ground.on_day(day, nm, grid, parcels)
        colours = [p.take(parcels) * r for p, r in zip(pure.T, relative, strict=True)]
        light = photo.texture(self.rng, grid, parcels, of_parcel, rows=self.num_parcels > 0)
        fx, fy = rng.uniform(-0.6, 0.6, 2) / self.extent_m
        light *= 1 + np.float32(0.10) * plane_wave(grid.centres, grid.centres, fx, fy, rng.uniform())
        return photo.develop(rng, colours, light, nm, float(self.tile.gain))

    def radar(self, days: np.ndarray, orbit: str, resolution_m: float) -> np.ndarray:
        """(T, 2, H, W) VV and VH backscatter in linear power with speckle; ``orbit``: "asc" or "des"."""
        rng, grid = self.rng(f"s1-{orbit}"), self._grid(resolution_m)
        parcels = self._parcel_shares(resolution_m)
        shares, present = self._present(parcels)
        pure = radar.backscatter_db(self.tile, days, orbit, present)[0] + radar.rain_db(rng, len(days))
        power = np.einsum("vtc,vhw->tchw", (10 ** (pure / 10)).astype(np.float32), shares)
        # Persistent: corners, slopes and gaps return the same on every pass of an orbit.
        patterns = self._radar_fields.sample(grid, footprint_m=2 * resolution_m)
        own = patterns[1:3] if orbit == "asc" else patterns[3:5]
        decibels = np.sqrt(np.float32(_SHARED)) * patterns[0] + np.sqrt(np.float32(1 - _SHARED)) * own
        decibels = np.float32(_RADAR_DB) * decibels + np.tensordot(self._radar_parcels_db, parcels, 1)
        power *= 10 ** (decibels / np.float32(10))
        power *= radar.speckle(rng, power.shape)
        return power

    # ---- parts that sensors share

    @cached_property
    def _ground(self) -> Ground:
        return Ground(self.rng, self.extent_m, len(self.landscape.classes))

    @cached_property
    def _radar_fields(self) -> Fields:
        amplitudes = np.repeat(fractal(_RADAR_SPACINGS, _RADAR_ROUGHNESS)[None], 5, axis=0)
        return Fields(self.rng("radar"), self.extent_m, _RADAR_SPACINGS, amplitudes)

    @cached_property
    def _known_shares(self) -> dict[float, np.ndarray]:
        return {}

    @cached_property
    def _radar_parcels_db(self) -> np.ndarray:
        """(2, S) by how much a parcel is brighter than its class, on all dates: tillage, rows, density."""
        both, single = _RADAR_PARCEL_DB
        drawn = self.rng("rparcels").standard_normal((3, len(self.landscape.classes)))
        return (both * drawn[0] + single * drawn[1:]).astype(np.float32)

    def _parcel_shares(self, resolution_m: float) -> np.ndarray:
        if resolution_m not in self._known_shares:
            self._known_shares[resolution_m] = self.landscape.parcel_shares(self._grid(resolution_m))
        return self._known_shares[resolution_m]

    def _present(self, parcel_shares: np.ndarray) -> tuple[np.ndarray, list[Variant]]:
        """(V, H, W) shares of the variants that occur, and these variants."""
        shares = self.landscape.class_shares(parcel_shares)
        present = np.flatnonzero(shares.any(axis=(1, 2)))
        return shares[present], [self.variants[k] for k in present]

    def _grid(self, resolution_m: float, margin_m: float = 0.0) -> Grid:
        outside_m = (self.extent_m - self.window_m) / 2 if self.window_m else 0.0
        return Grid(self.extent_m, resolution_m, margin_m - outside_m)

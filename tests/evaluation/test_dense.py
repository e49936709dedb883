"""kNN and linear map over cells: correspondence of labels and tokens, each pixel counted once, formulas."""

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix
from sklearn.neighbors import NearestNeighbors

from maestro_scale.evaluation.features.cache import FeatureCache
from maestro_scale.evaluation.probes import dense
from maestro_scale.evaluation.results import EvaluationError
from maestro_scale.stream.crops import CropGrid
from tests.evaluation.conftest import FIELDS

GRID, SIDE, CLASSES, WIDTH = 2, 2, 3, 12


def layout(crop_m=40.0, grid=GRID, side=SIDE):
    return dense.PixelLayout(grid, side, 10.0, CropGrid(dataclasses.replace(FIELDS, crop_m=crop_m)))


def split(num_tiles, seed, noise=0.05):
    """Features from which a linear map, the same in every split, gives each pixel's class; a tenth is ignored."""
    shared = np.random.default_rng(5).normal(size=(WIDTH, SIDE**2 * CLASSES))
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(4 * num_tiles, GRID**2, WIDTH))
    scores = (features @ shared + noise * rng.normal(size=(*features.shape[:2], SIDE**2 * CLASSES))).reshape(
        4 * num_tiles, GRID**2, SIDE**2, CLASSES
    )
    labels = layout().per_pixel(scores.argmax(-1).astype(np.uint8))
    labels[rng.random(labels.shape) < 0.1] = dense.IGNORED
    return FeatureCache(features.astype(np.float16), labels, np.repeat(np.arange(num_tiles), 4))


def miou(counts):
    return float(dense.mean_iou(counts.sum(0)[:CLASSES]))


def test_cells_and_pixels_are_each_others_inverse():
    cells = np.random.default_rng(0).integers(0, 9, (3, GRID**2, SIDE**2))
    np.testing.assert_array_equal(layout().per_cell(layout().per_pixel(cells)), cells)
    image = layout().per_pixel(np.arange(16).reshape(1, 4, 4))[0]
    np.testing.assert_array_equal(image, [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]])


def test_labels_finer_than_the_image_are_sampled_at_their_centre():
    coarse = layout(grid=2, side=1)
    assert coarse.factor == 2
    labels = np.arange(16).reshape(1, 4, 4)
    np.testing.assert_array_equal(coarse.per_cell(labels)[0, :, 0], [5, 7, 13, 15])
    np.testing.assert_array_equal(coarse.per_pixel(np.array([[[1], [2], [3], [4]]]))[0, 0], [1, 1, 2, 2])


def test_labels_that_do_not_fit_the_image_are_refused():
    with pytest.raises(ValueError, match="labels of 4 pixels per side are not a multiple of image_size 8"):
        layout(grid=4)


def test_each_pixel_of_a_tile_counts_once_with_overlapping_crops():
    rng = np.random.default_rng(1)
    truth = rng.integers(0, CLASSES, (2, 6, 6)).astype(np.uint8)
    truth[rng.random(truth.shape) < 0.2] = dense.IGNORED
    answer = rng.integers(0, CLASSES, (2, 6, 6)).astype(np.uint8)
    corners = [(0, 0), (0, 2), (2, 0), (2, 2)]

    def crops(tiles):
        return np.stack([t[r : r + 4, c : c + 4] for t in tiles for r, c in corners])

    test = FeatureCache(np.zeros((8, GRID**2, 1)), crops(truth), np.repeat([0, 1], 4))
    counts = dense.confusions(layout(), CLASSES, layout().per_cell(crops(answer)), test)
    for tile in range(2):
        kept = truth[tile] != dense.IGNORED
        expected = confusion_matrix(truth[tile][kept], answer[tile][kept], labels=range(CLASSES))
        np.testing.assert_array_equal(counts[tile][:CLASSES], expected)
        np.testing.assert_array_equal(
            counts[tile][CLASSES], np.bincount(answer[tile][~kept], minlength=CLASSES)
        )


def test_probe_finds_a_linear_map_and_reports_its_learning_rate():
    train, val, test = split(60, 1), split(15, 2), split(15, 3)
    answer, chosen = dense.probe(layout(), CLASSES, train, val, test, seed=0)
    assert miou(dense.confusions(layout(), CLASSES, answer, test)) > 0.9
    assert chosen["lr"] in dense.LEARNING_RATES
    again, _ = dense.probe(layout(), CLASSES, train, val, test, seed=0)
    np.testing.assert_array_equal(answer, again)


def test_probe_does_not_depend_on_the_scale_of_features():
    splits = [split(40, 1), split(10, 2), split(10, 3)]
    moved = [FeatureCache(100 + 50 * s.features.astype(np.float32), s.labels, s.tiles) for s in splits]
    scores = [
        miou(dense.confusions(layout(), CLASSES, dense.probe(layout(), CLASSES, *s, seed=0)[0], s[2]))
        for s in (splits, moved)
    ]
    assert abs(scores[0] - scores[1]) < 0.03


def test_knn_votes_by_the_formula_and_ignored_pixels_have_no_vote(monkeypatch):
    monkeypatch.setattr(dense, "NEIGHBOURS", (6,))
    monkeypatch.setattr(dense, "TEMPERATURES", (0.1,))
    train, val, test = split(10, 1), split(3, 2), split(4, 3)
    answer, chosen = dense.knn(layout(), CLASSES, train, val, test, seed=0)
    assert chosen == {"k": 6, "temperature": 0.1}
    labels = layout().per_cell(train.labels).reshape(-1, SIDE**2)
    counted = (labels != dense.IGNORED).any(-1)
    bank = train.features.reshape(-1, WIDTH).astype(np.float64)[counted]
    away, near = (
        NearestNeighbors(n_neighbors=6, metric="cosine")
        .fit(bank)
        .kneighbors(test.features.reshape(-1, WIDTH).astype(np.float64))
    )
    votes = np.exp((1 - away) / 0.1)[..., None, None] * np.eye(dense.IGNORED + 1)[labels[counted][near]]
    expected = votes.sum(1)[..., :CLASSES].argmax(-1)
    np.testing.assert_array_equal(answer.reshape(expected.shape), expected)


def test_knn_finds_what_is_near():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(CLASSES, WIDTH))

    def clustered(num_tiles, seed):
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, CLASSES, (4 * num_tiles, GRID**2))
        features = centres[labels] + 0.1 * rng.normal(size=(*labels.shape, WIDTH))
        pixels = layout().per_pixel(np.repeat(labels[..., None], SIDE**2, -1).astype(np.uint8))
        return FeatureCache(features.astype(np.float16), pixels, np.repeat(np.arange(num_tiles), 4))

    test = clustered(5, 3)
    answer, _ = dense.knn(layout(), CLASSES, clustered(10, 1), clustered(5, 2), test, seed=0)
    assert miou(dense.confusions(layout(), CLASSES, answer, test)) > 0.99


def test_a_split_without_a_counted_pixel_is_refused():
    empty = split(2, 1)
    empty.labels[:] = dense.IGNORED
    for classify in (dense.probe, dense.knn):
        with pytest.raises(EvaluationError, match="no pixel of the training split counts"):
            classify(layout(), CLASSES, empty, empty, empty, seed=0)
        with pytest.raises(EvaluationError, match="of the validation split counts"):
            classify(layout(), CLASSES, split(30, 1), empty, split(2, 2), seed=0)


def test_knn_takes_the_k_and_temperature_that_are_best_on_validation(monkeypatch):
    train, val, test = split(30, 1), split(10, 2), split(4, 3)
    scores = {}
    for k in dense.NEIGHBOURS:
        for temperature in dense.TEMPERATURES:
            with monkeypatch.context() as only:
                only.setattr(dense, "NEIGHBOURS", (k,))
                only.setattr(dense, "TEMPERATURES", (temperature,))
                answer, _ = dense.knn(layout(), CLASSES, train, val, val, seed=0)
            # As it chooses: pixel by pixel as the model's image has them.
            truth = layout().per_cell(np.asarray(val.labels))
            counted = truth != dense.IGNORED
            matrix = confusion_matrix(truth[counted], answer[counted], labels=range(CLASSES))
            scores[k, temperature] = float(dense.mean_iou(matrix))
    assert len(set(scores.values())) > 1
    _, chosen = dense.knn(layout(), CLASSES, train, val, test, seed=0)
    assert scores[chosen["k"], chosen["temperature"]] == max(scores.values())


def test_of_candidates_with_equal_scores_knn_takes_the_first(monkeypatch):
    monkeypatch.setattr(dense, "NEIGHBOURS", (5, 2, 3))
    monkeypatch.setattr(dense, "TEMPERATURES", (0.2, 0.07))
    train, val, test = split(3, 1), split(2, 2), split(2, 3)
    for part in (train, val, test):
        part.labels[:] = 1
    answer, chosen = dense.knn(layout(), CLASSES, train, val, test, seed=0)
    assert (answer == 1).all()
    assert chosen == {"k": 2, "temperature": 0.2}


def test_votes_worked_out_by_hand():
    # Three neighbours of weights 0.5, 0.3 and 0.2, two pixels each, three classes.
    weights = torch.tensor([[0.5, 0.3, 0.2]]).log()

    def vote(*labels: tuple[int, int]) -> list[int]:
        return dense._vote(weights, torch.tensor([labels]), CLASSES)[0].tolist()

    assert vote((2, 0), (1, 1), (1, 1)) == [1, 0]  # 0.5 : 0.5, the first class; 0.5 : 0.5 again
    assert vote((2, 0), (1, 2), (0, 2)) == [2, 0]  # 0.5 : 0.3 : 0.2; 0.5 : 0.5, the first class
    assert vote((dense.IGNORED, 2), (1, dense.IGNORED), (0, dense.IGNORED)) == [1, 2]  # 0.3 : 0.2; alone


def test_the_centre_label_of_a_block_is_used():
    # Blocks of 4 x 4 labels: row and column 2 of each. 8 x 8 labels, 2 x 2 cells of one pixel.
    crops = CropGrid(FIELDS)
    fine = dense.PixelLayout(2, 1, 5.0, crops)
    assert (fine.tile_pixels, fine.crop_pixels, fine.factor) == (12, 8, 4)
    labels = np.arange(64).reshape(1, 8, 8)
    assert fine.per_cell(labels)[0, :, 0].tolist() == [18, 22, 50, 54]  # 8 * 2 + 2, + 4, 8 * 6 + 2, + 4


def test_where_crops_overlap_the_later_one_counts():
    # Crops of 4 pixels at 0 and 2 of 6: each is filled with its number.
    crops = np.arange(4)[:, None, None] * np.ones((4, 4, 4), int)
    tile = layout().assemble(crops)
    assert tile.tolist() == [[0, 0, 1, 1, 1, 1]] * 2 + [[2, 2, 3, 3, 3, 3]] * 4


def test_samples_of_cells_are_drawn_only_from_too_many():
    rows = np.arange(100, 200)
    assert dense.sample_cells(rows, 100, 0) is rows
    some = dense.sample_cells(rows, 99, 0)
    assert len(some) == len(set(some.tolist())) == 99
    assert (np.diff(some) > 0).all()
    assert set(dense.sample_cells(rows, 20, 0).tolist()) != set(dense.sample_cells(rows, 20, 1).tolist())


def test_moments_are_those_of_all_cells_and_dead_features_are_left_out():
    # Feature 0: 1, 3, 5, 7 has mean 4 and deviation sqrt(5); feature 1 never moves.
    features = np.array([[[1, 9], [3, 9]], [[5, 9], [7, 9]]], np.float16)
    mean, scale = dense.feature_moments(features)
    np.testing.assert_allclose(mean, [4, 9])
    np.testing.assert_allclose(scale, [5**0.5, np.inf])


def test_knn_draws_its_bank_and_its_validation_places_separately(monkeypatch):
    drawn = []
    monkeypatch.setattr(dense, "sample_cells", lambda rows, most, seed: drawn.append((most, seed)) or rows)
    dense.knn(layout(), CLASSES, split(3, 1), split(2, 2), split(2, 3), seed=7)
    assert drawn == [(100_000, 7), (20_000, 8)]

"""Ablation studies: a grid of recipes, seeds and evaluations, run as independent cells and compared in pairs."""

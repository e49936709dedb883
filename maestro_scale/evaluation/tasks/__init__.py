"""What a benchmark asks: targets, losses, label fractions, folds and prediction maps."""

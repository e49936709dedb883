"""The score that can be reached on synthetic scenes when the generator's signatures are known."""

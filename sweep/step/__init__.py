"""The training step: one batch in, a changed TrainState out."""

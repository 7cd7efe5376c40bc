"""Stages, their step, loop and checkpoints, and the workdir that holds them."""

"""Tiny instances of transformers' MoE families, for tests, the demo and ``make models``."""

from .build import configuration, model_class, tiny
from .inputs import inputs, loss_of, output_of
from .scan import families
from .tweaks import MAIN

__all__ = ["MAIN", "configuration", "families", "inputs", "loss_of", "model_class", "output_of", "tiny"]

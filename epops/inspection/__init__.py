"""`epops.inspect`: what the compiler did with a model's exchanges."""

from .capture import PassedGraph
from .report import Inspection, inspect

__all__ = ["Inspection", "PassedGraph", "inspect"]

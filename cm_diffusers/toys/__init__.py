"""Toy problems: their exact answers, training on them, and pictures of the result."""

from cm_diffusers.toys.problems import TASKS, Mixture, Shape, ToyDraws, ToyNetwork, ToyOutput


__all__ = ["TASKS", "Mixture", "Shape", "ToyDraws", "ToyNetwork", "ToyOutput"]

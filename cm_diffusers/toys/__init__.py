"""Small problems: their exact answers, training on them, and pictures of what is learned."""

from cm_diffusers.toys.problems import TASKS, Mixture, Shape, ToyDraws, ToyNetwork, ToyOutput


__all__ = ["TASKS", "Mixture", "Shape", "ToyDraws", "ToyNetwork", "ToyOutput"]

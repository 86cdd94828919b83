"""How far samples are from data."""

from cm_diffusers.evaluation.classifier import SmallClassifier, train_classifier
from cm_diffusers.evaluation.frechet import frechet_distance


__all__ = ["SmallClassifier", "frechet_distance", "train_classifier"]

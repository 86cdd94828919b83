"""Metrics of the distance between samples and data."""

from cm_diffusers.evaluation.agreement import label_agreement, labels_told_apart
from cm_diffusers.evaluation.classifier import SmallClassifier, train_classifier
from cm_diffusers.evaluation.features import Extractor, load_extractor
from cm_diffusers.evaluation.frechet import Moments, frechet_distance
from cm_diffusers.evaluation.kernel import kernel_distance
from cm_diffusers.evaluation.manifold import density_coverage, precision_recall
from cm_diffusers.evaluation.measure import FID_SAMPLES, check_samples, measure
from cm_diffusers.evaluation.reference import Reference, kept_places, reference_features


__all__ = [
    "FID_SAMPLES",
    "Extractor",
    "Moments",
    "Reference",
    "SmallClassifier",
    "check_samples",
    "density_coverage",
    "frechet_distance",
    "kept_places",
    "kernel_distance",
    "label_agreement",
    "labels_told_apart",
    "load_extractor",
    "measure",
    "precision_recall",
    "reference_features",
    "train_classifier",
]

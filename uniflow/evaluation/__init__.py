"""How good pictures are, and features: scores of reconstructions, distances between sets of features, classifiers."""

from uniflow.evaluation.frechet import FeatureStatistics, frechet_distance
from uniflow.evaluation.inception_score import InceptionScore
from uniflow.evaluation.manifolds import precision_recall
from uniflow.evaluation.networks import FeatureNetwork, PerceptualDistance
from uniflow.evaluation.probing import Labelled, PooledLayers, linear_accuracy, neighbour_accuracy

__all__ = [
    "FeatureNetwork",
    "FeatureStatistics",
    "InceptionScore",
    "Labelled",
    "PerceptualDistance",
    "PooledLayers",
    "frechet_distance",
    "linear_accuracy",
    "neighbour_accuracy",
    "precision_recall",
]

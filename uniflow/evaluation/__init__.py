"""How good pictures are: scores of reconstructions, and distances between sets of features."""

from uniflow.evaluation.frechet import FeatureStatistics, frechet_distance
from uniflow.evaluation.networks import FeatureNetwork, PerceptualDistance

__all__ = ["FeatureNetwork", "FeatureStatistics", "PerceptualDistance", "frechet_distance"]

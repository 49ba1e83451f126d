"""Data sets, batches and loaders that feed MixMatch."""

from gpu_mixmatch.data.check import check_images
from gpu_mixmatch.data.collate import Indexed, collate
from gpu_mixmatch.data.dali import AugmentedBatch, DaliLoader, mixmatch_pipeline
from gpu_mixmatch.data.folder import ImageFiles
from gpu_mixmatch.data.loader import SemiSupervisedLoader
from gpu_mixmatch.data.order import KeyedLoader
from gpu_mixmatch.data.resident import ResidentLoader
from gpu_mixmatch.types import SemiSupervisedBatch

__all__ = [
    "AugmentedBatch",
    "DaliLoader",
    "ImageFiles",
    "Indexed",
    "KeyedLoader",
    "ResidentLoader",
    "SemiSupervisedBatch",
    "SemiSupervisedLoader",
    "check_images",
    "collate",
    "mixmatch_pipeline",
]

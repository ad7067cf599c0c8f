"""DIST loss, batch-similarity distillation and modality-shifting fusion for PyTorch."""

from telme_kd import errors, functional, interop
from telme_kd._dispatch import available_backends
from telme_kd._version import __version__
from telme_kd.accumulation import accumulate_gradient
from telme_kd.batch_similarity import BatchSimilarityLoss
from telme_kd.dist import DISTLoss
from telme_kd.fusion import AttentionShiftingFusion, ShiftingFusion
from telme_kd.memory import RelationMemory
from telme_kd.student import StudentLoss

__all__ = [
    "AttentionShiftingFusion",
    "BatchSimilarityLoss",
    "DISTLoss",
    "RelationMemory",
    "ShiftingFusion",
    "StudentLoss",
    "__version__",
    "accumulate_gradient",
    "available_backends",
    "errors",
    "functional",
    "interop",
]

"""Every operator as a function."""

from telme_kd.batch_similarity import batch_similarity_loss
from telme_kd.dist import dist_loss, inter_class_loss, intra_class_loss
from telme_kd.fusion import bounded_shift
from telme_kd.linear_dist import linear_dist_loss
from telme_kd.sharded_dist import sharded_dist_loss

__all__ = [
    "batch_similarity_loss",
    "bounded_shift",
    "dist_loss",
    "inter_class_loss",
    "intra_class_loss",
    "linear_dist_loss",
    "sharded_dist_loss",
]

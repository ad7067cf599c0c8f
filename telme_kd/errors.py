"""Every exception and warning that telme_kd raises on purpose.

Each is also a built-in, so that ``except ValueError`` works without importing this module.
"""


class TelmeKDError(Exception):
    """The root of all telme_kd errors."""


class ShapeError(TelmeKDError, ValueError):
    """A tensor has the wrong number of axes, the wrong size, or no elements."""


class RangeError(TelmeKDError, ValueError):
    """A number lies outside its range, or a word outside its list."""


class DTypeError(TelmeKDError, TypeError):
    """An argument has the wrong type, or a tensor the wrong dtype."""


class DeviceError(TelmeKDError, ValueError):
    """Tensors that belong together lie on different devices."""


class BackendError(TelmeKDError, RuntimeError):
    """A backend was asked for by name and cannot serve this call."""


class DistributedError(TelmeKDError, RuntimeError):
    """A process group is not there, or its processes disagree."""


class CheckpointError(TelmeKDError, ValueError):
    """A state dict has missing, unexpected, misshapen or non-finite entries."""


class DegenerateBatchWarning(UserWarning):
    """A batch is too small, or has too few classes, for its relations to say anything."""

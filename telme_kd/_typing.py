"""Names for the choices that users make by word."""

from typing import Literal, TypeAlias

Backend: TypeAlias = Literal["auto", "reference", "cpu", "triton"]
"""Which implementation computes an operator; ``"auto"`` picks the fastest that fits."""

AttendOver: TypeAlias = Literal["modalities", "dialogue", "batch"]
"""What the tokens of the fusion head's attention are."""

"""Why a provider has no figure, in one line."""

import torch

OUT_OF_MEMORY = "out of memory"
_LONGEST = 300


def reason_for(error: Exception) -> str:
    """The reason that a result file gives for what is missing."""
    text = str(error).strip()
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
        return OUT_OF_MEMORY
    first_line = text.splitlines()[0] if text else ""
    return f"{type(error).__name__}: {first_line}"[:_LONGEST].rstrip(" :")

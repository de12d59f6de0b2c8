"""Devices by the names that users type."""

from __future__ import annotations

import torch

from ..errors import UsageError


def parse_device(text: str) -> torch.device:
    """Return torch's device of a name such as cpu or cuda:0; raises UsageError for anything else."""
    try:
        return torch.device(text)
    except RuntimeError as error:
        raise UsageError(f"the device {text!r} is unknown; pass cpu, cuda, or cuda:0 and so on.") from error


def usable_device(name: str) -> torch.device:
    """Return a device that tensors can be put on here; raises UsageError for others."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"--device {name!r} cannot be used here ({reason}); choose cpu or another device.") from error
    return device

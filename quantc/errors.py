"""Every error a user can meet: one sentence with what was found, what is needed, and what to do."""


class QuantcError(Exception):
    """Base of all errors quantc raises on purpose; the command line prints it without a traceback."""

    exit_code = 1


class UsageError(QuantcError):
    """An option, recipe key or plan entry is unknown, contradictory or out of range."""

    exit_code = 2


class ModelError(QuantcError):
    """The source model cannot be read, or is not something quantc can quantize."""


class CalibrationError(QuantcError):
    """The calibration data is missing, too short, or drives the model to non-finite values."""


class CheckpointError(QuantcError):
    """A quantc checkpoint is damaged, incomplete, of an unknown version, or cannot be written."""


class PassError(QuantcError):
    """Passes are in an order that cannot work, or a pass broke what it promised to keep."""


class KernelError(QuantcError):
    """A compiled kernel cannot be built, loaded or started on this machine."""

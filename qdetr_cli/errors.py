"""What a user can get wrong, as exceptions: one clear message, exit code 2."""


class QDetrError(Exception):
    """A user's mistake. The message says what, where, which choices are valid, and the way out."""


class RecipeError(QDetrError):
    """A recipe that cannot be read, or that asks for what cannot be done. Lists every fault at once."""


class CheckpointError(QDetrError):
    """A checkpoint that cannot be loaded strictly and safely, or a family that is not supported."""


class DataError(QDetrError):
    """A data set, annotation or image that cannot be used."""


class PluginError(QDetrError):
    """A plugin that cannot be found or imported, or a name that is taken or unknown."""


class RunError(QDetrError):
    """A run folder, device or training state that cannot be used or continued."""


class DivergedError(RunError):
    """Training met a value that is not finite. Names the step, the loss terms and the module."""


class ExportError(QDetrError):
    """A model that cannot be exported, a file that does not match or run, or a runtime that is missing."""

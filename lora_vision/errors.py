"""The errors a user can cause: each says what was found, what was expected and what to do."""


class LoraVisionError(Exception):
    """Anything this library refuses; the command line shows it as one line and exits with 1."""


class AdapterError(LoraVisionError, ValueError):
    """An adapter, its file or its layers do not fit."""


class DataError(LoraVisionError, ValueError):
    """The pictures or captions cannot be used."""


class BaseModelError(LoraVisionError, ValueError):
    """The base model is absent, of the wrong kind, or already changed by someone else."""

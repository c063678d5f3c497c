"""The errors that users meet. Each message says what was given, what is wanted and what to do."""


class BaqeError(Exception):
    """Base of every error raised on purpose by this package."""


class ConfigError(BaqeError, ValueError):
    """A bit-config, option or argument that cannot be right."""


class DataError(BaqeError):
    """A data set that cannot be used as it lies on disk."""


class UnsupportedModelError(BaqeError):
    """A module, operator or pattern that cannot be traced, quantized or lowered."""


class CalibrationError(BaqeError):
    """Quantizers that were used before their scales were initialised, or data that cannot initialise them."""


class BuildError(BaqeError):
    """An integer graph that cannot be compiled for the target."""


class MeasurementError(BaqeError):
    """A measurement that crashed, timed out or gave no figure."""


class StorageError(BaqeError):
    """A study's database that does not answer."""


class InfeasibleError(BaqeError):
    """Limits that no point meets."""


def check_at_least(argument: str, value: int, least: int) -> None:
    """Raise ConfigError unless ``value`` is a whole number of ``least`` or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{argument}={value!r}, but a whole number of {least} or more is wanted: change {argument}.")

"""PACI: bounded-drift asynchronous pipeline training for DeepSpeed and Megatron, switched on by a config key.

Importing this package has no side effect and imports neither torch nor a framework.
"""

from paci_schedule.errors import (
    ConfigError,
    DataEndedError,
    LinkError,
    PaciError,
    ScheduleError,
    UnsupportedError,
)
from paci_schedule.spec import PipelineSpec

__all__ = [
    "ConfigError",
    "DataEndedError",
    "LinkError",
    "PaciError",
    "PipelineSpec",
    "ScheduleError",
    "UnsupportedError",
    "register",
]

__version__ = "0.1.0"


def register() -> None:
    """Make the schedule available in the frameworks that are installed.  Idempotent; call it before building an engine.

    Raises:
        UnsupportedError: a framework is installed in a version that is not supported, or lost a hook we rely on.
    """
    from paci_schedule.registration import register_installed

    register_installed()

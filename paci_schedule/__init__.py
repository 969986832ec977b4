"""PACI: bounded-drift asynchronous pipeline training for DeepSpeed and Megatron, switched on by a config key.

Importing this package has no side effect and imports neither torch nor a framework.
"""

from paci_schedule.core.spec import PipelineSpec
from paci_schedule.errors import (
    CheckpointError,
    ConfigError,
    DataEndedError,
    LinkError,
    NonfiniteError,
    PaciError,
    ScheduleError,
    UnsupportedError,
)

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataEndedError",
    "LinkError",
    "NonfiniteError",
    "PaciError",
    "PipelineSpec",
    "ScheduleError",
    "UnsupportedError",
    "register",
]

__version__ = "0.1.0"


def register(*frameworks: str) -> None:
    """Make the schedule available in the frameworks.  Idempotent; call it before building an engine.

    Args:
        frameworks: "deepspeed", "megatron", or "torch" for torch.distributed.pipelining; if none is named, the first
            two, as far as they are installed and supported.

    Raises:
        ConfigError: a framework that we do not know.
        UnsupportedError: a framework that is named, or every one, is not installed, is in a version that is not
            supported, or lost a hook.
    """
    from paci_schedule.adapters.frameworks import register_with

    register_with(frameworks)

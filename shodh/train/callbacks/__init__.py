"""What happens beside the steps of a training run; see `shodh.train.trainer.Callback`."""

from shodh.train.callbacks.checkpoints import Checkpoints, StopSignal
from shodh.train.callbacks.experts import Experts
from shodh.train.callbacks.faults import FirstStep, SkippedSteps
from shodh.train.callbacks.profile import Profile
from shodh.train.callbacks.selection import Averaging, Selection
from shodh.train.callbacks.step_metrics import StepMetrics
from shodh.train.callbacks.trace import RoutingTrace
from shodh.train.callbacks.validation import Validation
from shodh.train.callbacks.watching import Watching

__all__ = [
    "Averaging",
    "Checkpoints",
    "Experts",
    "FirstStep",
    "Profile",
    "RoutingTrace",
    "Selection",
    "SkippedSteps",
    "StepMetrics",
    "StopSignal",
    "Validation",
    "Watching",
]

"""Everything that a caller can cause ends in one of these.

TrellisError
 ├── InputError        the picture or an option is not usable
 ├── CheckpointError   a model file is missing, damaged or of another model
 ├── CapacityError     the machine has not enough memory or disk for the request
 └── Cancelled         the caller asked to stop

The text of each names the offending value and the remedy in one sentence.
"""


class TrellisError(Exception):
    """Base of all errors raised on purpose by this package."""


class InputError(TrellisError):
    """The picture or an option cannot be used as given."""


class CheckpointError(TrellisError):
    """A checkpoint is missing, damaged, or not what its configuration says."""


class CapacityError(TrellisError):
    """The machine has not enough memory or disk space for this request."""


class Cancelled(TrellisError):
    """Raise this from a progress callback to stop a run; the pipeline stays usable."""

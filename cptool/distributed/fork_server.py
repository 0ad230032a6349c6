"""What the process that ranks are forked from imports first. From here on it ends with the
launching process, however that goes, and even where it is stopped.
"""

import os
import sys
from types import TracebackType

from cptool.distributed.signals import end_with_parent


def _quiet(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A launching process that ends in the midst of a request for a rank is no news."""
    if not issubclass(kind, (EOFError, OSError)) or os.environ.get("CPTOOL_TRACEBACK"):
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _quiet
end_with_parent()

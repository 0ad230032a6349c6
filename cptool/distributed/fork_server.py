"""The first import of the process that ranks are forked from.

From here on the process ends with the launching process, however that ends, even if it is stopped.
"""

import os
import signal
import sys
from types import TracebackType

from cptool.distributed.signals import end_with_parent


def _quiet(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Show no traceback if the launching process ends in the middle of a request for a rank."""
    if not issubclass(kind, (EOFError, OSError)) or os.environ.get("CPTOOL_TRACEBACK"):
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _quiet
# As Ctrl-C does, SIGTERM may reach every process of a command; only the launching one acts on it.
signal.signal(signal.SIGTERM, signal.SIG_IGN)
end_with_parent()

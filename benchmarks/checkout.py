"""Import it before cptool: a benchmark then runs on an installed cptool or, where there is none, on
that of the checkout that it lies in, built in place.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

"""What the process that ranks are forked from imports first. From here on it ends with the
launching process, however that goes, and even where it is stopped.
"""

from cptool.termination import end_with_parent

end_with_parent()

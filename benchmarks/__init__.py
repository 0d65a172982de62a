"""Every op against what people would use instead: checked against float64 first, then timed, the rivals in turn."""

import time

BEGAN = time.monotonic()  # before torch is imported, which takes part of the minutes that a machine is lent for

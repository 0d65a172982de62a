"""Every op against what people would use instead: checked against float64 first, then timed, the rivals in turn."""

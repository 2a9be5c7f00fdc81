"""Control groups: version 1, version 2 and hosts that have both at once."""

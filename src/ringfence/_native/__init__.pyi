"""The compiled half of Ringfence. Private: use the modules that wrap it."""

from ringfence._native import host as host
from ringfence._native import lowlevel as lowlevel

__all__ = ["host", "lowlevel"]

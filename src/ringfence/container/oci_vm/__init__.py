"""Bundles of the runtime specification in virtual machines: the class ``ringfence-vm``.

A process of the host, the monitor, stands for the container: engines get its number, wait for it
and signal it. It holds the machine, passes streams and signals on, and ends as the program ended.
"""

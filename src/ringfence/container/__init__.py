"""OS-level virtualization: containers out of namespaces, cgroups, mounts and system call filters.

Python decides and writes a plan; the small program ``ringfence-init`` carries it out and becomes
the container's process. What is on the way of ``ringfence-oci`` imports next to nothing, since a
runtime is a new process for every command: no dataclasses, enums, pathlib, json or signal there.
"""

"""The guest's side of a machine: kernels, the initramfs, and the host's end of the agent."""

"""``ringfence-oci``: a runtime for containerd, Docker and Podman, called as runc is called."""

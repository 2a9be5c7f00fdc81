"""The kvm engine on hardware virtualization: inside the nested host."""

//! Every body on seeded input: the same on each run, so that the suite exercises what fuzzers do.

#[cfg(test)]
mod tests {
    use ringfence_fuzz_harness::BODIES;
    use ringfence_fuzz_harness::seeded_bytes;

    /// Runs of each body; more in `make fuzz`.
    fn runs() -> u64 {
        let asked = std::env::var("RINGFENCE_FUZZ_RUNS").ok();
        asked.and_then(|runs| runs.parse().ok()).unwrap_or(150)
    }

    fn run(name: &str) {
        let (_, body) = BODIES
            .iter()
            .find(|(known, _)| *known == name)
            .expect("a body");
        for seed in 0..runs() {
            let len = 64 + usize::try_from(seed * 37 % 4000).expect("small");
            let data = seeded_bytes(seed, len);
            if let Err(panic) = std::panic::catch_unwind(|| body(&data)) {
                eprintln!("{name} fails with seed {seed} and {len} bytes");
                std::panic::resume_unwind(panic);
            }
        }
    }

    #[test]
    fn agent_protocol() {
        run("agent_protocol");
    }

    #[test]
    fn virtio_rng() {
        run("virtio_rng");
    }

    #[test]
    fn virtio_console() {
        run("virtio_console");
    }

    #[test]
    fn virtio_balloon() {
        run("virtio_balloon");
    }

    #[test]
    fn virtio_block() {
        run("virtio_block");
    }

    #[test]
    fn virtio_net() {
        run("virtio_net");
    }

    #[test]
    fn gateway() {
        run("gateway");
    }

    #[test]
    fn virtio_vsock() {
        run("virtio_vsock");
    }

    #[test]
    fn virtio_fs() {
        run("virtio_fs");
    }

    #[test]
    fn pci_root() {
        run("pci_root");
    }

    #[test]
    fn loader_kernel() {
        run("loader_kernel");
    }

    #[test]
    fn qcow2_image() {
        run("qcow2_image");
    }
}

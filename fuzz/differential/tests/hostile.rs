//! Machines whose kernel does its worst.

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicU64;
    use std::sync::atomic::Ordering;
    use std::time::Duration;

    use ringfence_fuzz_differential::every;
    use ringfence_fuzz_differential::hostile::Tally;
    use ringfence_fuzz_differential::hostile::encodings;
    use ringfence_fuzz_differential::hostile::run;

    /// Ends the process when a machine doesn't come back.
    fn watch(seed: &Arc<AtomicU64>) {
        let seed = Arc::clone(seed);
        std::thread::spawn(move || {
            let mut last = u64::MAX;
            loop {
                std::thread::park_timeout(Duration::from_secs(20));
                let now = seed.load(Ordering::SeqCst);
                if now == last {
                    eprintln!("the machine of seed {now:#x} doesn't come back");
                    std::process::abort();
                }
                last = now;
            }
        });
    }

    #[test]
    fn a_hostile_kernel_does_no_more_than_a_processor_lets_it() {
        let machines: u64 = std::env::var("RINGFENCE_FUZZ_MACHINES")
            .ok()
            .and_then(|machines| machines.parse().ok())
            .unwrap_or(40);
        let first: u64 = std::env::var("RINGFENCE_FUZZ_SEED")
            .ok()
            .and_then(|seed| seed.parse().ok())
            .unwrap_or(0);
        let generator = encodings();
        let mut tally = Tally::default();
        let current = Arc::new(AtomicU64::new(0));
        watch(&current);
        let mut failures = Vec::new();
        for seed in first..first + machines {
            current.store(seed, Ordering::SeqCst);
            if let Err(error) = run(&generator, seed, &mut tally) {
                failures.push(format!("seed {seed}: {error}"));
            }
        }
        eprintln!("{tally:?}");
        assert!(failures.is_empty(), "{}", failures.join("\n"));
        // It did run, and wasn't refused as a whole.
        assert!(tally.shutdowns + tally.kicks > machines);
        assert!(tally.refused * 4 < machines);
    }
    /// Whatever the bytes are, in 16-, 32- and 64-bit code.
    #[test]
    fn every_opcode_is_executed_or_raises_an_exception() {
        for bits in [16, 32, 64] {
            let bugs = every::run(bits).expect("a guest");
            assert!(bugs.is_empty(), "{bits} bits:\n{}", bugs.join("\n"));
        }
    }
}

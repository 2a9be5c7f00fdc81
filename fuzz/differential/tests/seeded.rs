//! A seeded share of the comparison: the same on each run. `make fuzz` runs a million cases.

#[cfg(test)]
mod tests {
    use ringfence_engine_bt::Direct;
    use ringfence_fuzz_differential::generate::Generator;
    use ringfence_fuzz_differential::guest::Manner;
    use ringfence_fuzz_differential::minimise::describe;
    use ringfence_fuzz_differential::minimise::minimise;
    use ringfence_fuzz_differential::session::Batch;
    use ringfence_fuzz_differential::session::Session;
    use ringfence_fuzz_differential::session::Trouble;

    /// Runs as many batches as asked for, in one manner.
    fn compare(seed: u64, batches: u64, manner: Manner) {
        compare_with(Direct::Never, seed, batches, manner);
    }

    fn compare_with(direct: Direct, seed: u64, batches: u64, manner: Manner) {
        if let Some(reason) = Session::obstacle() {
            eprintln!("skipped: {reason}");
            return;
        }
        let mut session = Session::with(direct).expect("both sides");
        let generator = Generator::new();
        for number in 0..batches {
            let batch = Batch::of_seed(&generator, seed + number);
            match session.run(&batch, &[manner]) {
                Ok(()) | Err(Trouble::Endless) => {}
                Err(Trouble::Host(error)) => panic!("{error}"),
                Err(Trouble::Mismatch(mismatch)) => {
                    let small = minimise(&mut session, &batch, mismatch);
                    panic!("seed {:#x}: {}", seed + number, describe(&small));
                }
            }
        }
    }

    #[test]
    fn straight() {
        compare(0, 300, Manner::Straight);
    }

    #[test]
    fn with_pages_on_demand() {
        compare(0x1_0000, 120, Manner::Demand);
    }

    #[test]
    fn with_kicks_at_random_moments() {
        compare(0x2_0000, 120, Manner::Kicked);
    }

    #[test]
    fn instruction_by_instruction() {
        compare(0x3_0000, 40, Manner::Stepped);
    }

    #[test]
    fn directly() {
        compare_with(Direct::Always, 0x4_0000, 200, Manner::Straight);
    }

    #[test]
    fn directly_with_pages_on_demand() {
        compare_with(Direct::Always, 0x5_0000, 60, Manner::Demand);
    }

    #[test]
    fn directly_with_kicks_at_random_moments() {
        compare_with(Direct::Always, 0x6_0000, 60, Manner::Kicked);
    }
}

//! What guests aren't told of doesn't exist for them, whether the host's processor has it or not.

#[cfg(test)]
mod tests {
    use ringfence_engine_bt::Direct;
    use ringfence_fuzz_differential::case::Case;
    use ringfence_fuzz_differential::case::Piece;
    use ringfence_fuzz_differential::guest::Guest;
    use ringfence_fuzz_differential::guest::MANNERS;
    use ringfence_fuzz_differential::guest::Manner;
    use ringfence_fuzz_differential::layout::DATA;
    use ringfence_fuzz_differential::random::Random;
    use ringfence_fuzz_differential::session::Batch;
    use ringfence_fuzz_differential::session::Session;
    use ringfence_fuzz_differential::state::State;

    const UNDEFINED: u64 = 6;

    /// By what they belong to.
    const HIDDEN: [(&str, &[u8]); 17] = [
        ("AVX-512", &[0x62, 0xf1, 0x7c, 0x48, 0x28, 0xc1]),
        ("AVX-512 on 128 bits", &[0x62, 0xf1, 0x7c, 0x08, 0x10, 0x06]),
        ("AVX-512 masks", &[0xc5, 0xf8, 0x92, 0xc8]),
        ("AMX", &[0xc4, 0xe2, 0x78, 0x49, 0x06]),
        ("RTM, begin", &[0xc7, 0xf8, 0, 0, 0, 0]),
        ("RTM, test", &[0x0f, 0x01, 0xd6]),
        ("RTM, abort", &[0xc6, 0xf8, 0]),
        ("TSX suspend", &[0xf2, 0x0f, 0x01, 0xe8]),
        ("SGX", &[0x0f, 0x01, 0xd7]),
        ("PCONFIG", &[0x0f, 0x01, 0xc5]),
        ("MOVDIR64B", &[0x66, 0x0f, 0x38, 0xf8, 0x06]),
        ("ENQCMD", &[0xf2, 0x0f, 0x38, 0xf8, 0x06]),
        ("WAITPKG", &[0x66, 0x0f, 0xae, 0xf0]),
        ("user interrupts", &[0xf3, 0x0f, 0x01, 0xed]),
        ("protection keys", &[0x0f, 0x01, 0xee]),
        ("CMPccXADD", &[0xc4, 0xe2, 0x61, 0xe0, 0x16]),
        ("PTWRITE", &[0xf3, 0x0f, 0xae, 0xe0]),
    ];

    #[test]
    fn hidden_instructions_are_undefined_whatever_the_host_has() {
        if let Some(reason) = Session::obstacle() {
            eprintln!("skipped: {reason}");
            return;
        }
        let cases = HIDDEN.map(|(_, code)| {
            let mut state = State {
                rflags: 0x202,
                gpr: [DATA; 16],
                ..State::default()
            };
            state.gpr[1] = 0;
            Case {
                pieces: vec![Piece::plain(code)],
                state,
            }
        });
        let batch = Batch::new(cases.to_vec(), &mut Random::new(1));
        let inputs: Vec<State> = batch.cases.iter().map(|case| case.state).collect();
        let mut guest = Guest::new().expect("a guest");
        for manner in MANNERS {
            guest.set_arena(&batch.arena());
            let found = guest.run(&inputs, manner).expect("an end");
            for ((name, _), (input, state)) in HIDDEN.iter().zip(inputs.iter().zip(&found)) {
                assert_eq!(
                    (state.trap, state.rip),
                    (UNDEFINED, input.rip),
                    "{name}, {manner:?}"
                );
            }
        }
    }

    /// Runs code that asks so many times for CPUID's leaf 0 and adds `number`, and returns what it found.
    fn ask(guest: &mut Guest, times: usize, number: u8) -> [u64; 4] {
        // Where it is in the midst of other code, what it is can be told: mov eax, 0; cpuid; mov esi, NUMBER
        let mut code = vec![0x90; 300];
        code.extend([0xb8, 0, 0, 0, 0, 0x0f, 0xa2].repeat(times));
        code.extend([0xbe, number, 0, 0, 0]);
        let state = State {
            rflags: 0x202,
            ..State::default()
        };
        let case = Case {
            pieces: vec![Piece::plain(&code)],
            state,
        };
        let batch = Batch::new(vec![case], &mut Random::new(1));
        guest.set_arena(&batch.arena());
        let inputs = [batch.cases[0].state];
        let found = guest.run(&inputs, Manner::Straight).expect("an end");
        // Code is what it was, for whoever reads it.
        assert_eq!(guest.arena(), batch.arena());
        assert_eq!(found[0].trap, 3);
        let [leaves, signature, rest] = [0, 3, 1].map(|register| found[0].gpr[register]);
        [leaves, signature, rest, found[0].gpr[6]]
    }

    #[test]
    fn code_that_runs_directly_asks_the_guests_processor_and_may_be_changed() {
        if let Some(reason) = Session::obstacle() {
            eprintln!("skipped: {reason}");
            return;
        }
        let translated = ask(&mut Guest::new().expect("a guest"), 1, 1);
        // One may be data of code that can write itself: its page is translated. Several trap.
        for (times, counter, least) in [(1, "direct_pages_held", 1), (3, "direct_traps", 15)] {
            let mut guest = Guest::with(Direct::Always).expect("a guest");
            for number in [1, 1, 2, 3, 3] {
                let found = ask(&mut guest, times, number);
                assert_eq!(found[..3], translated[..3]);
                assert_eq!(found[3], u64::from(number));
            }
            assert!(guest.counter(counter) >= least, "{times}");
        }
    }
}

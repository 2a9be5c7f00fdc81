//! The suite that every engine passes, with user code run directly wherever that is possible.

mod board;

use ringfence_conformance::Deviation;
use ringfence_engine_bt::BtEngine;
use ringfence_engine_bt::Direct;

/// Whatever the guest's CR4 says, SGDT and its like are the host's kernel's business.
const DEVIATIONS: &[Deviation] = &[Deviation {
    body: "segments::umip_keeps_table_addresses_from_user_code",
    reason: "a host's kernel with UMIP answers SGDT and SMSW with constants, as guests' kernels do",
}];

ringfence_conformance::suite!(
    BtEngine::new()
        .expect("a usable host")
        .with_direct(Direct::Always),
    Some(&board::Pc),
    DEVIATIONS,
);

#[cfg(test)]
mod tests {
    use ringfence_conformance::Bench;
    use ringfence_conformance::Guest;
    use ringfence_engine_bt::BtEngine;
    use ringfence_engine_bt::Direct;

    use super::board;

    /// Without that nothing is proved here.
    #[test]
    fn the_suites_user_code_runs_directly() {
        let engine = BtEngine::new()
            .expect("a usable host")
            .with_direct(Direct::Always);
        let bench = Bench {
            engine: &engine,
            board: Some(&board::Pc),
        };
        let mut guest = Guest::new(&bench);
        guest.run(|a| {
            let mut next = a.create_label();
            a.enter_user()?;
            a.jmp(next)?;
            a.set_label(&mut next)?;
            a.user_done()
        });
        let counters = guest.vm.counters();
        let visits = counters.iter().find(|(name, _)| *name == "direct_visits");
        assert!(visits.is_some_and(|&(_, count)| count > 0), "{counters:?}");
    }
}

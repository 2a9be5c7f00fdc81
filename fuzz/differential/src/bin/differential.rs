//! Compares the engine with the host's processor on random code:
//! `differential [--cases N] [--seed N] [--manner NAME] [--direct NAME] [--failures N]`.
//!
//! Code is translated; one batch in four is also run directly (`--direct some`; or `all`, or `none`).

#![expect(clippy::print_stdout, reason = "this is a program for the terminal")]

use std::io;
use std::process::ExitCode;
use std::time::Instant;

use ringfence_engine_bt::Direct;
use ringfence_fuzz_differential::generate::Generator;
use ringfence_fuzz_differential::guest::MANNERS;
use ringfence_fuzz_differential::guest::Manner;
use ringfence_fuzz_differential::minimise::describe;
use ringfence_fuzz_differential::minimise::minimise;
use ringfence_fuzz_differential::session::Batch;
use ringfence_fuzz_differential::session::Session;
use ringfence_fuzz_differential::session::Trouble;

struct Options {
    cases: u64,
    seed: u64,
    manners: Vec<Manner>,
    /// One batch of so many is run directly.
    direct: Option<u64>,
    keep_going: u64,
}

fn options() -> Option<Options> {
    let mut options = Options {
        cases: 1_000_000,
        seed: 1 << 32,
        manners: MANNERS.to_vec(),
        direct: Some(4),
        keep_going: 0,
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let value = arguments.next()?;
        match argument.as_str() {
            "--cases" => options.cases = value.parse().ok()?,
            "--seed" => options.seed = seed(&value)?,
            "--failures" => options.keep_going = value.parse().ok()?,
            "--direct" => {
                options.direct = match value.as_str() {
                    "none" => None,
                    "some" => Some(4),
                    "all" => Some(1),
                    _ => return None,
                }
            }
            "--manner" => {
                let wanted = |manner: &Manner| format!("{manner:?}").eq_ignore_ascii_case(&value);
                options.manners = vec![MANNERS.into_iter().find(wanted)?];
            }
            _ => return None,
        }
    }
    Some(options)
}

/// A small number starts a series; a hexadecimal one is a batch of a report.
fn seed(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse::<u64>().ok().map(|series| series << 32),
    }
}

#[derive(Default)]
struct Counts {
    done: u64,
    directly: u64,
    failures: u64,
    endless: u64,
}

/// Compares a batch, and reports what differs.
fn compare(
    session: &mut Session,
    seed: u64,
    batch: &Batch,
    manners: &[Manner],
    counts: &mut Counts,
) -> io::Result<()> {
    match session.run(batch, manners) {
        Ok(()) => {}
        Err(Trouble::Endless) => counts.endless += 1,
        Err(Trouble::Host(error)) => return Err(error),
        Err(Trouble::Mismatch(mismatch)) => {
            let small = minimise(session, batch, mismatch);
            println!("seed {seed:#x}: {}", describe(&small));
            counts.failures += 1;
        }
    }
    Ok(())
}

fn main() -> ExitCode {
    let Some(options) = options() else {
        eprintln!(
            "usage: differential [--cases N] [--seed N] [--manner NAME] [--direct none|some|all] \
             [--failures N]"
        );
        return ExitCode::from(2);
    };
    let sessions = Session::new().and_then(|translated| {
        let directly = Session::with(Direct::Always)?;
        Ok([translated, directly])
    });
    let [mut translated, mut directly] = match sessions {
        Ok(sessions) => sessions,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::FAILURE;
        }
    };
    let generator = Generator::new();
    let start = Instant::now();
    let mut counts = Counts::default();
    let mut seed = options.seed;
    while counts.done < options.cases && counts.failures <= options.keep_going {
        let batch = Batch::of_seed(&generator, seed);
        let now = options
            .direct
            .is_some_and(|every| seed.is_multiple_of(every));
        let mut sessions = vec![&mut translated];
        if now {
            sessions.push(&mut directly);
        }
        for session in sessions {
            if let Err(error) = compare(session, seed, &batch, &options.manners, &mut counts) {
                eprintln!("seed {seed:#x}: {error}");
                return ExitCode::FAILURE;
            }
        }
        counts.done += batch.cases.len() as u64;
        counts.directly += if now { batch.cases.len() as u64 } else { 0 };
        seed += 1;
    }
    let Counts {
        done,
        directly,
        failures,
        endless,
    } = counts;
    let seconds = start.elapsed().as_secs_f64();
    println!(
        "{done} cases in {} manners, {directly} of them also directly, {failures} failures, {endless} batches without end, \
         {seconds:.1} s",
        options.manners.len()
    );
    if failures > 0 {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    }
}

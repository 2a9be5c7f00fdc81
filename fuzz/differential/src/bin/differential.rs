//! Compares the engine with the host's processor on random code:
//! `differential [--cases N] [--seed N] [--manner NAME] [--keep-going]`.

#![expect(clippy::print_stdout, reason = "this is a program for the terminal")]

use std::process::ExitCode;
use std::time::Instant;

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
    keep_going: u64,
}

fn options() -> Option<Options> {
    let mut options = Options {
        cases: 1_000_000,
        seed: 1 << 32,
        manners: MANNERS.to_vec(),
        keep_going: 0,
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let value = arguments.next()?;
        match argument.as_str() {
            "--cases" => options.cases = value.parse().ok()?,
            "--seed" => options.seed = seed(&value)?,
            "--failures" => options.keep_going = value.parse().ok()?,
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

fn main() -> ExitCode {
    let Some(options) = options() else {
        eprintln!("usage: differential [--cases N] [--seed N] [--manner NAME] [--failures N]");
        return ExitCode::from(2);
    };
    let mut session = match Session::new() {
        Ok(session) => session,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::FAILURE;
        }
    };
    let generator = Generator::new();
    let start = Instant::now();
    let (mut done, mut failures, mut endless) = (0_u64, 0_u64, 0_u64);
    let mut seed = options.seed;
    while done < options.cases {
        let batch = Batch::of_seed(&generator, seed);
        match session.run(&batch, &options.manners) {
            Ok(()) => {}
            Err(Trouble::Endless) => endless += 1,
            Err(Trouble::Host(error)) => {
                eprintln!("seed {seed:#x}: {error}");
                return ExitCode::FAILURE;
            }
            Err(Trouble::Mismatch(mismatch)) => {
                let small = minimise(&mut session, &batch, mismatch);
                println!("seed {seed:#x}: {}", describe(&small));
                failures += 1;
                if failures > options.keep_going {
                    break;
                }
            }
        }
        done += batch.cases.len() as u64;
        seed += 1;
    }
    let seconds = start.elapsed().as_secs_f64();
    println!(
        "{done} cases in {} manners, {failures} failures, {endless} batches without end, \
         {seconds:.1} s",
        options.manners.len()
    );
    if failures > 0 {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    }
}

//! Making a failing batch small.

use crate::case::Case;
use crate::case::Piece;
use crate::encodings::decoder_options;
use crate::guest::Manner;
use crate::session::Batch;
use crate::session::Mismatch;
use crate::session::Session;
use crate::session::Trouble;

/// A small batch that still fails, and how it does.
pub struct Small {
    /// The batch.
    pub batch: Batch,
    /// What differs.
    pub mismatch: Mismatch,
}

fn fails(session: &mut Session, batch: &Batch, manner: Manner) -> Option<Mismatch> {
    // Kicks come at random moments: they get more tries.
    let tries = if manner == Manner::Kicked { 60 } else { 1 };
    for _ in 0..tries {
        match session.run(batch, &[manner]) {
            Err(Trouble::Mismatch(mismatch)) => return Some(mismatch),
            Err(Trouble::Host(_) | Trouble::Endless) => return None,
            Ok(()) => {}
        }
    }
    None
}

/// Makes `batch`, which failed with `mismatch`, as small as it gets.
pub fn minimise(session: &mut Session, batch: &Batch, mismatch: Mismatch) -> Small {
    let mut small = Small {
        batch: batch.clone(),
        mismatch,
    };
    let manner = small.mismatch.manner;
    if let Some(last) = small.mismatch.case {
        let alone = Batch {
            cases: vec![batch.cases[last].clone()],
            ..batch.clone()
        };
        adopt(session, &mut small, alone, manner);
    }
    drop_cases(session, &mut small, manner);
    for case in (0..small.batch.cases.len()).rev() {
        for piece in (0..small.batch.cases[case].pieces.len()).rev() {
            let mut shorter = small.batch.clone();
            let pieces = &mut shorter.cases[case].pieces;
            if pieces[piece].bytes.is_empty() {
                continue;
            }
            pieces[piece] = Piece::default();
            adopt(session, &mut small, shorter, manner);
        }
    }
    small
}

fn adopt(session: &mut Session, small: &mut Small, batch: Batch, manner: Manner) -> bool {
    let found = fails(session, &batch, manner);
    let fails = found.is_some();
    if let Some(mismatch) = found {
        *small = Small { batch, mismatch };
    }
    fails
}

/// Takes cases out, many at a time first.
fn drop_cases(session: &mut Session, small: &mut Small, manner: Manner) {
    let mut chunk = small.batch.cases.len() / 2;
    while chunk > 0 {
        let mut at = 0;
        while at < small.batch.cases.len() && small.batch.cases.len() > 1 {
            let end = (at + chunk).min(small.batch.cases.len());
            let mut fewer = small.batch.clone();
            fewer.cases.drain(at..end);
            if fewer.cases.is_empty() || !adopt(session, small, fewer, manner) {
                at = end;
            }
        }
        chunk /= 2;
    }
}

/// Everything that a report needs.
#[must_use]
pub fn describe(small: &Small) -> String {
    let mut text = format!(
        "{:?}, memory {:#x}, case {:?}\n",
        small.mismatch.manner, small.batch.memory, small.mismatch.case
    );
    for difference in &small.mismatch.differences {
        text += &format!("  {difference}\n");
    }
    for (index, case) in small.batch.cases.iter().enumerate() {
        text += &format!("case {index}:\n{}", case.listing());
        let names = [
            "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11",
            "r12", "r13", "r14", "r15",
        ];
        for (name, value) in names.iter().zip(case.state.gpr) {
            text += &format!(" {name}={value:x}");
        }
        if uses_vectors(case) {
            text += &format!(" x87={:02x?}\n", &case.state.xsave[..160]);
            text += &format!(" xmm={:02x?}\n", &case.state.xsave[160..416]);
            text += &format!(" ymm={:02x?}\n", &case.state.xsave[576..]);
        }
        text += &format!(
            " flags={:x} fs={:x} gs={:x}\n",
            case.state.rflags, case.state.fs_base, case.state.gs_base
        );
    }
    text
}

/// Whether the case names more than general registers.
fn uses_vectors(case: &Case) -> bool {
    let code = case.code();
    let mut decoder = iced_x86::Decoder::new(64, &code, decoder_options());
    decoder.iter().any(|instruction| {
        let mut features = instruction.cpuid_features().iter();
        !features.all(|feature| format!("{feature:?}").starts_with("INTEL"))
    })
}

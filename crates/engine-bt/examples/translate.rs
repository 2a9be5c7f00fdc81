//! Lists the translation of machine code given in hexadecimal:
//! `cargo run --example translate -- 4889e5 kernel`.

use std::process::ExitCode;

use ringfence_engine_bt::Listing;
use ringfence_engine_bt::list_translation;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let Some(code) = arguments.first().and_then(|text| parse(text)) else {
        eprintln!("usage: translate HEX [kernel] [32] [plain]");
        return ExitCode::from(2);
    };
    let has = |word: &str| arguments.iter().any(|argument| argument == word);
    let listing = Listing {
        bits: if has("32") { 32 } else { 64 },
        user: !has("kernel"),
        plain: has("plain"),
        ..Listing::default()
    };
    #[expect(clippy::print_stdout, reason = "this is what the example is for")]
    {
        print!("{}", list_translation(&code, listing));
    }
    ExitCode::SUCCESS
}

fn parse(text: &str) -> Option<Vec<u8>> {
    let digits: Vec<u8> = text
        .bytes()
        .filter(|byte| !byte.is_ascii_whitespace())
        .collect();
    digits
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok())
        .collect()
}

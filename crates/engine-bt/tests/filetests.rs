//! Translations as they must be: `filetests/*.txt` hold guest code and the listing of what it
//! becomes. `RINGFENCE_BLESS=1` rewrites the listings.
//!
//! A file is a comment (`#`), options (`options: kernel 32 plain no-pext offset=4090`), one line of code in
//! hexadecimal an instruction (anything behind `;` is for the reader), a line `---`, and the
//! listing.

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::path::PathBuf;

    use ringfence_engine_bt::Listing;
    use ringfence_engine_bt::list_translation;

    const DIVIDER: &str = "---\n";

    fn options(text: &str) -> Listing {
        let mut listing = Listing::default();
        for word in text.split_whitespace() {
            match word.split_once('=') {
                Some(("offset", value)) => {
                    listing.offset = value.parse().expect("an offset in the page");
                }
                _ => match word {
                    "kernel" => listing.user = false,
                    "32" => listing.bits = 32,
                    "plain" => listing.plain = true,
                    "no-pext" => listing.fast_pext = false,
                    other => panic!("unknown option {other}"),
                },
            }
        }
        listing
    }

    /// The listing of a file's code.
    fn translate(source: &str) -> String {
        let mut listing = Listing::default();
        let mut code = Vec::new();
        for line in source.lines() {
            let line = line.split([';', '#']).next().unwrap_or("").trim();
            if let Some(words) = line.strip_prefix("options:") {
                listing = options(words);
                continue;
            }
            let digits: Vec<u8> = line.bytes().filter(|byte| *byte != b' ').collect();
            for pair in digits.chunks(2) {
                let pair = std::str::from_utf8(pair).expect("digits");
                code.push(u8::from_str_radix(pair, 16).expect("hexadecimal code"));
            }
        }
        list_translation(&code, listing)
    }

    fn files() -> Vec<PathBuf> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("filetests");
        let mut files: Vec<_> = std::fs::read_dir(folder)
            .expect("the folder of filetests")
            .map(|entry| entry.expect("an entry").path())
            .filter(|path| path.extension().is_some_and(|end| end == "txt"))
            .collect();
        files.sort();
        files
    }

    #[test]
    fn code_becomes_what_its_file_says() {
        let bless = std::env::var_os("RINGFENCE_BLESS").is_some();
        let files = files();
        assert!(files.len() >= 10, "the filetests are gone");
        let mut wrong = Vec::new();
        for file in files {
            let text = std::fs::read_to_string(&file).expect("a readable file");
            let (source, expected) = text.split_once(DIVIDER).unwrap_or((text.as_str(), ""));
            let found = translate(source);
            if bless {
                std::fs::write(&file, format!("{source}{DIVIDER}{found}"))
                    .expect("a writable file");
            } else if found != expected {
                wrong.push(format!("{}:\n{found}", file.display()));
            }
        }
        assert!(
            wrong.is_empty(),
            "other translations than expected (RINGFENCE_BLESS=1 takes them):\n{}",
            wrong.join("\n")
        );
    }
}

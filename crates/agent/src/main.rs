//! `ringfence-agent`: see the library.

use ringfence_agent::address::Address;
use ringfence_agent::boot;
use std::path::PathBuf;
use std::process::ExitCode;

const USAGE: &str = "usage: ringfence-agent --listen unix:PATH [--connect unix:PATH] | --contained
It is a guest's first process. As another process it serves UNIX sockets, for tests. With --contained it is a
container's first process: its standard input is the socket to serve, its standard output a pipe whose other
end's closing ends it.";

fn main() -> ExitCode {
    // As the first process it never returns while the guest can be spoken to; the kernel panics if it
    // does, which the host sees with the reason on the console.
    let ran = if std::env::args().nth(1).as_deref() == Some("--contained") {
        boot::contained()
    } else if rustix::process::getpid().is_init() {
        boot::init()
    } else {
        let Some(address) = parse(std::env::args().skip(1)) else {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        };
        boot::hosted(&address)
    };
    match ran {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ringfence-agent: {error}");
            ExitCode::FAILURE
        }
    }
}

fn parse(mut words: impl Iterator<Item = String>) -> Option<Address> {
    let (mut listen, mut connect) = (None, None);
    while let Some(word) = words.next() {
        let place = match word.as_str() {
            "--listen" => &mut listen,
            "--connect" => &mut connect,
            _ => return None,
        };
        *place = Some(PathBuf::from(words.next()?.strip_prefix("unix:")?));
    }
    Some(Address::Unix {
        listen: listen?,
        connect,
    })
}

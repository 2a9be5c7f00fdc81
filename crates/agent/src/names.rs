//! The guest's name and the files that names are looked up in.

use crate::error::AgentError;
use crate::error::Tried;
use crate::message::Setup;
use crate::message::Writable;
use crate::place::bind;
use crate::place::make_directory;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

/// Where files lie that are shown over those of a root that isn't to be changed.
const SHOWN: &str = "/run/ringfence-etc";

/// Sets the name and writes /etc/hostname, /etc/hosts and, when there are name servers,
/// /etc/resolv.conf.
///
/// # Errors
///
/// The name is too long, or a file can't be written.
pub(crate) fn set(setup: &Setup) -> Result<(), AgentError> {
    rustix::system::sethostname(setup.hostname.as_bytes())
        .tried(|| format!("cannot take the name {}", setup.hostname))?;
    let memory = setup.root.writable == Writable::Overlay;
    write("hostname", &format!("{}\n", setup.hostname), memory)?;
    write("hosts", &hosts(setup), memory)?;
    let resolv = resolv(setup);
    if !resolv.is_empty() {
        write("resolv.conf", &resolv, memory)?;
    }
    Ok(())
}

fn hosts(setup: &Setup) -> String {
    let mut text = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n".to_owned();
    if !setup.hosts.contains_key(&setup.hostname) {
        let _infallible = writeln!(text, "127.0.1.1\t{}", setup.hostname);
    }
    for (name, address) in &setup.hosts {
        let _infallible = writeln!(text, "{address}\t{name}");
    }
    text
}

fn resolv(setup: &Setup) -> String {
    let mut text = String::new();
    let search: Vec<_> = setup.interfaces.iter().flat_map(|at| &at.search).collect();
    if let [first, rest @ ..] = search.as_slice() {
        let _infallible = write!(text, "search {first}");
        for name in rest {
            let _infallible = write!(text, " {name}");
        }
        text.push('\n');
    }
    for server in setup.interfaces.iter().flat_map(|at| &at.dns) {
        let _infallible = writeln!(text, "nameserver {server}");
    }
    text
}

/// Writes a file of /etc: in place when the root is in memory, else over it, so that a disk or
/// directory of the user's doesn't change.
fn write(name: &str, text: &str, memory: bool) -> Result<(), AgentError> {
    let what = || format!("cannot write /etc/{name}");
    let target = Path::new("/etc").join(name);
    if memory {
        make_directory(Path::new("/etc"))?;
        // It may be a link to what a service would have made.
        let _missing = fs::remove_file(&target);
        return fs::write(&target, text).tried(what);
    }
    make_directory(Path::new(SHOWN))?;
    let shown = Path::new(SHOWN).join(name);
    fs::write(&shown, text).tried(what)?;
    match (fs::canonicalize(&target), fs::read_link(&target)) {
        (Ok(file), _) => bind(&shown, &file, false),
        // A link to what a service would have made below /run, which is memory.
        (Err(_), Ok(link)) => {
            let file = Path::new("/etc").join(link);
            if let Some(folder) = file.parent() {
                let _read_only = make_directory(folder);
            }
            let _read_only = fs::write(file, text);
            Ok(())
        }
        // A root without it, which can't have it: programs do without.
        (Err(_), Err(_)) => Ok(()),
    }
}

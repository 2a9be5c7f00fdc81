//! What others are told of translated code: `perf`, readers of a trace, and reports of a bug.

use std::fs::File;
use std::io::Write;
use std::sync::Mutex;
use std::sync::PoisonError;

use ringfence_engine::EngineError;

use crate::block::NewBlock;
use crate::block::PageKey;
use crate::core::Core;
use crate::listing;
use crate::ram::read_raw;
use crate::translate::PAGE_BYTES;
use crate::translate::Request;
use crate::translate::decode::Item;
use crate::walk::Access;

/// A guest that makes code all day fills no disk: names and listings that come later are left out.
const MOST_NAMES: u64 = 64 << 20;
const MOST_LISTINGS: u64 = 1 << 30;

/// Who is told: nobody, unless asked for.
#[derive(Debug, Default)]
pub(crate) struct Notes {
    perf_map: Option<Lines>,
    trace: Option<Lines>,
}

/// A file that takes text up to a limit.
#[derive(Debug)]
struct Lines(Mutex<(File, u64)>);

impl Lines {
    fn new(file: &File, most: u64) -> Result<Self, EngineError> {
        let file = file
            .try_clone()
            .map_err(EngineError::host("duplicate a file for the engine's notes"))?;
        Ok(Self(Mutex::new((file, most))))
    }

    fn add(&self, text: &str) {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (file, left) = &mut *held;
        match left.checked_sub(text.len() as u64) {
            // A full disk costs a note, not the machine.
            Some(rest) if file.write_all(text.as_bytes()).is_ok() => *left = rest,
            _ => *left = 0,
        }
    }
}

impl Notes {
    /// Tells those for whom a file is given.
    pub(crate) fn new(perf_map: Option<&File>, trace: Option<&File>) -> Result<Self, EngineError> {
        Ok(Self {
            perf_map: perf_map
                .map(|file| Lines::new(file, MOST_NAMES))
                .transpose()?,
            trace: trace
                .map(|file| Lines::new(file, MOST_LISTINGS))
                .transpose()?,
        })
    }

    /// Somebody wants to know names.
    pub(crate) fn has_names(&self) -> bool {
        self.perf_map.is_some()
    }

    /// Names code for `perf`: `len` bytes at host address `start`, of the block at `guest`.
    pub(crate) fn name(&self, start: u64, len: u32, key: PageKey, guest: u16) {
        if let Some(lines) = &self.perf_map {
            let ring = ring(key);
            let place = key.gpa + u64::from(guest);
            lines.add(&format!("{start:x} {len:x} guest_{ring}_{place:x}\n"));
        }
    }

    /// Lists a new block, which starts at guest address `address`.
    pub(crate) fn list(
        &self,
        address: u64,
        key: PageKey,
        items: &[Item],
        block: &NewBlock,
        starts: &[usize],
    ) {
        if let Some(lines) = &self.trace {
            let ring = ring(key);
            let place = key.gpa + u64::from(block.guest);
            let text = listing::render(block, items, starts);
            lines.add(&format!(
                "# {ring} code at {address:#x}, physical {place:#x}\n{text}\n"
            ));
        }
    }
}

fn ring(key: PageKey) -> &'static str {
    if key.mode.is_user() { "user" } else { "kernel" }
}

impl Core {
    /// What a report of a bug has beside the registers: where translated code was, and what it is
    /// at the instruction pointer.
    pub(crate) fn diagnosis(&self) -> String {
        let hot = self.hot();
        let fault = format!(
            "last host fault: trap {} at {:#x}, address {:#x}\n",
            hot.fault_signal, hot.fault_pc, hot.fault_address
        );
        let origin = self.shared.code.locate(hot.fault_pc).map(|(block, _)| {
            format!(
                "it was in the translation of physical {:#x}\n",
                block.key.gpa + u64::from(block.guest)
            )
        });
        let mode = format!("user: {}, direct: {}\n", self.is_user(), self.is_direct());
        format!(
            "{mode}{fault}{}{}",
            origin.unwrap_or_default(),
            self.list_here().unwrap_or_default()
        )
    }

    /// The translation of the block at the instruction pointer, as it would be made now.
    fn list_here(&self) -> Option<String> {
        let linear = self.linear_rip(self.rip);
        let found = self
            .paging()
            .translate(
                &self.shared.ram,
                linear,
                Access::Fetch,
                self.is_user(),
                false,
            )
            .ok()?;
        let host = self
            .shared
            .ram
            .host(found.gpa & !0xfff, PAGE_BYTES as u64)?;
        let mut page = [0; PAGE_BYTES];
        // SAFETY: a page of RAM.
        #[expect(unsafe_code, reason = "guest memory is reached by pointer")]
        unsafe {
            read_raw(host, &mut page);
        }
        let request = Request {
            page: &page,
            offset: u16::try_from(linear & 0xfff).ok()?,
            mode: self.mode,
            host: self.shared.host,
            plain_tsc: self.has_plain_tsc(),
        };
        Some(format!(
            "code at {linear:#x}:\n{}",
            listing::list(&request, false)
        ))
    }
}

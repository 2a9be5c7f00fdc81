//! The ELF image: what to place where, and by which entry points it can be started.
//!
//! Spec: System V ABI, "Program Header" and "Note Section"; xen/include/public/elfnote.h.

use object::Endianness;
use object::ReadCache;
use object::elf::EM_386;
use object::elf::EM_X86_64;
use object::elf::ET_DYN;
use object::elf::ET_EXEC;
use object::elf::FileHeader32;
use object::elf::FileHeader64;
use object::elf::PT_LOAD;
use object::elf::PT_NOTE;
use object::read::elf::FileHeader;
use object::read::elf::ProgramHeader;

use crate::LoadError;
use crate::source::Cursor;
use crate::source::Source;

/// Program headers and notes that a kernel has are far fewer; more is a damaged or hostile file.
const MAX_PROGRAM_HEADERS: u16 = 64;
const MAX_NOTE_BYTES: u64 = 64 << 10;

const ELF_MAGIC: &[u8] = b"\x7fELF";
const CLASS_OFFSET: usize = 4;
const CLASS_32: u8 = 1;

/// Xen's note that names the PVH entry point, a 32-bit physical address.
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
const XEN_ELFNOTE_GUEST_OS: u32 = 6;

/// A run of the image and its place in guest physical memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    /// Where its bytes start in the image.
    pub(crate) file_offset: u64,
    /// How many bytes the image has of it; the rest of `mem_len` is zeros.
    pub(crate) file_len: u64,
    /// First guest physical address.
    pub(crate) start: u64,
    /// Length in guest memory.
    pub(crate) mem_len: u64,
}

impl Segment {
    /// First address past it; segments that pass 64 bits are refused when read.
    pub(crate) fn end(&self) -> u64 {
        self.start.saturating_add(self.mem_len)
    }
}

/// A parsed ELF kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ElfImage {
    /// The header's entry point.
    pub(crate) entry: u64,
    /// The runs to place, as in the file.
    pub(crate) segments: Vec<Segment>,
    /// The PVH entry point.
    pub(crate) pvh_entry: Option<u32>,
    /// The notes say that it is Linux.
    pub(crate) is_linux: bool,
    /// It is an ELF-64 image for x86-64.
    pub(crate) is_64_bit: bool,
}

/// Whether the file is an ELF image.
pub(crate) fn is_elf(start: &[u8]) -> bool {
    start.starts_with(ELF_MAGIC)
}

/// Parses and checks an ELF kernel.
pub(crate) fn parse(source: &Source) -> Result<ElfImage, LoadError> {
    let class = source.read_vec("the ELF header", 0, 16)?[CLASS_OFFSET];
    let cache = ReadCache::new(source.cursor());
    let image = if class == CLASS_32 {
        parse_class::<FileHeader32<Endianness>>(source, &cache)?
    } else {
        parse_class::<FileHeader64<Endianness>>(source, &cache)?
    };
    Ok(image)
}

fn parse_class<Elf>(source: &Source, cache: &ReadCache<Cursor<'_>>) -> Result<ElfImage, LoadError>
where
    Elf: FileHeader<Endian = Endianness>,
{
    let damaged = |_| LoadError::Damaged("its ELF header is not valid");
    let header = Elf::parse(cache).map_err(damaged)?;
    let endian = header.endian().map_err(damaged)?;
    match header.e_machine(endian) {
        EM_X86_64 | EM_386 if endian == Endianness::Little => {}
        _ => return Err(LoadError::Unsupported("it is for another processor")),
    }
    if !matches!(header.e_type(endian), ET_EXEC | ET_DYN) {
        return Err(LoadError::Unsupported(
            "its ELF type is neither an executable nor a shared object (an object file or a core)",
        ));
    }
    if header.e_phnum(endian) > MAX_PROGRAM_HEADERS {
        return Err(LoadError::Damaged("it has too many program headers"));
    }
    let mut image = ElfImage {
        entry: header.e_entry(endian).into(),
        segments: Vec::new(),
        pvh_entry: None,
        is_linux: false,
        is_64_bit: header.e_machine(endian) == EM_X86_64,
    };
    let headers = header
        .program_headers(endian, cache)
        .map_err(|_| LoadError::Damaged("its program headers are not in the file"))?;
    for program in headers {
        match program.p_type(endian) {
            PT_LOAD => image
                .segments
                .extend(load_segment(source, program, endian)?),
            PT_NOTE => read_notes(program, endian, cache, &mut image),
            _ => {}
        }
    }
    if image.segments.is_empty() {
        return Err(LoadError::Damaged("it has nothing to load"));
    }
    Ok(image)
}

/// A loadable segment, or nothing when it takes no memory.
fn load_segment<P: ProgramHeader<Endian = Endianness>>(
    source: &Source,
    program: &P,
    endian: Endianness,
) -> Result<Option<Segment>, LoadError> {
    let segment = Segment {
        file_offset: program.p_offset(endian).into(),
        file_len: program.p_filesz(endian).into(),
        start: program.p_paddr(endian).into(),
        mem_len: program.p_memsz(endian).into(),
    };
    if segment.mem_len == 0 {
        return Ok(None);
    }
    if segment.file_len > segment.mem_len {
        return Err(LoadError::Damaged(
            "a segment has more bytes in the file than in memory",
        ));
    }
    if segment.start.checked_add(segment.mem_len).is_none() {
        return Err(LoadError::Damaged(
            "a segment passes the end of the address space",
        ));
    }
    source.check("a segment", segment.file_offset, segment.file_len)?;
    Ok(Some(segment))
}

/// Looks for the notes that say how to enter. Damaged notes are as good as none: they only ever
/// add a way to start.
fn read_notes<P: ProgramHeader<Endian = Endianness>>(
    program: &P,
    endian: Endianness,
    cache: &ReadCache<Cursor<'_>>,
    image: &mut ElfImage,
) {
    if program.p_filesz(endian).into() > MAX_NOTE_BYTES {
        return;
    }
    let Ok(Some(mut notes)) = program.notes(endian, cache) else {
        return;
    };
    while let Ok(Some(note)) = notes.next() {
        match (note.name(), note.n_type(endian)) {
            (b"Xen", XEN_ELFNOTE_PHYS32_ENTRY) => {
                // Linux writes 8 bytes, others 4: the address is 32 bits wide either way.
                let address = note.desc().first_chunk::<4>().copied();
                image.pvh_entry = address.map(u32::from_le_bytes);
            }
            (b"Xen", XEN_ELFNOTE_GUEST_OS) => {
                image.is_linux |= note.desc().strip_suffix(b"\0") == Some(b"linux");
            }
            (b"Linux", _) => image.is_linux = true,
            _ => {}
        }
    }
}

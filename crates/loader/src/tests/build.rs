//! Builds ELF images and bzImages for the tests.

/// A note: owner, type, content.
type Note = (&'static str, u32, Vec<u8>);

/// An ELF image under construction.
#[derive(Clone)]
pub(super) struct ElfBuilder {
    pub(super) class_64: bool,
    pub(super) machine: u16,
    pub(super) kind: u16,
    pub(super) entry: u64,
    /// Address, bytes, length in memory.
    pub(super) segments: Vec<(u64, Vec<u8>, u64)>,
    pub(super) notes: Vec<Note>,
}

pub(super) const PVH_NOTE: u32 = 18;
pub(super) const GUEST_OS_NOTE: u32 = 6;

impl ElfBuilder {
    /// A kernel of one page at 16 MiB, entered at its start.
    pub(super) fn minimal() -> Self {
        Self {
            class_64: true,
            machine: 62,
            kind: 2,
            entry: 0x100_0000,
            segments: vec![(0x100_0000, vec![0xf4; 4096], 4096)],
            notes: Vec::new(),
        }
    }

    pub(super) fn with_note(mut self, owner: &'static str, kind: u32, content: &[u8]) -> Self {
        self.notes.push((owner, kind, content.to_vec()));
        self
    }

    pub(super) fn build(&self) -> Vec<u8> {
        let (header_len, program_len) = if self.class_64 { (64, 56) } else { (52, 32) };
        let notes = self.note_bytes();
        let count = self.segments.len() + 1;
        let mut offset = (header_len + program_len * count) as u64;
        let mut programs = Vec::new();
        let mut content = Vec::new();
        for (address, bytes, mem_len) in &self.segments {
            programs.extend(self.program(1, offset, *address, bytes.len() as u64, *mem_len));
            offset += bytes.len() as u64;
            content.extend_from_slice(bytes);
        }
        programs.extend(self.program(4, offset, 0, notes.len() as u64, notes.len() as u64));
        content.extend(notes);
        [self.header(count as u16), programs, content].concat()
    }

    fn word(&self, value: u64) -> Vec<u8> {
        if self.class_64 {
            value.to_le_bytes().to_vec()
        } else {
            (value as u32).to_le_bytes().to_vec()
        }
    }

    fn header(&self, programs: u16) -> Vec<u8> {
        let class = if self.class_64 { 2 } else { 1 };
        let (header_len, program_len): (u16, u16) = if self.class_64 { (64, 56) } else { (52, 32) };
        let mut out = vec![
            0x7f, b'E', b'L', b'F', class, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0,
        ];
        out.extend(self.kind.to_le_bytes());
        out.extend(self.machine.to_le_bytes());
        out.extend(1_u32.to_le_bytes());
        out.extend(self.word(self.entry));
        out.extend(self.word(u64::from(header_len)));
        out.extend(self.word(0));
        out.extend(0_u32.to_le_bytes());
        for field in [header_len, program_len, programs, 0, 0, 0] {
            out.extend(field.to_le_bytes());
        }
        out
    }

    fn program(&self, kind: u32, offset: u64, address: u64, file: u64, mem: u64) -> Vec<u8> {
        let mut out = kind.to_le_bytes().to_vec();
        if self.class_64 {
            out.extend(7_u32.to_le_bytes());
        }
        for field in [offset, address, address, file, mem] {
            out.extend(self.word(field));
        }
        if !self.class_64 {
            out.extend(7_u32.to_le_bytes());
        }
        out.extend(self.word(4));
        out
    }

    fn note_bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for (owner, kind, content) in &self.notes {
            out.extend((owner.len() as u32 + 1).to_le_bytes());
            out.extend((content.len() as u32).to_le_bytes());
            out.extend(kind.to_le_bytes());
            out.extend(owner.as_bytes());
            out.push(0);
            out.resize(out.len().next_multiple_of(4), 0);
            out.extend(content);
            out.resize(out.len().next_multiple_of(4), 0);
        }
        out
    }
}

/// Setup code of one sector, a protocol 2.15 header, and `payload`.
pub(super) fn bzimage(payload: &[u8]) -> Vec<u8> {
    let mut out = vec![0; 1024];
    out[0x1f1] = 1;
    out[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    out[0x200..0x202].copy_from_slice(&[0xeb, 0x6a]);
    out[0x202..0x206].copy_from_slice(b"HdrS");
    out[0x206..0x208].copy_from_slice(&0x020f_u16.to_le_bytes());
    out[0x211] = 1;
    out[0x22c..0x230].copy_from_slice(&0x7fff_ffff_u32.to_le_bytes());
    out[0x236..0x238].copy_from_slice(&1_u16.to_le_bytes());
    out[0x238..0x23c].copy_from_slice(&2047_u32.to_le_bytes());
    out[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    out.extend_from_slice(payload);
    out
}

/// `plain` as a gzip payload of stored blocks.
pub(super) fn gzip(plain: &[u8]) -> Vec<u8> {
    use std::io::Write;
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(plain).expect("memory");
    encoder.finish().expect("memory")
}

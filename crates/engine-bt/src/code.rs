//! The code cache: translated blocks, their side tables, and the maps that lead to them.
//!
//! Code lies in a memfd mapped twice, once to write and once to execute; no page is ever both.
//! Blocks are appended; a block dies by being taken out of its page's map, and its bytes are
//! reclaimed when the whole cache is emptied. Blocks belong to the guest *physical* page that
//! their code came from, so that every process that maps a page shares its translation. Code is
//! position-independent in guest virtual space for the same reason: it finds its page's address in
//! [`crate::hot::Hot::pc_base`].
//!
//! Jumps within a page are linked directly. Nothing links across pages: such transfers go through
//! the code tables, which follow the guest's own address translation, so a remap needs no search.

// UNSAFETY: writes machine code and the maps that lead to it.
#![expect(
    unsafe_code,
    reason = "code and maps are raw memory that other threads execute and read"
)]

mod changes;

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;

use crate::block::BODY_ENTRY;
use crate::block::Block;
use crate::block::Link;
use crate::block::NewBlock;
use crate::block::POLL_ENTRY;
use crate::block::PageKey;
use crate::block::Site;
use crate::host::Host;
use crate::hot::GATES;
use crate::hot::Gate;
use crate::hot::hot;
use crate::mapping::Reservation;
use crate::mapping::memory_file;
use crate::mode::Mode;
use crate::notes::Notes;
use crate::shared::Shared;
use crate::translate::asm::Asm;
use crate::translate::asm::Mem;
use crate::translate::crossing::Routine;
use crate::translate::crossing::build;
use crate::translate::crossing::routines;
use crate::window::BLOCKS_BYTES;

/// Elements of a page's map, one a byte.
const MAP_ELEMENTS: usize = 4096;
const MAP_BYTES: u64 = MAP_ELEMENTS as u64 * 4;
/// Most pages with translated code at a time.
const MAX_MAPS: u64 = 16 << 10;
const BLOCK_ALIGNMENT: u32 = 16;

struct Page {
    map: u64,
    blocks: Vec<u32>,
    /// Blocks without groups, by guest offset.
    plain: HashMap<u16, u32>,
    /// Which 64-byte parts hold translated code.
    parts: u64,
    /// Translations under way: until they are installed, the whole page counts as code.
    pending: u32,
    /// Counts invalidations; its upper half is the generation that the page belongs to.
    version: u64,
}

struct InstalledLink {
    block: u32,
    link: Link,
}

#[derive(Default)]
struct Inner {
    next: u32,
    /// The rarely run parts of blocks lie at the end of the cache and grow downwards: what runs
    /// often stays close together.
    cold: u32,
    blocks: Vec<Block>,
    sites: Vec<(u32, Site)>,
    links: Vec<InstalledLink>,
    pages: HashMap<PageKey, Page>,
    modes: HashMap<u64, Vec<Mode>>,
    maps: u64,
    scratch: HashMap<Vec<u8>, u64>,
}

/// The code cache is full: it must be emptied before more is translated.
#[derive(Debug)]
pub(crate) struct Full;

/// All translated code of one machine.
pub(crate) struct CodeCache {
    writable: Reservation,
    executable: Reservation,
    size: u32,
    block_table: Reservation,
    blocks_file: OwnedFd,
    maps: Reservation,
    inner: Mutex<Inner>,
    generation: AtomicU32,
    clearing: AtomicBool,
    notes: Arc<Notes>,
    trampolines: [u32; GATES],
    routines: HashMap<Routine, u32>,
    first_free: u32,
}

/// Two views of memory for code: to write, and to run. `perf` looks for names only in memory that
/// no file stands for.
fn views(size: u64, named: bool) -> io::Result<(Reservation, Reservation)> {
    if named {
        let writable = Reservation::shared(size)?;
        let executable = writable.executable_view()?;
        return Ok((writable, executable));
    }
    let file = memory_file(c"ringfence-bt-code", size)?;
    Ok((
        Reservation::of_file(&file, size, libc::PROT_READ | libc::PROT_WRITE)?,
        Reservation::of_file(&file, size, libc::PROT_READ | libc::PROT_EXEC)?,
    ))
}

impl CodeCache {
    /// An empty cache of at most `size` bytes of code, which tells `notes` what it holds.
    pub(crate) fn new(size: u32, host: Host, notes: Arc<Notes>) -> io::Result<Self> {
        let (writable, executable) = views(u64::from(size), notes.has_names())?;
        let blocks_file = memory_file(c"ringfence-bt-blocks", BLOCKS_BYTES as u64)?;
        let block_table = Reservation::of_file(
            &blocks_file,
            BLOCKS_BYTES as u64,
            libc::PROT_READ | libc::PROT_WRITE,
        )?;
        let mut cache = Self {
            writable,
            executable,
            size,
            block_table,
            blocks_file,
            maps: Reservation::zeroed(MAX_MAPS * MAP_BYTES)?,
            inner: Mutex::default(),
            generation: AtomicU32::new(0),
            clearing: AtomicBool::new(false),
            notes,
            trampolines: [0; GATES],
            routines: HashMap::new(),
            first_free: 0,
        };
        cache.write_trampolines();
        cache.write_routines(host);
        cache.reset(&mut cache.lock());
        Ok(cache)
    }

    fn write_trampolines(&mut self) {
        let mut asm = Asm::default();
        for gate in 0..GATES {
            self.trampolines[gate] = u32_of(asm.here());
            asm.jmp_mem(Mem::gs(hot!(gates, gate)));
        }
        self.write(0, &asm.code);
        self.first_free = u32_of(asm.here());
    }

    fn write_routines(&mut self, host: Host) {
        for routine in routines() {
            let start = self.first_free.next_multiple_of(BLOCK_ALIGNMENT);
            let block = build(routine, host);
            let place = Block::at(start, u32_of(block.code.len()));
            let code = self.relocate(&Inner::default(), &block, &place);
            self.write(start, &code);
            self.routines.insert(routine, start);
            self.first_free = start + place.len;
        }
    }

    fn reset(&self, inner: &mut Inner) {
        *inner = Inner {
            next: self.first_free,
            cold: self.size,
            // Map 0 is the miss map: all its elements are block 0.
            maps: 1,
            ..Inner::default()
        };
        self.maps.discard(self.maps.start(), MAX_MAPS * MAP_BYTES);
        self.block_table
            .discard(self.block_table.start(), BLOCKS_BYTES as u64);
        self.set_block(0, self.trampolines[Gate::Miss as usize]);
        inner.blocks.push(Block::at(0, self.first_free));
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The block table's file, for the windows.
    pub(crate) fn blocks_file(&self) -> &OwnedFd {
        &self.blocks_file
    }

    /// The map that leads nowhere.
    pub(crate) fn miss_map(&self) -> u64 {
        self.maps.start()
    }

    /// Changes whenever all code was dropped.
    pub(crate) fn generation(&self) -> u32 {
        self.generation.load(Ordering::SeqCst)
    }

    /// Address range of executable code, for the signal handler.
    pub(crate) fn range(&self) -> (u64, u64) {
        let start = self.executable.start();
        (start, start + u64::from(self.size))
    }

    /// Bytes of code in use.
    pub(crate) fn used_bytes(&self) -> u64 {
        let inner = self.lock();
        u64::from(inner.next + (self.size - inner.cold))
    }

    fn address(&self, offset: u32) -> u64 {
        self.executable.start() + u64::from(offset)
    }

    fn offset(&self, pc: u64) -> Option<u32> {
        let offset = pc.checked_sub(self.executable.start())?;
        u32::try_from(offset).ok().filter(|&at| at < self.size)
    }

    fn write(&self, offset: u32, bytes: &[u8]) {
        assert!(offset as usize + bytes.len() <= self.size as usize);
        let to = (self.writable.start() + u64::from(offset)) as *mut u8;
        // SAFETY: inside the writable mapping, as just checked. No vCPU runs these bytes yet, or
        // (patches) they are one aligned word.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
    }

    fn set_block(&self, number: u32, offset: u32) {
        let at = self.block_table.start() + 8 * u64::from(number);
        // SAFETY: numbers are below the table's length; generated code reads the word atomically.
        unsafe { AtomicU64::from_ptr(at as *mut u64) }
            .store(self.address(offset), Ordering::SeqCst);
    }

    fn map_element(map: u64, offset: u16) -> &'static AtomicU32 {
        let at = map + 4 * u64::from(offset & 0xfff);
        // SAFETY: maps lie in a reservation that lives as long as the cache, and callers hold the
        // cache; an element is only accessed atomically.
        unsafe { AtomicU32::from_ptr(at as *mut u32) }
    }

    /// The map of a page's code, made when there is none.
    pub(crate) fn map(&self, key: PageKey) -> Result<u64, Full> {
        let mut inner = self.lock();
        if let Some(page) = inner.pages.get(&key) {
            return Ok(page.map);
        }
        if inner.maps == MAX_MAPS {
            return Err(Full);
        }
        let map = self.maps.start() + inner.maps * MAP_BYTES;
        inner.maps += 1;
        inner.pages.insert(
            key,
            Page {
                map,
                blocks: Vec::new(),
                plain: HashMap::new(),
                parts: 0,
                pending: 0,
                version: u64::from(self.generation()) << 32,
            },
        );
        inner.modes.entry(key.gpa).or_default().push(key.mode);
        Ok(map)
    }

    /// Host address of the body of the block at `offset` of a mapped page.
    pub(crate) fn find(&self, map: u64, offset: u16) -> Option<u64> {
        let number = Self::map_element(map, offset).load(Ordering::SeqCst);
        if number == 0 {
            return None;
        }
        let at = self.block_table.start() + 8 * u64::from(number);
        // SAFETY: numbers in maps are below the table's length.
        let start = unsafe { AtomicU64::from_ptr(at as *mut u64) }.load(Ordering::SeqCst);
        Some(start + u64::from(BODY_ENTRY))
    }

    /// Announces a translation: from here on every write to the page drops it. Returns the
    /// version to install under.
    pub(crate) fn begin(&self, key: PageKey) -> Result<u64, Full> {
        self.map(key)?;
        let mut inner = self.lock();
        let page = inner.pages.get_mut(&key).ok_or(Full)?;
        page.pending += 1;
        Ok(page.version)
    }

    /// Adds a block and returns the address of its body; `None` when its page was written, or all
    /// code dropped, since [`Self::begin`]. When another vCPU was first, its block is returned and the new one dropped.
    pub(crate) fn install(
        &self,
        key: PageKey,
        version: u64,
        new: &NewBlock,
        plain: bool,
    ) -> Result<Option<u64>, Full> {
        let mut inner = self.lock();
        let generation = |version: u64| version >> 32;
        let page = match inner.pages.get_mut(&key) {
            Some(page) if generation(page.version) == generation(version) => page,
            _ => return Ok(None),
        };
        page.pending = page.pending.saturating_sub(1);
        if page.version != version {
            return Ok(None);
        }
        let map = page.map;
        if let Some(body) = self.present(&inner, key, new.guest, plain) {
            return Ok(Some(body));
        }
        let number = u32_of(inner.blocks.len());
        let block = inner.room(new)?.of(key, new.guest);
        if (number as usize + 1) * 8 > BLOCKS_BYTES {
            return Err(Full);
        }
        let code = self.relocate(&inner, new, &block);
        let (hot, cold) = code.split_at(new.hot_len);
        self.write(block.start, hot);
        self.write(block.cold, cold);
        inner.take(block);
        inner
            .sites
            .extend(new.sites.iter().map(|&site| (number, site)));
        inner
            .links
            .extend(new.links.iter().map(|&link| InstalledLink {
                block: number,
                link,
            }));
        let page = inner.pages.get_mut(&key).ok_or(Full)?;
        page.blocks.push(number);
        page.parts |= new.parts;
        for (start, len) in [(block.start, block.len), (block.cold, block.cold_len)] {
            self.notes.name(self.address(start), len, key, new.guest);
        }
        self.set_block(number, block.start);
        if plain {
            page.plain.insert(new.guest, number);
        } else {
            Self::map_element(map, new.guest).store(number, Ordering::SeqCst);
        }
        Ok(Some(self.address(block.start + BODY_ENTRY)))
    }

    fn present(&self, inner: &Inner, key: PageKey, guest: u16, plain: bool) -> Option<u64> {
        let page = inner.pages.get(&key)?;
        if !plain {
            return self.find(page.map, guest);
        }
        let number = *page.plain.get(&guest)?;
        Some(self.address(inner.blocks[number as usize].start + BODY_ENTRY))
    }

    /// Host address of the body of the block without groups at `guest`.
    pub(crate) fn find_plain(&self, key: PageKey, guest: u16) -> Option<u64> {
        self.present(&self.lock(), key, guest, true)
    }

    fn relocate(&self, inner: &Inner, new: &NewBlock, block: &Block) -> Vec<u8> {
        let mut code = new.code.clone();
        let rebase = |code: &mut Vec<u8>, place: usize, by: usize| {
            let mut word = [0; 4];
            word.copy_from_slice(&code[place..place + 4]);
            let value = u32::from_le_bytes(word) + u32_of(by);
            code[place..place + 4].copy_from_slice(&value.to_le_bytes());
        };
        for &place in &new.site_places {
            rebase(&mut code, place, inner.sites.len());
        }
        for &place in &new.link_places {
            rebase(&mut code, place, inner.links.len());
        }
        let gates = new
            .gate_places
            .iter()
            .map(|&(place, gate)| (place, self.trampolines[gate as usize]));
        let routines = new
            .routine_places
            .iter()
            .map(|(place, routine)| (*place, self.routines[routine]));
        for (place, target) in gates.chain(routines) {
            set_distance(&mut code, place, block.place(u32_of(place)), target);
        }
        for &(place, target) in &new.branches {
            let target = block.place(u32_of(target));
            set_distance(&mut code, place, block.place(u32_of(place)), target);
        }
        code
    }

    /// Adds code that belongs to no page, keyed by `key`, and returns its address.
    pub(crate) fn scratch(
        &self,
        key: &[u8],
        build: impl FnOnce() -> NewBlock,
    ) -> Result<u64, Full> {
        let mut inner = self.lock();
        if let Some(&address) = inner.scratch.get(key) {
            return Ok(address);
        }
        let new = build();
        // A block of no page, so that faults in it are recognised as nobody's.
        let block = inner.room(&new)?;
        let code = self.relocate(&inner, &new, &block);
        self.write(block.start, &code);
        inner.take(block);
        let address = self.address(block.start);
        inner.scratch.insert(key.to_vec(), address);
        Ok(address)
    }

    /// Site `number`, with its block.
    pub(crate) fn site(&self, number: u32) -> Option<(Block, Site)> {
        let inner = self.lock();
        let &(block, site) = inner.sites.get(number as usize)?;
        Some((inner.blocks[block as usize], site))
    }

    /// The block that holds host address `pc`, and the site whose code does.
    pub(crate) fn locate(&self, pc: u64) -> Option<(Block, Option<Site>)> {
        let offset = self.offset(pc)?;
        let inner = self.lock();
        let blocks = &inner.blocks;
        let index = if offset < inner.cold {
            blocks.partition_point(|block| block.start <= offset)
        } else {
            blocks.partition_point(|block| block.cold > offset) + 1
        }
        .checked_sub(1)?;
        let block = *blocks.get(index)?;
        let inside = block.inside(offset)?;
        let end = inner
            .blocks
            .get(index + 1)
            .map_or(inner.sites.len(), |next| next.first_site as usize);
        let site = inner.sites[block.first_site as usize..end]
            .iter()
            .map(|&(_, site)| site)
            .find(|site| (site.start..site.end).contains(&inside));
        Some((block, site))
    }

    /// Host address of byte `inside` of `block`.
    pub(crate) fn pc(&self, block: &Block, inside: u32) -> u64 {
        self.address(block.place(inside))
    }

    /// Link `number`, with its block.
    pub(crate) fn link(&self, number: u32) -> Option<(Block, Link)> {
        let inner = self.lock();
        let installed = inner.links.get(number as usize)?;
        Some((inner.blocks[installed.block as usize], installed.link))
    }

    /// Points a link at the block whose body is at `body`, unless either was dropped meanwhile.
    pub(crate) fn connect(&self, number: u32, body: u64) {
        let inner = self.lock();
        let Some(installed) = inner.links.get(number as usize) else {
            return;
        };
        let block = inner.blocks[installed.block as usize];
        // The target must be the page's current block there: a dropped one is not linked to.
        let link = installed.link;
        if self.present(&inner, block.key, link.target, link.plain) != Some(body) {
            return;
        }
        let Some(target) = self.offset(body) else {
            return;
        };
        let target = if installed.link.backward {
            target - BODY_ENTRY + POLL_ENTRY
        } else {
            target
        };
        let place = block.place(installed.link.place);
        let distance = target.wrapping_sub(place + 4);
        let at = self.writable.start() + u64::from(place);
        // SAFETY: the place lies in the cache and is aligned (the translator pads it), so other
        // processors see the old jump or the new one.
        unsafe { AtomicU32::from_ptr(at as *mut u32) }.store(distance, Ordering::SeqCst);
    }

    /// Does something while no page stops or starts counting as code for its translations.
    pub(crate) fn exclusively<R>(&self, act: impl FnOnce() -> R) -> R {
        let _inner = self.lock();
        act()
    }

    /// Claims the right to call [`Self::clear`]; false when another vCPU has it.
    pub(crate) fn begin_clearing(&self) -> bool {
        !self.clearing.swap(true, Ordering::SeqCst)
    }

    /// Whether all code is about to go.
    pub(crate) fn is_clearing(&self) -> bool {
        self.clearing.load(Ordering::SeqCst)
    }

    /// Forgets everything. The caller has made sure that no vCPU is in translated code or will
    /// use an old table entry.
    pub(crate) fn clear(&self, shared: &Shared) {
        let mut inner = self.lock();
        for &gpa in inner.modes.keys() {
            if !shared.is_patched(gpa) {
                shared.pages.unmark_code(gpa);
            }
        }
        self.reset(&mut inner);
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.clearing.store(false, Ordering::SeqCst);
    }
}

impl Inner {
    /// Where `new` fits, as a block of no page.
    fn room(&self, new: &NewBlock) -> Result<Block, Full> {
        let hot_len = u32_of(new.hot_len);
        let cold_len = u32_of(new.code.len() - new.hot_len);
        let start = self.next.next_multiple_of(BLOCK_ALIGNMENT);
        // What is aligned in the block stays so in either piece.
        let cold = self
            .cold
            .checked_sub(cold_len + 2 * BLOCK_ALIGNMENT)
            .ok_or(Full)?
            / BLOCK_ALIGNMENT
            * BLOCK_ALIGNMENT
            + hot_len % BLOCK_ALIGNMENT;
        if start + hot_len > cold {
            return Err(Full);
        }
        Ok(Block {
            cold,
            cold_len,
            first_site: u32_of(self.sites.len()),
            ..Block::at(start, hot_len)
        })
    }

    fn take(&mut self, block: Block) {
        self.next = block.start + block.len;
        self.cold = block.cold;
        self.blocks.push(block);
    }
}

/// Points the branch displacement in `code` at `index`, which will lie at `place`, at `target`.
fn set_distance(code: &mut [u8], index: usize, place: u32, target: u32) {
    let distance = i64::from(target) - i64::from(place) - 4;
    let distance = i32::try_from(distance).expect("the cache is smaller than 2 GiB");
    code[index..index + 4].copy_from_slice(&distance.to_le_bytes());
}

fn u32_of(value: usize) -> u32 {
    u32::try_from(value).expect("the cache and its tables are far below 4 GiB")
}

//! Which pages were written, and who must hear of it at once.

use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;

use vm_memory::GuestAddress;
use vm_memory::bitmap::Bitmap;
use vm_memory::bitmap::RefSlice;
use vm_memory::bitmap::WithBitmapSlice;

use crate::PAGE_SIZE;

/// Hears of device writes to watched pages, after the bytes are in place and before the device
/// tells the guest (so that a guest that learns of the data never meets what was derived from
/// the old content).
pub trait WriteWatcher: Send + Sync {
    /// The page that starts at `page` was written by a device.
    fn page_written(&self, page: GuestAddress);
}

/// The dirty log is on; the other bits count [`UnheardWriter`](crate::UnheardWriter)s.
const LOGGING: u32 = 1 << 31;

/// Somebody writes to guest memory whom the tracker doesn't hear.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the host's kernel writes to guest memory, and isn't heard by the dirty log")]
pub struct Unheard;

/// Per-region page state: a dirty log and a watch set, one bit a page each.
///
/// All methods may be called from any thread.
pub struct PageTracker {
    base: GuestAddress,
    /// [`LOGGING`], or how many write unheard: never both.
    state: AtomicU32,
    dirty: Box<[AtomicU64]>,
    watched: Box<[AtomicU64]>,
    watcher: OnceLock<Arc<dyn WriteWatcher>>,
}

impl std::fmt::Debug for PageTracker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PageTracker")
            .field("base", &self.base)
            .field("logging", &self.is_logging())
            .finish_non_exhaustive()
    }
}

fn bitmap(pages: usize) -> Box<[AtomicU64]> {
    (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect()
}

fn page_of(offset: usize) -> usize {
    offset >> PAGE_SIZE.trailing_zeros()
}

impl PageTracker {
    /// A tracker for a region of `len_bytes` at `base`, with logging off and nothing watched.
    #[must_use]
    pub fn new(base: GuestAddress, len_bytes: usize) -> Self {
        let pages = page_of(len_bytes);
        Self {
            base,
            state: AtomicU32::new(0),
            dirty: bitmap(pages),
            watched: bitmap(pages),
            watcher: OnceLock::new(),
        }
    }

    /// Names who hears of writes to watched pages. Only the first call has an effect.
    pub fn set_watcher(&self, watcher: Arc<dyn WriteWatcher>) {
        // A region belongs to one machine and a machine to one engine, so there is one watcher.
        let _ = self.watcher.set(watcher);
    }

    /// Starts or stops the dirty log. Starting doesn't clear it: see [`Self::take_dirty`].
    ///
    /// # Errors
    /// [`Unheard`] while somebody writes that the log would not hear of.
    pub fn set_logging(&self, on: bool) -> Result<(), Unheard> {
        self.change(|state| match state {
            0 | LOGGING => Some(if on { LOGGING } else { 0 }),
            _ => (!on).then_some(state),
        })
    }

    /// Whether the dirty log is on.
    #[must_use]
    pub fn is_logging(&self) -> bool {
        self.state.load(Ordering::Relaxed) == LOGGING
    }

    /// Lets one more write unheard, unless somebody must hear of every write.
    pub(crate) fn admit_unheard(&self) -> bool {
        let next = |state| (state != LOGGING).then_some(state + 1);
        self.watcher.get().is_none() && self.change(next).is_ok()
    }

    /// Ends what [`Self::admit_unheard`] allowed.
    pub(crate) fn dismiss_unheard(&self) {
        // Counted in before, so that it is no log and not zero.
        let _ = self.change(|state| state.checked_sub(1));
    }

    fn change(&self, next: impl Fn(u32) -> Option<u32>) -> Result<(), Unheard> {
        self.state
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, next)
            .map(drop)
            .map_err(|_| Unheard)
    }

    /// Reports writes to the page at byte `offset` of the region to the watcher from now on.
    pub fn watch(&self, offset: usize) {
        set(&self.watched, page_of(offset));
    }

    /// Ends [`Self::watch`].
    pub fn unwatch(&self, offset: usize) {
        let page = page_of(offset);
        if let Some(word) = self.watched.get(page / 64) {
            word.fetch_and(!(1 << (page % 64)), Ordering::SeqCst);
        }
    }

    /// Takes the dirty log: bit `n` of word `n / 64` is page `n` of the region; leaves it empty.
    #[must_use]
    pub fn take_dirty(&self) -> Vec<u64> {
        self.dirty
            .iter()
            .map(|word| word.swap(0, Ordering::SeqCst))
            .collect()
    }

    fn page_written(&self, page: usize) {
        if self.is_logging() {
            set(&self.dirty, page);
        }
        if get(&self.watched, page)
            && let Some(watcher) = self.watcher.get()
        {
            watcher.page_written(GuestAddress(self.base.0 + page as u64 * PAGE_SIZE));
        }
    }
}

fn set(bits: &[AtomicU64], page: usize) {
    if let Some(word) = bits.get(page / 64) {
        let bit = 1 << (page % 64);
        // Most writes hit pages that are marked already: don't take the cache line for those.
        if word.load(Ordering::SeqCst) & bit == 0 {
            word.fetch_or(bit, Ordering::SeqCst);
        }
    }
}

fn get(bits: &[AtomicU64], page: usize) -> bool {
    bits.get(page / 64)
        .is_some_and(|word| word.load(Ordering::SeqCst) & (1 << (page % 64)) != 0)
}

impl<'a> WithBitmapSlice<'a> for PageTracker {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for PageTracker {
    fn mark_dirty(&self, offset: usize, len: usize) {
        let Some(last) = len.checked_sub(1).and_then(|n| offset.checked_add(n)) else {
            return;
        };
        for page in page_of(offset)..=page_of(last) {
            self.page_written(page);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        get(&self.dirty, page_of(offset))
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<u64>>);

    impl WriteWatcher for Recorder {
        fn page_written(&self, page: GuestAddress) {
            self.0.lock().expect("test").push(page.0);
        }
    }

    #[test]
    fn a_write_across_pages_marks_each() {
        let tracker = PageTracker::new(GuestAddress(0), 1 << 20);
        tracker.set_logging(true).expect("all are heard");
        tracker.mark_dirty(4095, 4098);
        assert_eq!(tracker.take_dirty()[0], 0b111);
        assert_eq!(tracker.take_dirty()[0], 0);
    }

    #[test]
    fn nothing_is_logged_when_off_and_empty_writes_mark_nothing() {
        let tracker = PageTracker::new(GuestAddress(0), 1 << 20);
        tracker.mark_dirty(0, 1);
        tracker.set_logging(true).expect("all are heard");
        tracker.mark_dirty(0, 0);
        assert_eq!(tracker.take_dirty()[0], 0);
    }

    #[test]
    fn only_watched_pages_are_reported_with_their_guest_address() {
        let tracker = PageTracker::new(GuestAddress(0x1_0000_0000), 1 << 20);
        let recorder = Arc::new(Recorder::default());
        tracker.set_watcher(recorder.clone());
        tracker.watch(0x3000);
        tracker.mark_dirty(0x2fff, 1);
        tracker.mark_dirty(0x3008, 8);
        tracker.unwatch(0x3000);
        tracker.mark_dirty(0x3008, 8);
        assert_eq!(*recorder.0.lock().expect("test"), [0x1_0000_3000]);
    }

    #[test]
    fn offsets_past_the_region_are_ignored() {
        let tracker = PageTracker::new(GuestAddress(0), 4096);
        tracker.set_logging(true).expect("all are heard");
        tracker.mark_dirty(1 << 40, 8);
        tracker.mark_dirty(usize::MAX, 8);
        assert!(!tracker.dirty_at(1 << 40));
    }
}

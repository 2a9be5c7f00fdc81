//! One heap for all threads.

// UNSAFETY: the C library's own tuning call.
#![expect(unsafe_code, reason = "mallopt has no safe wrapper")]

/// Has every thread allocate from the process's one heap. glibc gives each thread a heap of its own
/// otherwise, and before it first makes one of those smaller it opens a file in /proc, which a jailed
/// thread may not. Threads that allocate often have their own small caches all the same.
pub(crate) fn share() {
    #[cfg(target_env = "gnu")]
    // SAFETY: no other thread exists yet.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

//! A few threads for what waits for the disk.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::Condvar;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::EFD_NONBLOCK;
use vmm_sys_util::eventfd::EventFd;

/// Runs first in each thread: names it, takes away its rights.
pub type ThreadStart = Arc<dyn Fn() + Send + Sync>;

type Job<R> = Box<dyn FnOnce() -> R + Send>;

struct State<R> {
    jobs: VecDeque<Job<R>>,
    results: Vec<R>,
    running: usize,
    stopping: bool,
}

struct Shared<R> {
    state: Mutex<State<R>>,
    /// A job came, or the end.
    work: Condvar,
    /// A job is done.
    rest: Condvar,
    done: EventFd,
}

impl<R> Shared<R> {
    fn lock(&self) -> MutexGuard<'_, State<R>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        let mut state = self.lock();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                state.running += 1;
                drop(state);
                let result = job();
                state = self.lock();
                state.running -= 1;
                state.results.push(result);
                // Fails only when the counter is full: the loop knows then.
                let _ = self.done.write(1);
                self.rest.notify_all();
            } else if state.stopping {
                return;
            } else {
                state = self
                    .work
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
}

/// The threads and their queue, which is as long as its users make it: here, a virtqueue's size.
pub(super) struct Pool<R> {
    shared: Arc<Shared<R>>,
    threads: Vec<JoinHandle<()>>,
}

impl<R: Send + 'static> Pool<R> {
    pub(super) fn new(threads: usize, start: Option<&ThreadStart>) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                jobs: VecDeque::new(),
                results: Vec::new(),
                running: 0,
                stopping: false,
            }),
            work: Condvar::new(),
            rest: Condvar::new(),
            done: EventFd::new(EFD_NONBLOCK)?,
        });
        let mut pool = Self {
            shared,
            threads: Vec::new(),
        };
        for _ in 0..threads {
            let shared = Arc::clone(&pool.shared);
            let start = start.cloned();
            let thread = std::thread::Builder::new()
                .name("block-io".to_owned())
                .spawn(move || {
                    if let Some(start) = start {
                        start();
                    }
                    shared.work();
                })?;
            pool.threads.push(thread);
        }
        Ok(pool)
    }

    /// Rings when results wait.
    pub(super) fn done(&self) -> &EventFd {
        &self.shared.done
    }

    pub(super) fn submit(&self, job: impl FnOnce() -> R + Send + 'static) {
        self.shared.lock().jobs.push_back(Box::new(job));
        self.shared.work.notify_one();
    }

    pub(super) fn take_results(&self) -> Vec<R> {
        // Empty when the ring was taken already.
        let _ = self.shared.done.read();
        std::mem::take(&mut self.shared.lock().results)
    }

    /// Waits for all jobs.
    pub(super) fn finish(&self) {
        let mut state = self.shared.lock();
        while state.running > 0 || !state.jobs.is_empty() {
            state = self
                .shared
                .rest
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Forgets jobs that haven't begun and waits for those that have.
    pub(super) fn abandon(&self) {
        self.shared.lock().jobs.clear();
        self.finish();
        drop(self.take_results());
    }
}

impl<R> Drop for Pool<R> {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.jobs.clear();
        state.stopping = true;
        drop(state);
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            // A panic in a job is reported by the runtime; there is nobody else to tell.
            let _ = thread.join();
        }
    }
}

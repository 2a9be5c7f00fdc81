//! A guest that hangs fails its body, and an engine that doesn't answer kicks ends the process.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use ringfence_engine::VcpuWaker;

/// Enough for the slowest host that is of use: an emulated one under load.
const TIME_LIMIT: Duration = Duration::from_secs(30);

/// Kicks its vCPUs when the time is over, unless dropped before.
pub(crate) struct Watchdog {
    expired: Arc<AtomicBool>,
    stop: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Watchdog {
    pub(crate) fn start(wakers: Vec<Arc<dyn VcpuWaker>>) -> Self {
        let (stop, stopped) = mpsc::channel();
        let expired = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&expired);
        let thread = std::thread::spawn(move || {
            if stopped.recv_timeout(TIME_LIMIT) != Err(mpsc::RecvTimeoutError::Timeout) {
                return;
            }
            flag.store(true, Ordering::SeqCst);
            for waker in &wakers {
                waker.kick();
            }
            if stopped.recv_timeout(TIME_LIMIT) == Err(mpsc::RecvTimeoutError::Timeout) {
                eprintln!("the engine did not answer a kick for {TIME_LIMIT:?}: giving up");
                std::process::abort();
            }
        });
        Self {
            expired,
            stop: Some(stop),
            thread: Some(thread),
        }
    }

    /// Whether the time was over.
    pub(crate) fn expired(&self) -> bool {
        self.expired.load(Ordering::SeqCst)
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

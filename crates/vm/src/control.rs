//! The control socket: JSON lines in both directions.
//!
//! ```text
//!   {"id":1,"method":"pause","params":{}}  ->  {"id":1,"result":{}}
//!                                          or  {"id":1,"error":{"kind":"state","message":"…"}}
//!   events: {"event":"ready",…}, {"event":"crash-kernel"}, and last {"event":"exit","reason":…}
//! ```
//! One thread serves it, in order. The other end's closing ends the machine. docs/reference/
//! vm-control.md lists the methods.

mod cards;
mod connection;
mod methods;

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

use ringfence_machine::MachineEnd;
use ringfence_machine::MachineEvent;
use rustix::event::EventfdFlags;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use serde_json::json;

use crate::VmError;

pub(crate) use connection::Connection;
pub(crate) use methods::Subject;

/// Events on their way from the machine's threads to the control thread.
#[derive(Debug)]
pub(crate) struct Mailbox {
    bell: OwnedFd,
    events: Mutex<VecDeque<MachineEvent>>,
}

impl Mailbox {
    pub(crate) fn new() -> Result<Arc<Self>, VmError> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let bell = rustix::event::eventfd(0, flags).map_err(VmError::host("make an event"))?;
        Ok(Arc::new(Self {
            bell,
            events: Mutex::default(),
        }))
    }

    fn events(&self) -> MutexGuard<'_, VecDeque<MachineEvent>> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes an event in, from any thread. A guest that repeats itself doesn't grow the box.
    pub(crate) fn put(&self, event: MachineEvent) {
        let mut events = self.events();
        if events.back() != Some(&event) {
            events.push_back(event);
        }
        drop(events);
        // Fails only when the counter is full: the bell rings already.
        let _ = rustix::io::write(&self.bell, &1_u64.to_ne_bytes());
    }

    fn take(&self) -> VecDeque<MachineEvent> {
        let mut count = [0; 8];
        // Empty when the bell was taken already.
        let _ = rustix::io::read(&self.bell, &mut count);
        std::mem::take(&mut *self.events())
    }
}

/// Serves the control socket until the machine has ended.
pub(crate) fn serve(
    connection: &mut Connection,
    mailbox: &Mailbox,
    subject: &mut Subject,
) -> MachineEnd {
    loop {
        let mut interest = PollFlags::empty();
        interest.set(PollFlags::IN, connection.is_open());
        interest.set(PollFlags::OUT, connection.has_output());
        let mut polled = [
            PollFd::new(&mailbox.bell, PollFlags::IN),
            PollFd::new(connection.socket(), interest),
        ];
        // A socket whose other end is gone polls as ready for ever.
        let count = if connection.is_open() { 2 } else { 1 };
        // Interrupted by a signal, or out of memory for a moment: look again.
        let _ = rustix::event::poll(&mut polled[..count], None);
        let ready = count == 2 && !polled[1].revents().is_empty();
        for event in mailbox.take() {
            match event {
                MachineEvent::CrashKernel => connection.send(&json!({"event": "crash-kernel"})),
                MachineEvent::Ended(end) => return end,
            }
        }
        if ready {
            connection.flush();
            for line in connection.receive() {
                let answer = subject.answer(&line, connection);
                connection.send(&answer);
            }
            if !connection.is_open() {
                // Whoever started the machine is gone: nobody else will end it.
                subject.machine.stop();
            }
        }
    }
}
